"""What a fit minimises: the sum over points of Huber's loss of log L̂ - log L."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .law import Columns, Law


@dataclass(frozen=True)
class Objective:
    """Sum, not mean: optimisers stop at an absolute tolerance, and a mean over points would stop them early. For any
    number of θ at once, [..., parameters]."""

    law: Law
    x: Columns
    loss: np.ndarray
    """float64 [points], positive."""
    delta: float = 1e-3
    """Where squares turn into absolute values, in log loss (Hoffmann et al. 2022)."""

    def residuals(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """log L̂ - log L [..., points], and its gradient [..., points, parameters]. Where a law gives no positive loss,
        the residual is that of a loss of 1e-9 and points nowhere."""
        value, gradient = self.law.value_and_gradient(theta, self.x)
        good = value > 1e-9
        safe = np.where(good, value, 1e-9)
        return np.log(safe) - np.log(self.loss), np.where(good[..., None], gradient / safe[..., None], 0.0)

    def __call__(self, theta: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """[...]; weights [..., points] say how often each point counts."""
        residual, _ = self.residuals(theta)
        huber = self._huber(residual)
        return (huber if weights is None else huber * weights).sum(-1)

    def value_and_gradient(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[...] and [..., parameters]."""
        residual, gradient = self.residuals(theta)
        slope = np.clip(residual, -self.delta, self.delta)
        return self._huber(residual).sum(-1), np.einsum("...n,...np->...p", slope, gradient)

    def _huber(self, residual: np.ndarray) -> np.ndarray:
        size = np.abs(residual)
        return np.where(size <= self.delta, 0.5 * size**2, self.delta * (size - 0.5 * self.delta))
