"""Gaps between removals and their controls, with their spread over seeds, and what they mean."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from harness.config import HarnessError

from .config import NormRemovalStudySection
from .grid import Cell, removal_cells

RESULT_NATS = 0.2
"""Below this cost of freezing without training a gap is called no result; see harness.normfree.proof."""


def analyse(config: NormRemovalStudySection) -> dict[str, Any]:
    """Sources, and a row for every family and arm; `failed_after`: the steps after which seeds of it diverged.
    HarnessError where nothing is done yet."""
    sources = {}
    for family in config.families:
        file = config.path / "sources" / family / "measured.json"
        if file.exists():
            sources[family] = json.loads(file.read_text())
    rows = []
    for family in sources:
        for arm in config.removals:
            row = _row(config, family, arm.name, sources[family])
            if row is not None:
                rows.append(row)
    if not rows:
        raise HarnessError(f"{config.folder}: no removal of this study is done yet; `run` does them")
    return {"sources": sources, "rows": rows, "runs": _runs(config)}


def _row(config: NormRemovalStudySection, family: str, arm: str, source: dict[str, Any]) -> dict[str, Any] | None:
    done = [(cell, cell.result(config)) for cell in removal_cells(config) if (cell.family, cell.arm) == (family, arm)]
    ended = [(cell, result) for cell, result in done if result is not None]
    failed = [result["failed_after"] for _, result in ended if "failed" in result]
    found = [(cell, result) for cell, result in ended if "failed" not in result]
    if not found:
        return {"family": family, "arm": arm, "seeds": 0, "failed_after": failed} if failed else None
    gaps: dict[str, Any] = {}
    for control in config.controls:
        pairs = []
        for cell, result in found:
            other = Cell(family, control.name, cell.seed, result["consumed_steps"]).result(config)
            if other is not None:
                pairs.append(paired(result["window_losses"], other["window_losses"]))
        if pairs:
            gaps[control.name] = over_seeds(pairs)
    before = [paired(result["window_losses"], source["window_losses"]) for _, result in found]
    losses = [result["quality"]["mean"] for _, result in found]
    return {
        "family": family,
        "arm": arm,
        "seeds": len(found),
        "failed_after": failed,
        "loss": float(np.mean(losses)),
        "minus_original": over_seeds(before),
        "gaps": gaps,
        "proofs_hold": sum(result["proof"]["holds"] for _, result in found),
        "rollbacks": sum(event["event"] == "rolled_back" for _, result in found for event in result["events"]),
        "p999": float(np.mean([result["quality"]["p999"] for _, result in found])),
        "calibration_error": float(np.mean([result["quality"]["calibration_error"] for _, result in found])),
        "rare_bytes": float(np.mean([result["rare_bytes"]["mean"] for _, result in found])),
        "gaps_are_results": source["freezing_cost"] >= RESULT_NATS,
    }


def paired(mine: list[float], theirs: list[float]) -> tuple[float, float]:
    """The mean difference over validation windows, and its standard error over them."""
    difference = np.array(mine) - np.array(theirs)
    return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))


def over_seeds(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """The mean of the seeds' differences; their standard deviation (None of one seed); and the mean standard error over
    windows, which seeds share."""
    means = np.array([mean for mean, _ in pairs])
    return {
        "nats": float(means.mean()),
        "over_seeds": float(means.std(ddof=1)) if len(means) > 1 else None,
        "over_windows": float(np.mean([error for _, error in pairs])),
        "by_seed": means.tolist(),
    }


def _runs(config: NormRemovalStudySection) -> list[dict[str, Any]]:
    """Every result that there is, without the losses of windows."""
    files = sorted((config.path / "results").glob("*.json"))
    results = [json.loads(file.read_text()) for file in files]
    return [{key: value for key, value in result.items() if key != "window_losses"} for result in results]
