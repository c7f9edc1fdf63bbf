"""The band that a run is compared with, and whether it is inside."""

from __future__ import annotations

from typing import Any

import numpy as np

from harness.scaling import Conditioned

POINTS = 256
"""Steps at which the band is kept; between them it is interpolated."""
LEFT = 1.959964
BACK = 1.5
"""Standard deviations at which a run is outside its 95 % band, and at which it is inside again: not the same, so that a
run on the edge is not an event every time."""


class Band:
    """Of the mean loss, as it was forecast at one step; what noise a mean of so many points has is added by those who
    compare. JSON comes back to the last bit."""

    def __init__(self, step: int, noise: float, steps: np.ndarray, log_mean: np.ndarray, deviation: np.ndarray) -> None:
        self.step, self.noise = step, noise
        self._steps, self._log_mean, self._deviation = steps, log_mean, deviation

    @classmethod
    def of(cls, found: Conditioned, step: int, total_steps: int) -> Band:
        steps = np.unique(np.linspace(step, total_steps, POINTS).astype(np.int64))
        forecast = found.forecast(steps)
        return cls(step, found.noise, steps, np.log(forecast.mean), forecast.deviation)

    def at(self, steps: np.ndarray) -> tuple[float, float]:
        """Mean of the forecast log losses of some steps, and the standard deviation of that mean."""
        mean = np.interp(steps, self._steps, self._log_mean).mean()
        return float(mean), float(np.interp(steps, self._steps, self._deviation).mean())

    def ends(self, step: int) -> tuple[float, float]:
        """The 95 % band of the mean loss at a step."""
        mean, deviation = self.at(np.array([step]))
        return float(np.exp(mean - LEFT * deviation)), float(np.exp(mean + LEFT * deviation))

    def distance(self, steps: np.ndarray, losses: np.ndarray, noise: float | None = None) -> float:
        """How many standard deviations the mean of some points lies above the forecast; their own scatter counts as
        noise, or for one point, `noise`."""
        mean, deviation = self.at(steps)
        logs = np.log(losses)
        error = float(logs.std(ddof=1) / len(logs) ** 0.5) if noise is None else noise
        return float((logs.mean() - mean) / np.hypot(deviation, error))

    def as_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "noise": self.noise,
            "steps": self._steps.tolist(),
            "log_mean": self._log_mean.tolist(),
            "deviation": self._deviation.tolist(),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Band:
        arrays = (np.array(values[name]) for name in ("steps", "log_mean", "deviation"))
        return cls(values["step"], values["noise"], *arrays)
