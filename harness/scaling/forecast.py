"""A run's losses to come, from its losses so far and a prior: the annealing law with a drifting residual."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harness.config import HarnessError

from .curves import Curve, areas
from .estimate import least_squares
from .law import Columns
from .laws import LAWS
from .prior import Prior
from .residuals import Path, Residuals, noise_of

LEVEL_DEVIATIONS = 1.959964
"""Half a 95 % interval, in standard deviations."""
LEAST_POINTS = 8
POINTS = 128
_L0_DEVIATION = 1.0
"""Of ln L0 about the mean of the points so far: nothing is known of it."""
_MISFIT_WEIGHT = 10.0
"""Points that the prior's own scatter weighs as much as, where the run scatters more."""
_NOISE_WEIGHT = 4.0
_LAW = LAWS["annealing"]


@dataclass(frozen=True)
class Forecast:
    """Losses at some steps; the band is of points like those that it was made from (bins of as many steps, or
    validations), noise and all. float64 [steps] each."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    deviation: np.ndarray
    """Standard deviation of the log loss without the noise of a point."""

    @property
    def final(self) -> tuple[float, float, float]:
        """Of the last step: the loss, and its 95 % interval."""
        return float(self.mean[-1]), float(self.low[-1]), float(self.high[-1])


@dataclass(frozen=True)
class Conditioned:
    """A prior and a run's losses so far. Made by `condition`."""

    theta: np.ndarray
    """float64 [4]: ln L0, ln A, ln C, alpha, for rates times `scale`."""
    noise: float
    """Of a point's log loss, of this run."""
    inflation: float
    """By which all standard deviations are larger than the prior would have it, as the points so far scatter more about
    the law than earlier runs'; 1 at the least."""
    told: dict[str, float]
    """Of A, C and alpha: which share of the prior's variance the run's own points have taken away."""
    curve: Curve
    """The points that count."""
    _covariance: np.ndarray
    _residuals: Residuals
    _scale: float
    _residual: np.ndarray
    _jacobian: np.ndarray
    _inverse: np.ndarray

    def forecast(self, steps: np.ndarray, rates: np.ndarray | None = None) -> Forecast:
        """At `steps` [steps], of this run (rates None) or of one with other rates [all its steps]."""
        steps = np.asarray(steps, dtype=np.int64)
        found = self._towards([(self.curve.rates if rates is None else rates, steps)])
        variance = self._residuals.drift**2 - (found.gain * found.across).sum(1)
        variance += ((found.left @ self._covariance) * found.left).sum(1)
        deviation = self.inflation * np.sqrt(np.maximum(variance, 0.0))
        reach = LEVEL_DEVIATIONS * np.sqrt(deviation**2 + self.noise**2)
        mean = found.mean
        return Forecast(steps, np.exp(mean), np.exp(mean - reach), np.exp(mean + reach), deviation)

    def joint(self, targets: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        """Log losses without noise at the steps of several schedules (rates, steps), one after the other: mean [all]
        and covariance [all, all]; so that schedules can be compared by less than each is known to.

        Of another schedule the drift is the run's own as long as the rates are the same; it goes its own way from the
        step on at which they part.
        """
        found = self._towards(targets)
        among = self._residuals.drifts(found.paths, found.paths, found.partings)
        covariance = among - found.gain @ found.across.T + found.left @ self._covariance @ found.left.T
        return found.mean, self.inflation**2 * covariance

    def _towards(self, targets: Sequence[tuple[np.ndarray, np.ndarray]]) -> _Towards:
        runs = [self.curve.rates, *(rates for rates, _ in targets)]
        partings = np.array([[parting(one, other) for other in runs] for one in runs])
        own = [Path(0, self.curve.steps.astype(np.float64))]
        paths = [Path(number, steps.astype(np.float64)) for number, (_, steps) in enumerate(targets, 1)]
        across = self._residuals.drifts(paths, own, partings)
        parts = [evaluate(self.theta, columns_at(rates * self._scale, steps)) for rates, steps in targets]
        gain = across @ self._inverse
        left = np.vstack([slopes for _, slopes in parts]) - gain @ self._jacobian
        mean = np.concatenate([law for law, _ in parts]) + gain @ self._residual
        return _Towards(paths, partings, mean, across, gain, left)


@dataclass(frozen=True)
class _Towards:
    """From a run's points to others: kriging, with the parameters' part."""

    paths: list[Path]
    partings: np.ndarray
    mean: np.ndarray
    across: np.ndarray
    gain: np.ndarray
    left: np.ndarray
    """What the drift that is known leaves of the law's derivatives."""


def condition(prior: Prior, curve: Curve, *, vague: bool = False) -> Conditioned:
    """Update the prior by the losses of `curve`, whose rates reach to the end of what is planned: Laplace's
    approximation about the posterior's mode, found by Gauss-Newton; L0 is free.

    vague: take nothing from the prior but the residuals' scatter (for a run that the prior was made of). Raises
    HarnessError, one line, where there are under LEAST_POINTS losses after the warm-up.
    """
    settled = curve.settled()
    if len(settled.steps) < LEAST_POINTS:
        raise HarnessError(
            f"{curve.name}: {len(settled.steps)} losses after the warm-up and the first steps; a forecast needs at "
            f"least {LEAST_POINTS}"
        )
    settled = settled.binned(POINTS).without_spikes()
    log = np.log(settled.losses)
    mean, spread, scale = prior.for_run(curve)
    if vague:
        spread = spread + np.diag([9.0, 9.0, 1.0])
    weight, own = _NOISE_WEIGHT, len(log) - 2
    squares = own * noise_of(log) ** 2 + weight * prior.residuals.noise**2
    noise = float(np.sqrt(squares / (own + weight)))
    residuals = Residuals(noise, prior.residuals.drift, prior.residuals.length)
    factor = np.linalg.cholesky(residuals.covariance(settled.steps))
    prior_factor = np.linalg.cholesky(spread)
    centre = np.concatenate([log[-1:], mean])
    columns = columns_at(settled.rates * scale, settled.steps)

    def system(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        law, slopes = evaluate(theta, columns)
        whitened = np.linalg.solve(factor, np.column_stack([law - log, slopes]))
        away = np.linalg.solve(prior_factor, np.column_stack([theta[1:] - mean, np.eye(3)]))
        rows = np.concatenate([whitened[:, 0], [(theta[0] - centre[0]) / _L0_DEVIATION], away[:, 0]])
        below = np.zeros((4, 4))
        below[0, 0], below[1:, 1:] = 1 / _L0_DEVIATION, away[:, 1:]
        return rows, np.vstack([whitened[:, 1:], below])

    theta = least_squares(system, centre - np.array([0.1, 0.0, 0.0, 0.0]))
    rows, jacobian = system(theta)
    covariance = np.linalg.inv(jacobian.T @ jacobian)
    misfit = float((rows[: len(log)] ** 2).sum())
    inflation = float(np.sqrt(max(1.0, (_MISFIT_WEIGHT + misfit) / (_MISFIT_WEIGHT + len(log)))))
    law, slopes = evaluate(theta, columns)
    inverse = np.linalg.inv(residuals.covariance(settled.steps))
    told = 1 - np.diag(covariance)[1:] / np.diag(spread)
    return Conditioned(
        theta,
        noise,
        inflation,
        dict(zip(("A", "C", "alpha"), map(float, told), strict=True)),
        settled,
        covariance,
        residuals,
        scale,
        log - law,
        slopes,
        inverse,
    )


def forecast(
    prior: Prior, rates: np.ndarray, steps: np.ndarray, losses: np.ndarray, at: np.ndarray | None = None
) -> Forecast:
    """The rest of a run: rates float64 [all steps], of step 1 first; steps and losses [points] so far; `at`: the steps
    to predict (all that follow the last point)."""
    curve = Curve("the run", np.asarray(rates, float), np.asarray(steps, np.int64), np.asarray(losses, float))
    after = np.arange(int(curve.steps[-1]) + 1, len(curve.rates) + 1) if at is None else at
    return condition(prior, curve).forecast(after)


def columns_at(rates: np.ndarray, steps: np.ndarray) -> Columns:
    """S1 and S2 after `steps` [steps] of a run of these rates."""
    s1, s2 = areas(rates)
    return {"s1": s1[steps - 1], "s2": s2[steps - 1]}


def evaluate(theta: np.ndarray, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """Log of the law [points], and its derivatives [points, 4]."""
    loss, gradient = _LAW.value_and_gradient(theta, columns)
    loss = np.maximum(loss, 1e-9)
    return np.log(loss), gradient / loss[:, None]


def parting(one: np.ndarray, other: np.ndarray) -> float:
    """The last step up to which two schedules are the same; inf where one is the other's beginning."""
    shared = min(len(one), len(other))
    differ = np.flatnonzero(np.abs(one[:shared] - other[:shared]) > 1e-9 * max(one.max(), other.max()))
    return np.inf if not len(differ) else float(differ[0])
