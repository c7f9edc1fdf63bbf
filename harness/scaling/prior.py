"""What earlier runs say of the annealing law, for a run that has just begun."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.config import HarnessError

from .curves import DECAY, Curve
from .estimate import Estimate, estimate
from .residuals import Residuals

FORMAT = 1
LEAST_POINTS = 12
BETWEEN_RUNS = {"size": 0.05, "C": 0.10, "alpha": 0.02}
"""Standard deviations of ln(A S1^-alpha) at the pivot, of ln C and of alpha from one run of a configuration to the
next, and of the law's own failure under another schedule. Chosen, not fitted: two or three curves cannot say."""
ALONE = 2.0
"""By which they are larger for a prior of one curve: in it the power term and annealing make up for each other."""
SCALE = {"size": 0.3, "C": 0.3, "alpha": 0.05}
"""The same, for a model or a batch e times as large. Chosen to be wide: a prior of one size is a hint for another."""


class UnknownAnnealingError(HarnessError):
    """No curve's learning rate falls far enough to tell C."""


@dataclass(frozen=True)
class Prior:
    """A, C and alpha of the annealing law, as far as earlier runs tell them; never L0, which each run has of its own.

    Coordinates are the fitter's: ln A, ln C, alpha. Rates are those of runs with this peak and this batch: see
    `for_run` for another.
    """

    mean: np.ndarray
    """float64 [3]."""
    covariance: np.ndarray
    """float64 [3, 3], of what the earlier runs leave open; BETWEEN_RUNS is not in it."""
    residuals: Residuals
    pivot: float
    """S1 at which the power term's size is what runs agree on (the geometric mean of the earlier points): ln A and
    alpha alone are not, they make up for each other."""
    peak: float
    tokens_per_step: float | None
    parameters: float | None
    origin: tuple[dict[str, Any], ...]
    """The curves: name, kind of loss, points, last step."""

    @classmethod
    def from_curves(cls, curves: Sequence[Curve]) -> Prior:
        """Fit the law to all curves at once, each with an L0 of its own.

        Raises HarnessError, one line: no curve, one with under LEAST_POINTS points after its warm-up, curves of
        different peaks, batches or sizes (A and C would be none of theirs), and no curve that anneals.
        """
        if not curves:
            raise HarnessError("a prior needs at least one earlier run")
        settled = [curve.settled() for curve in curves]
        for curve in settled:
            if len(curve.steps) < LEAST_POINTS:
                raise HarnessError(
                    f"{curve.name}: {len(curve.steps)} losses after the warm-up and the first steps; a prior needs at "
                    f"least {LEAST_POINTS} of each run"
                )
        for what in ("peak", "tokens_per_step", "parameters"):
            values = {getattr(curve, what) for curve in curves}
            if len(values) > 1 and (None in values or max(values) > 1.01 * min(values)):  # 1 %: the log's digits
                raise HarnessError(
                    f"the runs differ in {what} ({', '.join(str(value) for value in sorted(values, key=str))}); make a "
                    f"prior of runs of one, and forecast the others with it"
                )
        found = estimate(settled)
        if not found.anneals:
            raise UnknownAnnealingError(
                f"no run anneals far enough to tell what annealing gains: ln C is {found.mean[1]:.2f} ± "
                f"{found.covariance[1, 1] ** 0.5:.2g}; add a run whose learning rate falls"
            )
        first = curves[0]
        origin = tuple(_origin(curve) for curve in settled)
        return cls.of(found, first, origin)

    @classmethod
    def of(cls, found: Estimate, like: Curve, origin: tuple[dict[str, Any], ...]) -> Prior:
        return cls(
            found.mean,
            found.covariance,
            found.residuals,
            found.pivot,
            like.peak,
            like.tokens_per_step,
            like.parameters,
            origin,
        )

    def for_run(self, curve: Curve) -> tuple[np.ndarray, np.ndarray, float]:
        """Mean [3], covariance [3, 3], and what to multiply the run's learning rates by.

        Between runs of one configuration BETWEEN_RUNS is added, ALONE times that where the prior is of one curve.
        Assumed of another peak rate: the loss is a function of the rates relative to the peak, as near the best peak it
        almost is; rates are scaled to the prior's peak. The law as it is written is of absolute rates, which comes to
        ln A and ln C that are off by alpha ln(ratio) and ln(ratio): these are added as standard deviations, so that
        both readings are inside the band. Assumed of another batch: loss is a function of tokens; the same widening, of
        the power term. Of another size of model nothing is known, and SCALE widens all; so it does for the batch. What
        the prior or the run does not tell of (None) is taken to be the same.
        """
        peak = abs(np.log(curve.peak / self.peak))
        batch = _ratio(curve.tokens_per_step, self.tokens_per_step)
        size = abs(_ratio(curve.parameters, self.parameters))
        alpha, change = self.mean[2], size + abs(batch)
        own = {name: value * (ALONE if len(self.origin) == 1 else 1.0) for name, value in BETWEEN_RUNS.items()}
        deviations = np.array(
            [
                np.linalg.norm([own["size"], alpha * peak, alpha * batch, SCALE["size"] * change]),
                np.linalg.norm([own["C"], peak, SCALE["C"] * change]),
                np.linalg.norm([own["alpha"], SCALE["alpha"] * change]),
            ]
        )
        turn = np.eye(3)
        turn[0, 2] = np.log(self.pivot)  # ln A = ln size + alpha ln pivot
        covariance = self.covariance + turn @ np.diag(deviations**2) @ turn.T
        # S1 in steps of the prior's batch: ln(A) takes the factor. S2 has a length of its own, 1 / (1 - DECAY) steps.
        mean = self.mean - np.array([alpha * batch, 0.0, 0.0])
        return mean, covariance, self.peak / curve.peak

    def as_json(self) -> dict[str, Any]:
        """Everything; float64 survives a JSON text."""
        return {
            "format": FORMAT,
            "law": "annealing",
            "decay": DECAY,
            "coordinates": ["ln A", "ln C", "alpha"],
            "mean": self.mean.tolist(),
            "covariance": self.covariance.tolist(),
            "residuals": vars(self.residuals),
            "pivot": self.pivot,
            "peak": self.peak,
            "tokens_per_step": self.tokens_per_step,
            "parameters": self.parameters,
            "origin": list(self.origin),
        }

    def save(self, path: Path | str) -> None:
        Path(path).write_text(json.dumps(self.as_json(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str) -> Prior:
        """Raises HarnessError, one line, where the file is missing or is none that `save` wrote."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            if values["format"] != FORMAT or values["law"] != "annealing" or values["decay"] != DECAY:
                raise ValueError(f"of format {values['format']}, law {values['law']}, decay {values['decay']}")
            prior = cls(
                mean=np.array(values["mean"], dtype=np.float64),
                covariance=np.array(values["covariance"], dtype=np.float64),
                residuals=Residuals(**values["residuals"]),
                pivot=values["pivot"],
                peak=values["peak"],
                tokens_per_step=values["tokens_per_step"],
                parameters=values["parameters"],
                origin=tuple(values["origin"]),
            )
            if prior.mean.shape != (3,) or prior.covariance.shape != (3, 3):
                raise ValueError("the mean should have 3 numbers, the covariance 3 x 3")
            return prior
        except OSError as error:
            raise HarnessError(f"{path}: no prior to read: {error.strerror}; `harness study prior` makes one") from None
        except (ValueError, TypeError, KeyError) as error:
            raise HarnessError(f"{path}: is no prior that `harness study prior` wrote ({error!r})") from None


def _origin(curve: Curve) -> dict[str, Any]:
    last = int(curve.steps[-1])
    return {"name": curve.name, "kind": curve.kind, "points": len(curve.steps), "last_step": last}


def _ratio(one: float | None, other: float | None) -> float:
    """ln(one / other); 0 where one of them is unknown."""
    return 0.0 if one is None or other is None else float(np.log(one / other))
