"""IsoFLOP profiles: at each compute budget a parabola of the loss in log N, whose minimum is the best size.

Hoffmann et al. 2022, arXiv 2203.15556, approach 2: N_opt(C) = k_N C^a and D_opt(C) = C / (6 N_opt(C)) = k_D C^b.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.config import HarnessError

COLUMNS = {
    "parameters": "N",
    "flops": "C, the budget: alike for the runs of one profile, 6 N D",
    "loss": "nats a token",
}
FORMULA = "L(N | C) = l + c (ln N - ln N_opt(C))^2; N_opt(C) = k C^a; D_opt(C) = C / (6 N_opt(C))"
SOURCE = "Hoffmann et al. 2022, arXiv 2203.15556, approach 2"
LEAST = 4
"""Points of a profile: a parabola has three parameters."""
SAME = 0.02
"""Budgets within this share of each other are one profile."""
ENDS = (2.5, 97.5)


@dataclass(frozen=True)
class Profile:
    """One budget."""

    flops: float
    parameters: np.ndarray
    """float64 [points], as is `loss`."""
    loss: np.ndarray
    best: float
    """N_opt, where the parabola is lowest."""
    lowest: float
    """Its loss."""
    curvature: float
    """c, nats a squared e-fold of N."""

    def __call__(self, parameters: np.ndarray) -> np.ndarray:
        return self.lowest + self.curvature * (np.log(parameters) - np.log(self.best)) ** 2


@dataclass(frozen=True)
class IsoFlop:
    """What came out: exponent a and coefficient k of N_opt = k C^a, and D_opt's b = 1 - a."""

    profiles: tuple[Profile, ...]
    a: float
    k: float
    resamples: np.ndarray
    """float64 [resamples, 2]: a and log k."""
    warnings: tuple[str, ...]

    @property
    def parameters(self) -> dict[str, float]:
        return {"a": self.a, "b": 1 - self.a, "k": self.k}

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 %: percentiles of the bootstrap, which resamples the residuals of each profile."""
        a, log_k = self.resamples.T
        found = {"a": a, "b": 1 - a, "k": np.exp(log_k)}
        return {
            name: (float(np.percentile(values, ENDS[0])), float(np.percentile(values, ENDS[1])))
            for name, values in found.items()
        }

    def best(self, flops: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """N_opt at budgets [n], with its 95 % interval."""
        flops = np.asarray(flops, dtype=np.float64)
        drawn = np.exp(self.resamples[:, 1, None] + self.resamples[:, 0, None] * np.log(flops))
        low, high = np.percentile(drawn, ENDS, axis=0)
        return self.k * flops**self.a, low, high

    def as_json(self) -> dict[str, Any]:
        return {
            "law": "isoflop",
            "formula": FORMULA,
            "source": SOURCE,
            "parameters": self.parameters,
            "intervals": {name: list(ends) for name, ends in self.intervals.items()},
            "profiles": [
                {
                    "flops": one.flops,
                    "points": len(one.loss),
                    "parameters": one.best,
                    "tokens": one.flops / (6 * one.best),
                    "loss": one.lowest,
                    "curvature": one.curvature,
                }
                for one in self.profiles
            ],
            "points": sum(len(one.loss) for one in self.profiles),
            "resamples": len(self.resamples),
            "warnings": list(self.warnings),
        }


def fit_isoflop(
    parameters: np.ndarray, flops: np.ndarray, loss: np.ndarray, *, resamples: int = 1000, seed: int = 0
) -> IsoFlop:
    """Parabolas by least squares, and a line through their minima in logs.

    All float64 [points]. HarnessError where there are fewer than two budgets, a profile has fewer than LEAST sizes, or
    a parabola has no lowest point. A minimum outside of the sizes that were trained is warned of: it is no measurement.
    """
    for name, values in (("parameters", parameters), ("flops", flops), ("loss", loss)):
        bad = np.flatnonzero(~np.isfinite(values) | (values <= 0))
        if len(bad):
            raise HarnessError(f"column {name}: row {bad[0] + 1} has {values[bad[0]]:g}; should be a positive number")
    groups = _budgets(flops)
    if len(groups) < 2:
        raise HarnessError(
            f"column flops: all {len(flops)} rows are of one budget, {flops[0]:g}; needs two at the least, four or "
            f"more to see the trend"
        )
    profiles, warnings = [], []
    for rows in groups:
        budget = float(np.exp(np.log(flops[rows]).mean()))
        if len(np.unique(parameters[rows])) < LEAST:
            raise HarnessError(
                f"column flops: the budget {budget:.3g} has {len(np.unique(parameters[rows]))} sizes; a profile needs "
                f"{LEAST} at the least"
            )
        profile = _profile(budget, parameters[rows], loss[rows])
        if profile is None:
            raise HarnessError(
                f"column loss: at the budget {budget:.3g} the losses have no lowest point between sizes; leave it out, "
                f"or train smaller or larger models there"
            )
        profiles.append(profile)
        smallest, largest = parameters[rows].min(), parameters[rows].max()
        if not smallest <= profile.best <= largest:
            warnings.append(
                f"budget {budget:.3g}: the best size, {profile.best:.3g}, is outside of those that were trained, "
                f"{smallest:.3g} to {largest:.3g}: no measurement"
            )
    if len(profiles) == 2:
        warnings.append("a line through two budgets has no residual: nothing says whether the trend is one")
    a, log_k = _line(profiles)
    drawn = _resampled(profiles, resamples, np.random.default_rng(seed))
    if len(drawn) < resamples:
        warnings.append(
            f"{resamples - len(drawn)} of {resamples} resamples had a profile without a lowest point, and are left "
            f"out: the noise is as large as the curvature"
        )
    return IsoFlop(tuple(profiles), a, float(np.exp(log_k)), drawn, tuple(warnings))


def _budgets(flops: np.ndarray) -> list[np.ndarray]:
    """Rows by budget: neighbours within SAME are one."""
    order = np.argsort(flops, kind="stable")
    cuts = np.flatnonzero(flops[order][1:] > flops[order][:-1] * (1 + SAME)) + 1
    return np.split(order, cuts)


def _profile(flops: float, parameters: np.ndarray, loss: np.ndarray) -> Profile | None:
    """None where the parabola opens downwards."""
    log_size = np.log(parameters)
    centre = log_size.mean()
    curvature, slope, constant = np.polyfit(log_size - centre, loss, 2)
    if curvature <= 0:
        return None
    place = -slope / (2 * curvature)
    lowest = float(constant - curvature * place**2)
    return Profile(flops, parameters, loss, float(np.exp(centre + place)), lowest, float(curvature))


def _line(profiles: list[Profile]) -> tuple[float, float]:
    budgets = np.log([profile.flops for profile in profiles])
    a, log_k = np.polyfit(budgets, np.log([profile.best for profile in profiles]), 1)
    return float(a), float(log_k)


def _resampled(profiles: list[Profile], resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Each parabola with residuals drawn again, enlarged for the three parameters that took their share of them."""
    drawn = []
    fitted = [profile(profile.parameters) for profile in profiles]
    residuals = [
        (profile.loss - values) * np.sqrt(len(values) / max(len(values) - 3, 1))
        for profile, values in zip(profiles, fitted, strict=True)
    ]
    pool = np.concatenate(residuals)
    pool = pool - pool.mean()
    for _ in range(resamples):
        new = [
            _profile(profile.flops, profile.parameters, values + generator.choice(pool, size=len(values)))
            for profile, values in zip(profiles, fitted, strict=True)
        ]
        whole = [profile for profile in new if profile is not None]
        if len(whole) == len(profiles):
            drawn.append(_line(whole))
    if not drawn:
        raise HarnessError("the losses scatter more than the profiles bend: nothing can be said of the best sizes")
    return np.array(drawn)
