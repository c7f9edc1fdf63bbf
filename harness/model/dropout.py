"""Dropout that draws the same mask again: in recomputation, after a resume, and on the ranks that must agree."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.parallel import TensorParallel, seed_dropout


class Dropout(nn.Module):
    """Dropout of one place in the model, seeded by the forward pass and the place.

    `on` says what it drops elements of: "tokens", what is passed between blocks, which tensor-parallel ranks hold all
    of unless tokens are split; "heads", of which each rank has its own; "all", what every rank always holds.
    """

    def __init__(
        self, probability: float, tensor: TensorParallel, place: str, on: Literal["tokens", "heads", "all"] = "tokens"
    ) -> None:
        super().__init__()
        self.probability, self.tensor, self.place, self.on = probability, tensor, place, on

    def forward(self, x: Tensor, seed: int | None) -> Tensor:
        return F.dropout(x, p) if (p := self.prepare(seed, x.device)) else x

    def prepare(self, seed: int | None, device: torch.device) -> float:
        """Seed the device's generator for this place and return the probability; 0 where nothing is to be dropped."""
        if seed is None or self.probability == 0.0:
            return 0.0
        differs = self.on == "heads" or (self.on == "tokens" and self.tensor.splits_tokens)
        seed_dropout(device, seed, self.place, self.tensor.rank if differs else None)
        return self.probability
