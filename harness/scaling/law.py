"""What a scaling law is: a formula with parameters, its gradient, and where it comes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

Columns = Mapping[str, np.ndarray]
"""float64 [points] by name."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of a law, as people write it, and how the fitter moves it."""

    name: str
    meaning: str
    unit: str
    moves: Literal["log", "linear"]
    """The fitter's coordinate: its logarithm, for what is positive and may span decades, or itself."""
    starts: tuple[float, ...]
    """Where the search begins, in natural units; every combination with the other parameters' is looked at."""


class Law(ABC):
    """L̂(x; θ) > 0, a loss in nats a token, of the columns of some data.

    Coordinates θ are the fitter's (see Parameter.moves). All functions take any number of θ at once: float64
    [..., parameters], and give [..., points].
    """

    name: ClassVar[str]
    title: ClassVar[str]
    formula: ClassVar[str]
    source: ClassVar[str]
    columns: ClassVar[Mapping[str, str]]
    """The columns it needs, with their meaning and unit."""
    parameters: ClassVar[tuple[Parameter, ...]]
    identifiability: ClassVar[str]
    """What data must have in it for the parameters to be found."""

    @abstractmethod
    def value_and_gradient(self, theta: np.ndarray, x: Columns) -> tuple[np.ndarray, np.ndarray]:
        """L̂ [..., points] and dL̂/dθ [..., points, parameters]."""

    def predict(self, theta: np.ndarray, x: Columns) -> np.ndarray:
        """L̂ [..., points]."""
        return self.value_and_gradient(theta, x)[0]

    def natural(self, theta: np.ndarray) -> np.ndarray:
        """From the fitter's coordinates to natural units."""
        return np.stack(
            [
                np.exp(theta[..., place]) if parameter.moves == "log" else theta[..., place]
                for place, parameter in enumerate(self.parameters)
            ],
            axis=-1,
        )

    def coordinates(self, values: np.ndarray) -> np.ndarray:
        """And back."""
        return np.stack(
            [
                np.log(values[..., place]) if parameter.moves == "log" else values[..., place]
                for place, parameter in enumerate(self.parameters)
            ],
            axis=-1,
        )

    def grid(self) -> np.ndarray:
        """Every combination of starts: float64 [starts, parameters], in the fitter's coordinates."""
        axes = np.meshgrid(*(parameter.starts for parameter in self.parameters), indexing="ij")
        return self.coordinates(np.stack([axis.ravel() for axis in axes], axis=-1))


def exponential(
    theta: np.ndarray, places: Mapping[int, np.ndarray | float], count: int
) -> tuple[np.ndarray, np.ndarray]:
    """exp(Σ θ_p · factor_p), [..., points], and its gradient [..., points, count]; a factor is [points] or a number."""
    shape = np.broadcast_shapes(*(np.shape(factor) for factor in places.values()), (1,))
    exponent = sum(theta[..., place, None] * factor for place, factor in places.items())
    term = np.exp(np.minimum(exponent, 700.0))  # beyond is no loss, and must not be an overflow either
    gradient = np.zeros((*np.broadcast_shapes(term.shape, shape), count))
    for place, factor in places.items():
        gradient[..., place] = term * factor
    return term, gradient
