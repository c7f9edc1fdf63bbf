"""The losses of a run so far, in as little memory as a forecast needs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

BINS = 512
"""Of a whole run."""
SAME_RATE = 1e-6


class History:
    """Means of the training loss over bins of equally many steps, and the validation losses. Its state is JSON and
    comes back to the last bit."""

    def __init__(self, total_steps: int) -> None:
        self.last_step = 0
        self._width = max(1, total_steps // BINS)
        self._sums: list[float] = []  # of each bin
        self._counts: list[int] = []
        self._seen: list[int] = []
        self._rates: list[float] = []
        self._recent: list[list[float]] = []  # step and loss
        self._validations: list[list[float]] = []

    def add(self, record: dict[str, Any], keep_recent: int) -> None:
        """Take a step's record. A step that is there already is not counted twice; one whose loss is no number, or
        which was skipped, has none."""
        step = int(record["step"])
        if step <= self.last_step:
            return
        self.last_step = step
        place = (step - 1) // self._width
        while len(self._sums) <= place:
            self._sums.append(0.0)
            self._counts.append(0)
            self._seen.append(0)
            self._rates.append(0.0)
        self._seen[place] += 1
        self._rates[place] += record["learning_rate"]
        loss = record["loss"]
        if math.isfinite(loss) and loss > 0 and "skipped" not in record:
            self._sums[place] += loss
            self._counts[place] += 1
            self._recent = [*self._recent, [step, loss]][-keep_recent:]
        validation = record.get("validation_loss", math.nan)
        if math.isfinite(validation) and validation > 0:
            self._validations.append([step, validation])

    def training(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps int64 [bins] and mean losses, of the bins that are full and have a loss; the step is the middle one."""
        full = [n for n, count in enumerate(self._counts) if count and (n + 1) * self._width <= self.last_step]
        steps = np.array([n * self._width + (self._width + 1) // 2 for n in full], dtype=np.int64)
        return steps, np.array([self._sums[n] / self._counts[n] for n in full])

    def validation(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps int64 [validations] and losses."""
        return (
            np.array([int(step) for step, _ in self._validations], dtype=np.int64),
            np.array([loss for _, loss in self._validations]),
        )

    def recent(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps int64 and training losses of the last steps that had one."""
        return np.array([int(step) for step, _ in self._recent], dtype=np.int64), np.array(
            [loss for _, loss in self._recent]
        )

    def taken_rates(self, planned: np.ndarray) -> np.ndarray:
        """`planned` [all steps], but where the run had other rates, its own: a resume may have changed the schedule.
        These are known by the means of the bins."""
        rates = planned.copy()
        for place, total in enumerate(self._rates):
            bin_ = slice(place * self._width, (place + 1) * self._width)
            if self._seen[place] == self._width and bin_.stop <= len(rates):
                rate = total / self._width
                if abs(rate - planned[bin_].mean()) > SAME_RATE * planned.max():
                    rates[bin_] = rate
        return rates

    def state_dict(self) -> dict[str, Any]:
        return {
            "last_step": self.last_step,
            "width": self._width,
            "sums": list(self._sums),
            "counts": list(self._counts),
            "seen": list(self._seen),
            "rates": list(self._rates),
            "recent": [list(pair) for pair in self._recent],
            "validations": [list(pair) for pair in self._validations],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last_step, self._width = state["last_step"], state["width"]
        self._sums, self._counts = list(state["sums"]), list(state["counts"])
        self._seen, self._rates = list(state["seen"]), list(state["rates"])
        self._recent = [list(pair) for pair in state["recent"]]
        self._validations = [list(pair) for pair in state["validations"]]
