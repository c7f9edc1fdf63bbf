"""A run as a forecast sees it: the learning rate of every step, and losses at some of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from harness.config import HarnessError

from .laws import annealing_areas

DECAY = 0.999
"""lambda of the annealing law, a step."""
AFTER_WARM_UP = 1.25
SETTLED_SHARE = 0.05
"""Losses count from so many warm-ups on, and from this share of the run on: before, no power law holds (a model first
learns which tokens are frequent), and a misfit there would say more than all that follows."""

SPIKE, SPIKE_LEAST = 8.0, 0.02
"""A point further than so many standard deviations of its like, and by so much of the loss, is a spike."""


@dataclass(frozen=True)
class Curve:
    """One run. Losses in nats a token; rates absolute, as the optimizer got them."""

    name: str
    rates: np.ndarray
    """float64 [all steps]: of step 1 first, up to the last that is planned."""
    steps: np.ndarray
    """int64 [points], rising, 1 or more: the steps that have a loss."""
    losses: np.ndarray
    """float64 [points]."""
    tokens_per_step: float | None = None
    parameters: float | None = None
    """Non-embedding ones; both None where unknown."""
    kind: str = "training"
    """Of the losses: training or validation."""

    def __post_init__(self) -> None:
        """Raises HarnessError, one line, for what is no curve."""
        if len(self.steps) != len(self.losses):
            raise HarnessError(f"{self.name}: {len(self.steps)} steps and {len(self.losses)} losses")
        if not len(self.rates) or not np.isfinite(self.rates).all() or (self.rates < 0).any() or not self.rates.any():
            raise HarnessError(f"{self.name}: learning rates must be numbers of 0 or more, and not all 0")
        if len(self.steps) and (
            self.steps[0] < 1 or self.steps[-1] > len(self.rates) or (np.diff(self.steps) < 1).any()
        ):
            raise HarnessError(f"{self.name}: steps must rise from 1 on and end by the last rate's, {len(self.rates)}")
        if not np.isfinite(self.losses).all() or (self.losses <= 0).any():
            raise HarnessError(f"{self.name}: losses must be positive numbers")

    @property
    def peak(self) -> float:
        return float(self.rates.max())

    @property
    def warm_up(self) -> int:
        """Steps before the first one at the peak."""
        return int(self.rates.argmax())

    def settled(self) -> Curve:
        """Without the losses of the beginning (AFTER_WARM_UP, SETTLED_SHARE)."""
        kept = self.steps > max(AFTER_WARM_UP * self.warm_up, SETTLED_SHARE * len(self.rates))
        return self.with_points(self.steps[kept], self.losses[kept])

    def until(self, step: int) -> Curve:
        """The losses up to `step`."""
        return self.with_points(self.steps[self.steps <= step], self.losses[self.steps <= step])

    def binned(self, most: int) -> Curve:
        """At most `most` points, each the mean of the losses of as many steps, at their mean step."""
        size = -(-len(self.steps) // most)
        if size <= 1:
            return self
        over = len(self.steps) % size  # of the oldest
        steps = self.steps[over:].reshape(-1, size).mean(1)
        return self.with_points(np.rint(steps).astype(np.int64), self.losses[over:].reshape(-1, size).mean(1))

    def without_spikes(self) -> Curve:
        """Without points that stand out from the median of their neighbours, two on either side: a spike that is over
        says nothing of where a run goes, and would be taken for noise."""
        log = np.log(self.losses)
        if len(log) < 5:
            return self
        padded = np.pad(log, 2, constant_values=np.nan)
        away = np.abs(log - np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, 5), axis=1))
        kept = away <= max(SPIKE * 1.4826 * float(np.median(away)), SPIKE_LEAST)
        return self.with_points(self.steps[kept], self.losses[kept])

    def with_points(self, steps: np.ndarray, losses: np.ndarray) -> Curve:
        return Curve(self.name, self.rates, steps, losses, self.tokens_per_step, self.parameters, self.kind)

    @cached_property
    def areas(self) -> tuple[np.ndarray, np.ndarray]:
        return areas(self.rates)


def areas(rates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """S1 and S2 after every step, float64 [steps], of rates [steps].

    S1 of the rates as they are. In S2 the warm-up counts as if it were at the peak, as in arXiv 2408.11029: a rise to
    the first peak is no annealing turned round, and with it S2 would say more of the warm-up than of what follows.
    """
    first = int(rates.argmax())
    level = rates.copy()
    level[:first] = rates[first]
    return np.cumsum(rates), annealing_areas(level, DECAY)[1]
