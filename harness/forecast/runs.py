"""The curve of a run folder, finished or still going."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from harness.config import HarnessError, validate
from harness.optim import ScheduleSection, learning_rate
from harness.runs import read
from harness.scaling import Curve

ENOUGH_VALIDATIONS = 12
"""Validations after the warm-up from which on a forecast is made of them, and not of the training loss."""

Kind = Literal["auto", "training", "validation"]


def planned_rates(schedule: ScheduleSection, peak: float, steps: int) -> np.ndarray:
    """The learning rate of every step, of step 1 first: float64 [steps]."""
    return np.array([learning_rate(schedule, peak, step, steps) for step in range(1, steps + 1)])


def read_curve(path: Path | str, kind: Kind = "auto") -> Curve:
    """A run's losses, and its rates: those that it had, and for steps to come those that are configured.

    kind auto: validation losses if there are ENOUGH_VALIDATIONS after the warm-up, else training losses. Raises
    HarnessError, one line, for what is no run or has recorded nothing.
    """
    run = read(path)
    if not run.metrics:
        raise HarnessError(f"{path}: has recorded no step yet")
    if kind == "auto":
        found = _curve(run.path, run.config, run.environment, run.metrics, "validation")
        if len(found.settled().steps) >= ENOUGH_VALIDATIONS:
            return found
        kind = "training"
    return _curve(run.path, run.config, run.environment, run.metrics, kind)


def _curve(
    path: Path,
    config: dict[str, Any],
    environment: dict[str, Any],
    metrics: list[dict[str, Any]],
    kind: Literal["training", "validation"],
) -> Curve:
    try:
        schedule = validate(ScheduleSection, config["schedule"], f"{path}/config.yaml: schedule")
        peak, total = config["optimizer"]["learning_rate"], config["train"]["steps"]
        tokens = config["train"]["global_batch_size"] * config["data"]["sequence_length"]
    except KeyError as error:
        raise HarnessError(f"{path}/config.yaml: has no {error}; is this a run of harness train?") from None
    rates = planned_rates(schedule, peak, max(total, metrics[-1]["step"]))
    for record in metrics:
        rates[record["step"] - 1] = record["learning_rate"]
    column = "validation_loss" if kind == "validation" else "loss"
    points = [(record["step"], record.get(column)) for record in metrics if "skipped" not in record]
    points = [(step, loss) for step, loss in points if loss is not None and np.isfinite(loss) and loss > 0]
    return Curve(
        str(path),
        rates,
        np.array([step for step, _ in points], dtype=np.int64),
        np.array([loss for _, loss in points], dtype=np.float64),
        tokens_per_step=float(tokens),
        parameters=_blocks(environment),
        kind=kind,
    )


def _blocks(environment: dict[str, Any]) -> float | None:
    count = environment.get("parameters", {}).get("blocks")
    return None if count is None else float(count)
