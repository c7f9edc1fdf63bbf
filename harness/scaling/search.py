"""Minimising: from many starts, and of many resamples at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .objective import Objective

SEARCHED = 24
"""Starts that are followed to their end: the best of all that are looked at."""
GRADIENT = 1e-3
"""Of a fit that has converged: the largest |dF/dθ_p| (1 + |θ_p|) / F. At the reference fits it is 1e-5; where a search
with default tolerances stops early it is 1."""
SAME = 1e-3
"""Searches that end within this share of the lowest objective count as the same minimum."""


@dataclass(frozen=True)
class Minimum:
    """Where the best search ended."""

    theta: np.ndarray
    objective: float
    gradient: float
    """The largest |dF/dθ_p| (1 + |θ_p|) / F: see GRADIENT."""
    starts: int
    """Looked at."""
    searched: int
    agreeing: int
    """Searches that ended at this minimum."""
    converged: bool


def minimise(objective: Objective, starts: np.ndarray | None = None) -> Minimum:
    """By L-BFGS with analytic gradients from the best of the law's starts, polished by Gauss-Newton steps.

    Not converged is what ends where the gradient is not small, however little the last step changed.
    """
    from scipy.optimize import minimize

    grid = objective.law.grid() if starts is None else starts
    values = np.concatenate([objective(part) for part in np.array_split(grid, max(len(grid) // 256, 1))])
    chosen = grid[np.argsort(values, kind="stable")[:SEARCHED]]
    scale = max(float(values.min()), 1e-12)

    def scaled(theta: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = objective.value_and_gradient(theta)
        return float(value) / scale, gradient / scale

    ends = []
    for start in chosen:
        found = minimize(scaled, start, jac=True, method="L-BFGS-B", options=_OPTIONS)
        ends.append(polish(objective, found.x[None])[0])
    found_values = np.array([float(objective(end)) for end in ends])
    best = int(found_values.argmin())
    value = float(found_values[best])
    gradient = relative_gradient(objective, ends[best])
    agreeing = int((found_values <= value * (1 + SAME) + 1e-300).sum())
    return Minimum(ends[best], value, gradient, len(grid), len(ends), agreeing, gradient <= GRADIENT)


def relative_gradient(objective: Objective, theta: np.ndarray) -> float:
    """The largest |dF/dθ_p| (1 + |θ_p|) / F at one θ; 0 where F is."""
    value, gradient = objective.value_and_gradient(theta)
    if value <= 1e-18:
        return 0.0
    return float((np.abs(gradient) * (1 + np.abs(theta)) / value).max())


def polish(objective: Objective, theta: np.ndarray, weights: np.ndarray | None = None, steps: int = 200) -> np.ndarray:
    """Levenberg-Marquardt on Huber's loss by reweighting, for all rows of θ [rows, parameters] at once; weights [rows,
    points] say how often each point counts in a row (1 without). Rows end where they no longer get better."""
    theta = theta.copy()
    count = theta.shape[-1]
    damping = np.full(len(theta), 1e-3)
    value = objective(theta, weights)
    open_ = np.ones(len(theta), dtype=bool)
    for _ in range(steps):
        rows = np.flatnonzero(open_)
        if not len(rows):
            break
        own = None if weights is None else weights[rows]
        residual, jacobian = objective.residuals(theta[rows])
        slope = np.clip(residual, -objective.delta, objective.delta)
        size = np.maximum(np.abs(residual), 1e-300)
        curvature = np.minimum(objective.delta / size, 1.0)
        if own is not None:
            slope, curvature = slope * own, curvature * own
        gradient = np.einsum("rn,rnp->rp", slope, jacobian)
        hessian = np.einsum("rn,rnp,rnq->rpq", curvature, jacobian, jacobian)
        diagonal = np.einsum("rpp->rp", hessian)
        lifted = hessian + (damping[rows, None] * diagonal + 1e-300)[..., None] * np.eye(count)
        step = _solve(lifted, gradient)
        tried = theta[rows] - step
        new = objective(tried, own)
        better = new < value[rows]
        gained = (value[rows] - new) > 1e-13 * value[rows]
        theta[rows[better]] = tried[better]
        value[rows[better]] = new[better]
        damping[rows] = np.where(better, np.maximum(damping[rows] / 5, 1e-12), damping[rows] * 4)
        open_[rows] = np.where(better, gained, damping[rows] < 1e8)
    return theta


def _solve(matrices: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Row by row; by least squares where a matrix is singular."""
    try:
        return np.linalg.solve(matrices, vectors[..., None])[..., 0]
    except np.linalg.LinAlgError:
        return np.stack([np.linalg.lstsq(m, v, rcond=None)[0] for m, v in zip(matrices, vectors, strict=True)])


_OPTIONS = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-15, "gtol": 1e-10, "maxcor": 20}
