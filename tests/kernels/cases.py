"""Random problems for the linear cross-entropy, and the comparison with an exact answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.kernels import LossOutput, VocabShard, linear_cross_entropy


@dataclass
class Problem:
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor
    token_weights: Tensor
    shard: VocabShard


def draw(
    tokens: int,
    dim: int,
    vocab_size: int,
    *,
    padding: int = 0,
    ignored: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Gaussian logits of a few nats; `ignored` is the share of tokens without a target."""
    rows = vocab_size + padding
    targets = torch.randint(0, vocab_size, (tokens,))
    targets[torch.rand(tokens) < ignored] = -100
    return Problem(
        hidden=torch.randn(tokens, dim, dtype=dtype),
        weight=(torch.randn(rows, dim) * 2 / dim**0.5).to(dtype),
        targets=targets,
        bias=torch.randn(rows, dtype=dtype),
        token_weights=torch.rand(tokens, dtype=dtype),
        shard=VocabShard(0, rows, vocab_size),
    )


def solve(
    problem: Problem,
    upstream: Tensor | None = None,
    *,
    bias: bool = False,
    token_weights: bool = False,
    **settings: Any,
) -> tuple[LossOutput, list[Tensor], Tensor]:
    """The result, the gradients of hidden, weight and (where asked for) bias, and the upstream gradient, if not given
    random and different for every element of the loss."""
    leaves = [problem.hidden, problem.weight] + ([problem.bias] if bias else [])
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    output = linear_cross_entropy(
        leaves[0],
        leaves[1],
        problem.targets,
        bias=leaves[2] if bias else None,
        token_weights=problem.token_weights if token_weights else None,
        shard=problem.shard,
        **settings,
    )
    if upstream is None:
        upstream = torch.randn(output.loss.shape, dtype=torch.float64) + 0.1
    gradients = torch.autograd.grad(output.loss, leaves, upstream.to(output.loss.dtype))
    return output, list(gradients), upstream


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Largest absolute difference over the largest absolute value; 0 for two empty or two zero tensors."""
    assert got.shape == exact.shape
    if not exact.numel():
        return 0.0
    assert got.isfinite().all()
    difference = (got.double() - exact.double()).abs().max().item()
    return difference / max(exact.double().abs().max().item(), 1e-300) if difference else 0.0
