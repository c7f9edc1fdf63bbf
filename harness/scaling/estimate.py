"""The annealing law fitted to several curves at once, with residuals that drift."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .curves import Curve
from .law import Columns
from .laws import LAWS
from .residuals import Residuals, noise_of

POINTS = 128
"""Of a curve, at most: longer ones are averaged in bins."""
UNKNOWN = 1.0
"""C is unknown where the standard deviation of ln C is larger: a third of what it is where nothing is known."""
_VAGUE = np.array([3.0, 3.0, 1.0])
"""Standard deviations of ln A, ln C and alpha about the first fit: as good as nothing, but a matrix stays regular."""
_VAGUE_L0 = 1.0
_LAW = LAWS["annealing"]


@dataclass(frozen=True)
class Estimate:
    """Of ln A, ln C and alpha."""

    mean: np.ndarray
    covariance: np.ndarray
    residuals: Residuals
    pivot: float
    """Geometric mean of S1 over the points."""

    @property
    def anneals(self) -> bool:
        """Whether the curves tell C."""
        return bool(self.covariance[1, 1] ** 0.5 < UNKNOWN)


def estimate(curves: Sequence[Curve]) -> Estimate:
    """A, C and alpha that the curves share, and an L0 of each, by maximum likelihood; the residuals' noise, drift and
    length by restricted likelihood (what the parameters took from the residuals is given back).

    It begins at the least squares of the best exponent of a grid: the law is linear in all else.
    """
    curves = [curve.binned(POINTS).without_spikes() for curve in curves]
    columns = [{"s1": curve.areas[0][curve.steps - 1], "s2": curve.areas[1][curve.steps - 1]} for curve in curves]
    logs = [np.log(curve.losses) for curve in curves]
    own, shared = _linear_start(columns, logs)
    before = np.concatenate([own, shared])
    noise = float(np.median([noise_of(log) for log in logs]))
    first = np.log([max(noise, 1e-6), 2e-3, 0.3])

    def solve(residuals: Residuals) -> tuple[float, np.ndarray, np.ndarray]:
        """Twice the restricted log likelihood's negative, the parameters and their covariance."""
        factors = [np.linalg.cholesky(residuals.covariance(curve.steps)) for curve in curves]
        weights = 1 / np.concatenate([np.full(len(curves), _VAGUE_L0), _VAGUE])

        def system(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            """Whitened residuals and their derivatives, the vague prior's below."""
            rows, slopes = [], []
            for place, (column, log, factor) in enumerate(zip(columns, logs, factors, strict=True)):
                theta = np.concatenate([values[place : place + 1], values[len(curves) :]])
                loss, gradient = _LAW.value_and_gradient(theta, column)
                loss = np.maximum(loss, 1e-9)
                jacobian = np.zeros((len(log), len(values)))
                jacobian[:, place] = gradient[:, 0] / loss
                jacobian[:, len(curves) :] = gradient[:, 1:] / loss[:, None]
                both = np.linalg.solve(factor, np.column_stack([np.log(loss) - log, jacobian]))
                rows.append(both[:, 0])
                slopes.append(both[:, 1:])
            return np.concatenate([*rows, (values - before) * weights]), np.vstack([*slopes, np.diag(weights)])

        values = least_squares(system, before)
        residual, jacobian = system(values)
        precision = jacobian.T @ jacobian
        spread = 2 * sum(float(np.log(np.diag(factor)).sum()) for factor in factors)
        cost = spread + float(residual @ residual) + float(np.linalg.slogdet(precision)[1])
        return cost, values, np.linalg.inv(precision)

    def cost(log_scales: np.ndarray) -> float:
        """With weak priors on the scales, so that few points cannot make one of them nothing or endless."""
        pull = ((log_scales - first) / np.array([1.5, 1.5, 1.0])) ** 2
        return solve(Residuals(*np.exp(log_scales)))[0] + float(pull.sum())

    from scipy.optimize import minimize

    simplex = np.vstack([first, first + 0.7 * np.eye(3)])
    found = minimize(
        cost, first, method="Nelder-Mead", options={"initial_simplex": simplex, "xatol": 0.02, "fatol": 0.02}
    )
    residuals = Residuals(*(float(scale) for scale in np.exp(found.x)))
    _, values, covariance = solve(residuals)
    count = len(curves)
    pivot = float(np.exp(np.mean(np.log(np.concatenate([column["s1"] for column in columns])))))
    return Estimate(values[count:], covariance[count:, count:], residuals, pivot)


def least_squares(
    system: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], values: np.ndarray, steps: int = 50
) -> np.ndarray:
    """Levenberg-Marquardt on the sum of squares of what `system` gives: residuals [rows] and derivatives
    [rows, values]."""
    residual, jacobian = system(values)
    best, damping = float(residual @ residual), 1e-6
    for _ in range(steps):
        curvature, slope = jacobian.T @ jacobian, jacobian.T @ residual
        step = np.linalg.solve(curvature + damping * np.diag(np.diag(curvature)), slope)
        tried = values - step
        new_residual, new_jacobian = system(tried)
        new = float(new_residual @ new_residual)
        if new <= best:
            done = best - new <= 1e-10 * best
            values, residual, jacobian, best, damping = tried, new_residual, new_jacobian, new, max(damping / 10, 1e-9)
            if done:
                break
        else:
            damping *= 10
            if damping > 1e8:
                break
    return values


def _linear_start(columns: Sequence[Columns], logs: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """ln L0 of each curve, and ln A, ln C and alpha."""
    loss = np.exp(np.concatenate(logs))
    which = np.repeat(np.arange(len(logs)), [len(log) for log in logs])
    s1, s2 = (np.concatenate([column[name] for column in columns]) for name in ("s1", "s2"))
    found = []
    for alpha in np.arange(0.1, 1.25, 0.05):
        design = np.column_stack([which[:, None] == np.arange(len(logs)), s1**-alpha, -s2]) / loss[:, None]
        values = np.linalg.lstsq(design, np.ones(len(loss)), rcond=None)[0]
        error = float(((design @ values - 1) ** 2).sum())
        found.append((not (values[:-1] > 0).all(), error, alpha, values))  # a floor or a power term below 0: last
    _, _, alpha, values = min(found, key=lambda one: one[:3])
    positive = np.log(np.maximum(values, 0.05))
    return positive[:-2], np.append(positive[-2:], alpha)
