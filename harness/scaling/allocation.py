"""How compute is best shared between parameters and tokens, by a law L = E + A / N^alpha + B / D^beta and C = 6 N D."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from itertools import product
from typing import Any

import numpy as np

from harness.config import HarnessError

from .fit import Fit

NAMES = ("A", "B", "E", "alpha", "beta")
ENDS = (2.5, 97.5)
HARMLESS = 1.2
"""Rounding that moves the best D/N by less than this factor needs no warning."""


@dataclass(frozen=True)
class Allocation:
    """The best sizes for a budget."""

    flops: float
    parameters: float
    tokens: float
    loss: float
    intervals: dict[str, tuple[float, float]]
    """95 %, of parameters, tokens, ratio and loss; empty where only a point is known."""

    @property
    def ratio(self) -> float:
        """D/N, tokens a parameter."""
        return self.tokens / self.parameters

    def as_json(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in ("flops", "parameters", "tokens", "ratio", "loss")}
        return {**values, "intervals": {name: list(ends) for name, ends in self.intervals.items()}}


def best_sizes(values: np.ndarray, flops: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """N, D and the loss at the lowest point of the law under 6 N D = flops, [...], for A, B, E, alpha, beta in
    `values` [..., 5] (Hoffmann et al. 2022, equation 4)."""
    a, b, floor, alpha, beta = np.moveaxis(np.asarray(values, dtype=np.float64), -1, 0)
    with np.errstate(all="ignore"):  # resamples may be absurd
        parameters = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (flops / 6) ** (beta / (alpha + beta))
        tokens = flops / 6 / parameters
        return parameters, tokens, floor + a / parameters**alpha + b / tokens**beta


def optimal(fitted: Fit, flops: float) -> Allocation:
    """Of a fit of the law chinchilla, with intervals from its resamples."""
    if fitted.law.name != "chinchilla":
        raise HarnessError(
            f"the law {fitted.law.name} shares no compute between parameters and tokens: chinchilla does"
        )
    parameters, tokens, loss = best_sizes(fitted.law.natural(fitted.minimum.theta), flops)
    drawn = best_sizes(fitted.law.natural(fitted.resamples), flops)
    named = {"parameters": drawn[0], "tokens": drawn[1], "ratio": drawn[1] / drawn[0], "loss": drawn[2]}
    intervals = {}
    for name, each in named.items():
        finite = each[np.isfinite(each)]
        low, high = np.percentile(finite, ENDS) if len(finite) else (np.nan, np.nan)
        intervals[name] = (float(low), float(high))
    return Allocation(flops, float(parameters), float(tokens), float(loss), intervals)


@dataclass(frozen=True)
class Given:
    """Parameters as somebody printed them: A=406.4, B=410.7, ..."""

    texts: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> Given:
        """`A=406.4,B=410.7,E=1.69,alpha=0.34,beta=0.28`. HarnessError."""
        found = {}
        for part in text.split(","):
            name, _, value = (piece.strip() for piece in part.partition("="))
            if name not in NAMES or name in found:
                raise HarnessError(
                    f"--given: {part.strip()!r}: should be one of {', '.join(NAMES)}, each once, = a number"
                )
            try:
                positive = Decimal(value) > 0
            except ArithmeticError:
                positive = False
            if not positive:
                raise HarnessError(f"--given: {name}={value}: should be a positive number")
            found[name] = value
        missing = [name for name in NAMES if name not in found]
        if missing:
            raise HarnessError(f"--given: {missing[0]} is missing; needs {', '.join(NAMES)}")
        return cls(found)

    def allocation(self, flops: float) -> Allocation:
        """Taken as exact."""
        parameters, tokens, loss = best_sizes(np.array([float(self.texts[name]) for name in NAMES]), flops)
        return Allocation(flops, float(parameters), float(tokens), float(loss), {})

    def rounding(self, flops: float) -> tuple[float, float]:
        """The least and the greatest D/N of all parameters that round to these."""
        ranges = []
        for name in NAMES:
            value = Decimal(self.texts[name])
            exponent = value.as_tuple().exponent
            assert isinstance(exponent, int)
            half = Decimal(5).scaleb(exponent - 1)
            ranges.append((float(value - half), float(value), float(value + half)))
        corners = np.array([corner for corner in product(*ranges) if min(corner) > 0])
        parameters, tokens, _ = best_sizes(corners, flops)
        ratios = tokens / parameters
        return float(ratios.min()), float(ratios.max())

    def warning(self, flops: float) -> str | None:
        """What rounding alone allows, where it is too much to speak of one D/N."""
        low, high = self.rounding(flops)
        if high / low < HARMLESS:
            return None
        return (
            f"the parameters are rounded: at {flops:.3g} FLOPs they allow any D/N from {low:.3g} to {high:.3g}; "
            f"exponents need four digits or more"
        )
