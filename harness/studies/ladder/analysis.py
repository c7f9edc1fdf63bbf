"""What follows from a ladder's runs: fits by every convention of counting, and the largest size predicted from the
others."""

from __future__ import annotations

from typing import Any

import numpy as np

from harness.config import HarnessError
from harness.scaling import LAWS, Fit, fit, hold_out

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
    return {"runs": rows, "cells": spreads(rows), "fits": fits, "held_out": held_out(rows, config)}


def columns(rows: list[dict[str, Any]], count: str) -> dict[str, np.ndarray]:
    """As the laws name them."""
    named = {"parameters": count, "tokens": "tokens", "loss": "loss", "x": "flops"}
    return {name: np.array([row[key] for row in rows], dtype=np.float64) for name, key in named.items()}


def fit_rows(rows: list[dict[str, Any]], law: str, count: str, resamples: int = 1000) -> Fit:
    return fit(LAWS[law], columns(rows, count), groups=groups(rows), resamples=resamples)


def groups(rows: list[dict[str, Any]]) -> list[str]:
    """Runs of one size and length, which differ by their seed alone, are resampled together."""
    return [f"{row['size']}-{row['ratio']}" for row in rows]


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


def held_out(rows: list[dict[str, Any]], config: LadderSection) -> list[dict[str, Any]]:
    """The largest size's losses as the laws predict them from all the other sizes; intervals are for one new run."""
    largest = max(rows, key=lambda row: row["non_embedding"])["size"]
    ratios = sorted({row["ratio"] for row in rows if row["size"] == largest})
    found = []
    for law in PREDICTORS:
        for asked in [[ratio] for ratio in ratios] if law == "power" else [ratios]:
            mine = [row for row in rows if law != "power" or row["ratio"] in asked]
            entry: dict[str, Any] = {"law": law, "count": config.count, "size": largest}
            try:
                held = hold_out(LAWS[law], columns(mine, config.count), groups=groups(mine), resamples=config.resamples)
            except HarnessError as error:
                found += [{**entry, "ratio": ratio, "cannot": str(error)} for ratio in asked]
                continue
            entry["warnings"] = list(held.fitted.warnings)
            for ratio in asked:
                places = np.flatnonzero([mine[row]["ratio"] == ratio for row in held.rows])
                loss, predicted, low, high = (
                    float(values[places].mean()) for values in (held.loss, held.predicted, held.low, held.high)
                )
                numbers = {"loss": loss, "predicted": predicted, "error": predicted - loss, "low": low, "high": high}
                found.append({**entry, "ratio": ratio, **numbers, "inside": low <= loss <= high})
    return found
