"""The smooth adversarial term of a linear head, without logits: how far a perturbed input moves a token's margins.

With d = W·δ the change of the logits under δ = perturbed − hidden, the squared change of the margins is

    Σ_k (d_y − d_k)² = V·d_y² − 2·d_y·(s·δ) + δᵀGδ,   s = Σ rows of W,  G = WᵀW

so it takes a D × D matrix and 2·V·D² operations, whatever the tokens. (Bias drops out; a softcap would spoil it.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .sweep import arithmetic_dtype
from .types import Terms, VocabShard
from .vocab_parallel import own_columns, whole_hidden


def margin_changes(
    hidden: Tensor, perturbed: Tensor, weight: Tensor, targets: Tensor, terms: Terms, shard: VocabShard
) -> Tensor:
    """‖Δ(x′) − Δ(x)‖₂ (N,) of hidden and perturbed (N, D); 0 at ignored targets (N,).

    Differentiable by both and by weight; where nothing changes the derivative is taken for 0. Under a shared vocabulary
    two all-reduces, of D × (D + 1) and of N × D numbers, and one of D, and under sequence parallelism a gather of the
    N × D changes; equal gradients on all ranks are taken for granted, as everywhere.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        dtype, shared = arithmetic_dtype(hidden, weight), shard.ranks > 1
        change = perturbed.to(dtype) - hidden.to(dtype)
        if shared and shard.sequence_parallel:
            change = whole_hidden(change, shard)
        ignored = targets == terms.ignore_index
        change = change.masked_fill(ignored[:, None], 0.0)
        labels, mine = own_columns(targets.masked_fill(ignored, 0), shard)
        matrix = weight[: shard.columns].to(dtype)
        # The sum is the same wherever the rows' origin lies, and has least to cancel around their mean.
        matrix = matrix - _sum(matrix.detach().sum(0), shard) / terms.vocab_size
        moments = _sum(torch.cat([matrix.T @ matrix, matrix.sum(0, keepdim=True)]), shard)
        rows = matrix[labels] if len(matrix) else change.new_zeros(change.shape)
        own_row = _sum(rows * mine[:, None], shard)
        own_change = (own_row * change).sum(1)
        products = change @ moments.T  # (N, D + 1)
        square = (products[:, :-1] * change).sum(1) + own_change * (
            terms.vocab_size * own_change - 2.0 * products[:, -1]
        )
        moved = square > 0
        return torch.where(moved, square, 1.0).sqrt().masked_fill(~moved, 0.0)


def _sum(own: Tensor, shard: VocabShard) -> Tensor:
    if shard.ranks == 1:
        return own
    total: Tensor = _SumOverRanks.apply(own, shard)
    return total


class _SumOverRanks(torch.autograd.Function):
    """All ranks go on to compute the same from it, so the gradient that a rank has is complete."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, shard: VocabShard) -> Tensor:
        total = own.clone()
        dist.all_reduce(total, group=shard.group)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return upstream[0], None
