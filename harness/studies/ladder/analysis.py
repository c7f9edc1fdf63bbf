"""What follows from a ladder's runs: fits by every convention of counting, and the largest size predicted from the
others."""

from __future__ import annotations

from typing import Any

import numpy as np

from harness.config import HarnessError
from harness.scaling import LAWS, Fit, fit

from .config import COUNTS, LadderSection
from .grid import cells

PREDICTORS = ("chinchilla", "overtraining", "power")
"""Laws that predict the largest size; power of the FLOPs, each length of training by itself."""


def finished_rows(config: LadderSection) -> list[dict[str, Any]]:
    """The results of all parts. HarnessError where there are none."""
    whole = config.model_copy(update={"part": 0, "parts": 1})
    rows = [row for cell in cells(whole) if (row := cell.result(config)) is not None]
    if not rows:
        raise HarnessError(f"{config.path}: no run of this ladder is done yet; `harness study run` does them")
    return rows


def analyse(config: LadderSection) -> dict[str, Any]:
    """Everything that a report says, as JSON. What cannot be fitted yet says why."""
    rows = finished_rows(config)
    fits: dict[str, Any] = {}
    for count in COUNTS:
        try:
            fits[count] = fit_rows(rows, "chinchilla", count, config.resamples).as_json()
        except HarnessError as error:
            fits[count] = {"cannot": str(error)}
    return {"runs": rows, "cells": spreads(rows), "fits": fits, "held_out": hold_out(rows, config)}


def columns(rows: list[dict[str, Any]], count: str) -> dict[str, np.ndarray]:
    """As the laws name them."""
    named = {"parameters": count, "tokens": "tokens", "loss": "loss", "x": "flops"}
    return {name: np.array([row[key] for row in rows], dtype=np.float64) for name, key in named.items()}


def fit_rows(rows: list[dict[str, Any]], law: str, count: str, resamples: int = 1000) -> Fit:
    """Runs of one size and length, which differ by their seed alone, are resampled together."""
    groups = [f"{row['size']}-{row['ratio']}" for row in rows]
    return fit(LAWS[law], columns(rows, count), groups=groups, resamples=resamples)


def spreads(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By size and length: the mean loss over seeds, and its standard deviation (null of one seed)."""
    found = []
    for size, ratio in dict.fromkeys((row["size"], row["ratio"]) for row in rows):
        mine = [row for row in rows if (row["size"], row["ratio"]) == (size, ratio)]
        losses = np.array([row["loss"] for row in mine])
        names = ("total", "non_embedding", "without_head", "tokens", "steps", "sequences", "learning_rate", "flops")
        found.append(
            {
                "size": size,
                "ratio": ratio,
                **{name: mine[0][name] for name in names},
                "seeds": len(mine),
                "loss": float(losses.mean()),
                "over_seeds": float(losses.std(ddof=1)) if len(mine) > 1 else None,
            }
        )
    return found


def hold_out(rows: list[dict[str, Any]], config: LadderSection) -> list[dict[str, Any]]:
    """The largest size's losses as the laws predict them from all the other sizes; intervals are for one new run: the
    resampled laws with their residuals."""
    largest = max(rows, key=lambda row: row["non_embedding"])["size"]
    rest = [row for row in rows if row["size"] != largest]
    found = []
    for law in PREDICTORS:
        for ratio in dict.fromkeys(row["ratio"] for row in rows if row["size"] == largest):
            mine = [row for row in rows if (row["size"], row["ratio"]) == (largest, ratio)]
            known = [row for row in rest if row["ratio"] == ratio] if law == "power" else rest
            entry: dict[str, Any] = {"law": law, "count": config.count, "size": largest, "ratio": ratio}
            try:
                fitted = fit_rows(known, law, config.count, config.resamples)
            except HarnessError as error:
                found.append({**entry, "cannot": str(error)})
                continue
            x = {name: values[:1] for name, values in columns(mine, config.count).items()}
            loss = float(np.mean([row["loss"] for row in mine]))
            low, high = _interval(fitted, x)
            predicted = float(fitted.predict(x)[0])
            entry |= {"loss": loss, "predicted": predicted, "error": predicted - loss, "low": low, "high": high}
            found.append({**entry, "inside": low <= loss <= high, "warnings": list(fitted.warnings)})
    return found


def _interval(fitted: Fit, x: dict[str, np.ndarray]) -> tuple[float, float]:
    """95 % for one new run."""
    values = fitted.law.predict(fitted.resamples, {**fitted.constants, **x})[:, 0]
    noise = np.random.default_rng(0).choice(fitted.residuals, size=len(values))
    low, high = np.percentile(values * np.exp(noise), [2.5, 97.5])
    return float(low), float(high)
