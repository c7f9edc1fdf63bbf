"""LayerNorm and RMSNorm, and the affine map that stands where the final one was removed."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Share = Callable[[Tensor], Tensor]
"""Says how a parameter that every tensor-parallel rank holds is used: TensorParallel.on_tokens or on_heads."""


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon) * weight + bias over the last dimension (Ba et al., arXiv 1607.06450)."""

    def __init__(self, size: int, epsilon: float, share: Share) -> None:
        super().__init__()
        self.share = share
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.share(self.weight), self.share(self.bias), self.epsilon)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, size: int, epsilon: float, share: Share) -> None:
        super().__init__()
        self.share = share
        self.weight = nn.Parameter(torch.empty(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.share(self.weight), self.epsilon)


class Affine(nn.Module):
    """What a removed norm leaves: (x - mean) * weight + bias with `centre`, else x * weight."""

    def __init__(self, size: int, centre: bool, share: Share) -> None:
        super().__init__()
        self.share = share
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if centre else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return x * self.share(self.weight)
        centred = x - x.mean(-1, keepdim=True)
        return torch.addcmul(self.share(self.bias), centred, self.share(self.weight))
