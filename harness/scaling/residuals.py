"""What the law leaves: drift along a run, and noise from point to point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST_NOISE = 1e-5
"""Of a log loss: what a log with five digits has."""


@dataclass(frozen=True)
class Residuals:
    """Of log losses: r(step) = d(step) + e. d is a stationary Gaussian process along a run with covariance
    drift^2 exp(-|ln step - ln step'| / length): how a law that is not quite right departs from a run. It is told from
    the noise e, which is independent, because only d does not average out."""

    noise: float
    drift: float
    length: float
    """In e-foldings of the step."""

    def covariance(self, steps: np.ndarray) -> np.ndarray:
        """Of a run's own points: float64 [points, points]."""
        own = [Path(0, np.asarray(steps, dtype=np.float64))]
        noise = max(self.noise, LEAST_NOISE) ** 2 + 1e-8 * self.drift**2  # of a matrix that can be inverted
        return self.drifts(own, own, np.full((1, 1), np.inf)) + noise * np.eye(len(steps))

    def drifts(self, rows: Sequence[Path], columns: Sequence[Path], partings: np.ndarray) -> np.ndarray:
        """Covariance of d at the points of some paths with those of others, [points of rows, points of columns].

        partings float64 [runs, runs]: the step up to which two runs are one (inf of a run and itself, 0 where they
        never were). Beyond it they drift apart, each from where they parted: so the distance of two points goes by way
        of it.
        """
        one, run = _joined(rows)
        other, other_run = _joined(columns)
        with np.errstate(divide="ignore"):
            turn = np.log(partings)[run[:, None], other_run[None]]
        turn = np.minimum(np.minimum(one[:, None], other[None]), turn)
        covariance: np.ndarray = self.drift**2 * np.exp((2 * turn - one[:, None] - other[None]) / self.length)
        return covariance


@dataclass(frozen=True)
class Path:
    """Points of a run, which is known by its number."""

    run: int
    steps: np.ndarray
    """float64 [points]."""


def noise_of(log_losses: np.ndarray) -> float:
    """Standard deviation of the noise of points in order [points >= 3], from second differences: trends of the curve
    drop out, and a drift that is slow from point to point almost."""
    second = np.diff(log_losses, 2)
    return float(np.sqrt((second**2).mean() / 6))


def _joined(paths: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Log of the step of every point, and its run."""
    steps = np.concatenate([path.steps for path in paths])
    return np.log(steps), np.repeat([path.run for path in paths], [len(path.steps) for path in paths])
