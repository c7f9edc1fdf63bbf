"""How well a law foretells: fitted without the largest size, it predicts that one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .fit import Fit, check_columns, fit
from .law import Columns, Law

SIZES: dict[str, Callable[[Columns], np.ndarray]] = {
    "power": lambda x: np.asarray(x["x"]),
    "chinchilla": lambda x: np.asarray(x["parameters"]),
    "overtraining": lambda x: np.asarray(x["parameters"]),
    "encoder-decoder": lambda x: np.asarray(x["encoder"]) * np.asarray(x["decoder"]),
}
"""What is large, by law. Along a run (annealing) there is no size: see harness.scaling.forecast."""
SAME = 0.02
"""Sizes within this share of the largest are held out with it."""


@dataclass(frozen=True)
class HeldOut:
    """Predictions of rows that the fit did not see, float64 [rows held out]."""

    fitted: Fit
    rows: np.ndarray
    """Their places in the data."""
    size: float
    loss: np.ndarray
    predicted: np.ndarray
    low: np.ndarray
    high: np.ndarray
    """95 %, for one new run."""

    @property
    def inside(self) -> int:
        """Rows whose loss is in its interval."""
        return int(((self.low <= self.loss) & (self.loss <= self.high)).sum())

    def as_json(self) -> dict[str, Any]:
        return {
            "size": self.size,
            "points": len(self.rows),
            "fitted_on": len(self.fitted.loss),
            "loss": self.loss.tolist(),
            "predicted": self.predicted.tolist(),
            "low": self.low.tolist(),
            "high": self.high.tolist(),
            "mean_error": float((self.predicted - self.loss).mean()),
            "root_mean_square_error": float(np.sqrt(((self.predicted - self.loss) ** 2).mean())),
            "inside": self.inside,
            "warnings": list(self.fitted.warnings),
        }


def hold_out(law: Law, columns: Columns, *, groups: Sequence[Any] | None = None, **options: Any) -> HeldOut:
    """Fit without the largest size and predict its rows; options as `fit`'s. HarnessError where too few points are
    left."""
    x, loss = check_columns(law, columns)
    sizes = SIZES[law.name](x)
    out = sizes >= sizes.max() * (1 - SAME)
    rest = np.flatnonzero(~out)
    known = None if groups is None else [groups[int(row)] for row in rest]
    fitted = fit(law, {name: values[rest] for name, values in {**x, "loss": loss}.items()}, groups=known, **options)
    rows = np.flatnonzero(out)
    asked = {name: values[rows] for name, values in x.items()}
    low, high = fitted.interval(asked)
    return HeldOut(fitted, rows, float(sizes.max()), loss[rows], fitted.predict(asked), low, high)
