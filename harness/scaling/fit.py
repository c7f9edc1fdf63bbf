"""A law fitted to data: parameters with intervals, what is wrong with them, and predictions with a band."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from harness.config import HarnessError

from .law import Columns, Law
from .objective import Objective
from .search import GRADIENT, Minimum, minimise, polish

LEVEL = 0.95
UNIDENTIFIED = 0.5
"""A parameter whose interval is wider than this share of its value is warned of (of what moves as a logarithm: whose
interval's ends are further apart than exp(2 UNIDENTIFIED))."""
CONDITION = 1e10
"""Of the scaled curvature, above which some combination of parameters does nothing."""


@dataclass(frozen=True)
class Fit:
    """What came out. Parameters are in natural units."""

    law: Law
    x: Columns
    loss: np.ndarray
    minimum: Minimum
    resamples: np.ndarray
    """θ of the bootstrap, float64 [resamples, parameters], in the fitter's coordinates."""
    delta: float
    warnings: tuple[str, ...]
    constants: Columns = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, float]:
        values = self.law.natural(self.minimum.theta)
        return {parameter.name: float(value) for parameter, value in zip(self.law.parameters, values, strict=True)}

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 %, percentiles of the bootstrap."""
        low, high = np.percentile(self.law.natural(self.resamples), _ENDS, axis=0)
        return {
            parameter.name: (float(low[place]), float(high[place]))
            for place, parameter in enumerate(self.law.parameters)
        }

    @property
    def residuals(self) -> np.ndarray:
        """log L - log L̂ [points]."""
        return np.log(self.loss) - np.log(self.predict(self.x))

    @property
    def r_squared(self) -> float:
        """Of the losses themselves."""
        error = self.loss - self.predict(self.x)
        return float(1 - (error**2).sum() / ((self.loss - self.loss.mean()) ** 2).sum())

    def predict(self, x: Columns) -> np.ndarray:
        """L̂ [points]."""
        return self.law.predict(self.minimum.theta, {**self.constants, **x})

    def band(self, x: Columns) -> tuple[np.ndarray, np.ndarray]:
        """A 95 % interval of L̂, the law's value; a run's loss scatters around that."""
        low, high = np.percentile(self.law.predict(self.resamples, {**self.constants, **x}), _ENDS, axis=0)
        return low, high

    def interval(self, x: Columns) -> tuple[np.ndarray, np.ndarray]:
        """A 95 % interval of the loss of new runs: the resampled laws, each with a residual of the fit."""
        values = self.law.predict(self.resamples, {**self.constants, **x})
        noise = np.random.default_rng(0).choice(self.residuals, size=values.shape)
        low, high = np.percentile(values * np.exp(noise), _ENDS, axis=0)
        return low, high

    def as_json(self) -> dict[str, Any]:
        return {
            "law": self.law.name,
            "formula": self.law.formula,
            "source": self.law.source,
            "parameters": self.parameters,
            "intervals": {name: list(ends) for name, ends in self.intervals.items()},
            "units": {parameter.name: parameter.unit for parameter in self.law.parameters},
            "constants": {name: float(value) for name, value in self.constants.items()},
            "objective": self.minimum.objective,
            "delta": self.delta,
            "points": len(self.loss),
            "r_squared": self.r_squared,
            "residuals": self.residuals.tolist(),
            "converged": self.minimum.converged,
            "gradient": self.minimum.gradient,
            "starts": {
                "looked_at": self.minimum.starts,
                "searched": self.minimum.searched,
                "at_the_minimum": self.minimum.agreeing,
            },
            "resamples": len(self.resamples),
            "warnings": list(self.warnings),
        }


_ENDS = (50 * (1 - LEVEL), 100 - 50 * (1 - LEVEL))


def fit(
    law: Law,
    columns: Columns,
    *,
    delta: float = 1e-3,
    resamples: int = 1000,
    groups: Sequence[Any] | None = None,
    seed: int = 0,
) -> Fit:
    """Minimise Σ Huber_δ(log L̂ - log L), and again on resamples of the points.

    columns: float [points] of every column of the law, `loss` among them. groups [points]: points of one group (a run)
    are resampled together. Raises HarnessError, one line, for columns that are missing, numbers that are none or not
    positive, and too few points.
    """
    x, loss = check_columns(law, columns)
    constants = _constants(law, x)
    objective = Objective(law, {**constants, **x}, loss, delta)
    minimum = minimise(objective)
    weights = _resampled(len(loss), resamples, groups, np.random.default_rng(seed))
    found = polish(objective, np.repeat(minimum.theta[None], resamples, axis=0), weights)
    warnings = _warnings(law, objective, minimum, found)
    return Fit(law, x, loss, minimum, found, delta, tuple(warnings), constants)


def check_columns(law: Law, columns: Columns) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The law's columns and the losses, as float64. Raises HarnessError."""
    missing = [name for name in law.columns if name not in columns]
    if missing:
        raise HarnessError(
            f"the law {law.name} needs the column {missing[0]} ({law.columns[missing[0]]}); there are "
            f"{', '.join(columns) or 'none'}"
        )
    found = {name: np.asarray(columns[name], dtype=np.float64) for name in law.columns}
    for name, values in found.items():
        least = -np.inf if name == "s2" else 0.0
        bad = np.flatnonzero(~np.isfinite(values) | (values <= least))
        if len(bad):
            raise HarnessError(
                f"column {name}: row {bad[0] + 1} has {values[bad[0]]:g}; should be a positive number (there are "
                f"{len(bad)} such rows)"
            )
    loss = found.pop("loss")
    if len(loss) <= len(law.parameters):
        raise HarnessError(
            f"{len(loss)} points for the {len(law.parameters)} parameters of {law.name}; needs at least "
            f"{len(law.parameters) + 1}"
        )
    for name, values in found.items():
        if name != "s2" and len(np.unique(values)) == 1:
            raise HarnessError(f"column {name}: all {len(values)} rows have {values[0]:g}; the law needs several")
    return found, loss


