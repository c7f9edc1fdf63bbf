"""Norms that stand where a model has none, for libraries whose classes insist on them.

A norm divides by sqrt(variance + epsilon). With an epsilon that swallows the variance it divides by a constant, which
its weight takes back; powers of two make both exact. LayerNorm takes the mean away as well, which changes nothing where
the next matrix does so too, as folding has left it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from harness.config import HarnessError
from harness.model import ModelSection

from .rules import Row

# Of 2^60 a variance below 2^35 changes no bit in fp32. float16 holds no weight of 2^30; and where RMSNorm rounds to it
# between the division and the weight, as transformers does, a division by 2^15 would leave subnormal numbers.
_WIDE, _LAYERNORM_HALF, _RMSNORM_HALF = 2.0**60, 2.0**30, 2.0**24
EPSILONS = (_WIDE, _LAYERNORM_HALF, _RMSNORM_HALF)


@dataclass(frozen=True)
class StandIns:
    """The norms of a norm-free model as another format has them."""

    epsilon: float
    constants: Mapping[str, tuple[float, tuple[int, ...]]]
    """Their tensors that are one number all over: the number, and the shape."""
    final: str
    """Their weight of the final norm: ours, times `scale`."""

    @classmethod
    def of(cls, rows: Sequence[Row], section: ModelSection, epsilon: float) -> StandIns:
        """By a format's table of names."""
        names = {row.ours: row.theirs for row in rows}
        scale, shape = sqrt(epsilon), (section.hidden_size,)
        kinds = {"weight": scale} | ({"bias": 0.0} if section.norm == "layernorm" else {})
        constants = {
            names[f"layers.{{i}}.{norm}.{kind}"].format(i=layer): (value, shape)
            for layer in range(section.layers)
            for norm in ("attention_norm", "mlp_norm")
            for kind, value in kinds.items()
        }
        return cls(epsilon, constants, names["final_norm.weight"])

    def renamed(self, prefix: str) -> StandIns:
        """The same, where their names lack a prefix."""
        constants = {name.removeprefix(prefix): constant for name, constant in self.constants.items()}
        return StandIns(self.epsilon, constants, self.final.removeprefix(prefix))

    @property
    def scale(self) -> float:
        return sqrt(self.epsilon)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (_, shape) in self.constants.items()}

    def constant(self, name: str, dtype: torch.dtype) -> Tensor:
        value, shape = self.constants[name]
        return torch.full(shape, value, dtype=dtype)

    def scaled(self, weight: Tensor) -> Tensor:
        """The final norm's weight as it is written. Raises HarnessError where its dtype does not hold it."""
        found = (weight.float() * self.scale).to(weight.dtype)
        if bool((found.isinf() & weight.isfinite()).any()):
            dtype = str(weight.dtype).removeprefix("torch.")
            raise HarnessError(
                f"the final norm's weight, up to {weight.abs().max().item():.3g}, times {self.scale:.0f} is too large "
                f"for {dtype}: choose another --dtype"
            )
        return found


def epsilon_for(section: ModelSection, dtype: torch.dtype) -> float:
    """The stand-ins' epsilon, for weights of a dtype."""
    if dtype != torch.float16:
        return _WIDE
    return _LAYERNORM_HALF if section.norm == "layernorm" else _RMSNORM_HALF
