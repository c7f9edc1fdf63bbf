"""A prior whose truth is known, and records of runs drawn from it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from harness.forecast import Forecasting, ForecastSection, planned_rates
from harness.optim import ScheduleSection
from harness.scaling import Prior, annealing_areas
from harness.scaling.residuals import Residuals

STEPS, PEAK = 2000, 1e-3
SCHEDULE = ScheduleSection(kind="cosine", warmup_steps=50)
RATES = planned_rates(SCHEDULE, PEAK, STEPS)
TRUTH = np.array([np.log(0.5), np.log(0.2), 0.5])


def write_prior(path: Path) -> Path:
    spread = np.diag([0.01, 0.01, 0.001])
    Prior(TRUTH, spread, Residuals(2e-3, 1e-3, 0.3), 0.7, PEAK, None, None, ()).save(path)
    return path


def losses(generator: np.random.Generator, noise: float = 0.01) -> np.ndarray:
    """Of every step: the law, of S1 and S2 with the warm-up at the peak, and noise."""
    level = np.where(np.arange(STEPS) < RATES.argmax(), PEAK, RATES)
    law = 2.5 + np.exp(TRUTH[0]) * np.cumsum(RATES) ** -TRUTH[2] - np.exp(TRUTH[1]) * annealing_areas(level)[1]
    values: np.ndarray = law * np.exp(noise * generator.standard_normal(STEPS))
    return values


def made(prior: Path, rank: int = 0, steps: int = STEPS, **section: Any) -> Forecasting:
    options = {"tokens_per_step": 1, "parameters": 1, "rank": rank}
    return Forecasting(ForecastSection(prior=str(prior), **section), SCHEDULE, peak=PEAK, steps=steps, **options)


class View:
    """Of a trainer, what a forecast looks at; and the events."""

    def __init__(self) -> None:
        self.step, self.total_steps = 0, STEPS
        self.events: list[dict[str, Any]] = []
        self.run = SimpleNamespace(log_event=self._note)

    def _note(self, event: str, step: int, **details: Any) -> None:
        self.events.append({"event": event, "step": step, **details})

    def feed(self, callback: Forecasting, values: np.ndarray, first: int = 1, **more: Any) -> list[dict[str, Any]]:
        """Steps from `first` on; the records."""
        records = []
        for step, loss in enumerate(values, first):
            self.step = step
            record = {"step": step, "loss": float(loss), "learning_rate": float(RATES[step - 1])} | {
                name: values[step] for name, values in more.items() if step in values
            }
            callback.after_step(self, record)  # type: ignore[arg-type]
            records.append(record)
        return records