def profile(fitted: Fit, name: str, values: np.ndarray) -> np.ndarray:
    """The lowest objective with one parameter held, at each of `values` in natural units: float64 [values]."""
    law = fitted.law
    place = [parameter.name for parameter in law.parameters].index(name)
    held = np.log(values) if law.parameters[place].moves == "log" else np.asarray(values)
    x = {**fitted.constants, **fitted.x}
    start = np.delete(fitted.minimum.theta, place)[None]
    lowest = []
    for value in held:
        objective = Objective(_Held(law, place, float(value)), x, fitted.loss, fitted.delta)
        lowest.append(float(objective(polish(objective, start))[0]))
    return np.array(lowest)


class _Held(Law):
    """A law with one parameter held."""

    name, title, formula, source, identifiability = "held", "", "", "", ""
    columns, parameters = {}, ()

    def __init__(self, law: Law, place: int, value: float) -> None:
        self._law, self._place, self._value = law, place, value

    def value_and_gradient(self, theta: np.ndarray, x: Columns) -> tuple[np.ndarray, np.ndarray]:
        whole = np.insert(theta, self._place, self._value, axis=-1)
        value, gradient = self._law.value_and_gradient(whole, x)
        return value, np.delete(gradient, self._place, axis=-1)


def _constants(law: Law, x: Columns) -> dict[str, np.ndarray]:
    """What a law takes from the data as a whole, and must not change from resample to resample."""
    names = {"encoder": "encoder0", "decoder": "decoder0"}
    return {fixed: np.exp(np.log(x[name]).mean()) for name, fixed in names.items() if name in law.columns}


def _resampled(points: int, resamples: int, groups: Sequence[Any] | None, generator: np.random.Generator) -> np.ndarray:
    """How often each point is drawn: float64 [resamples, points]."""
    _, group_of = np.unique(np.arange(points) if groups is None else np.asarray(groups), return_inverse=True)
    count = int(group_of.max()) + 1
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=resamples)
    weights: np.ndarray = drawn[:, group_of].astype(np.float64)
    return weights


def _warnings(law: Law, objective: Objective, minimum: Minimum, resamples: np.ndarray) -> list[str]:
    found = []
    if not minimum.converged:
        found.append(
            f"not converged: the gradient at the end is {minimum.gradient:.2g}, and should be below {GRADIENT:g}; "
            f"these are not the best parameters"
        )
    if minimum.agreeing == 1 and minimum.searched > 1:
        found.append(f"only one of {minimum.searched} searches ended at this minimum: there may be a lower one")
    residual, jacobian = objective.residuals(minimum.theta)
    curvature = np.einsum("np,nq->pq", jacobian, jacobian)
    scale = np.sqrt(np.maximum(np.diag(curvature), 1e-300))
    condition = float(np.linalg.cond(curvature / np.outer(scale, scale)))
    if condition > CONDITION:
        found.append(
            f"some combination of parameters changes nothing (condition {condition:.1g}): {law.identifiability}"
        )
    low, high = np.percentile(resamples, _ENDS, axis=0) if len(resamples) else (minimum.theta, minimum.theta)
    for place, parameter in enumerate(law.parameters):
        width = high[place] - low[place]
        allowed = 2 * UNIDENTIFIED * (1.0 if parameter.moves == "log" else max(abs(minimum.theta[place]), 1e-12))
        if width > allowed:
            ends = law.natural(np.stack([low, high]))[:, place]
            found.append(
                f"{parameter.name} is hardly identified: 95 % interval {ends[0]:.3g} to {ends[1]:.3g}. "
                f"{law.identifiability}"
            )
    if np.abs(residual).max() > 50 * max(float(np.median(np.abs(residual))), 1e-12):
        row = int(np.abs(residual).argmax())
        found.append(f"row {row + 1} is off by {residual[row]:+.3f} in log loss, far more than the others: an outlier?")
    return found
