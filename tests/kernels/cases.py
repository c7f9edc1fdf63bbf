"""Random problems for the linear cross-entropy, and the comparison with an exact answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.kernels import IGNORE_INDEX, LossOutput, VocabShard, linear_cross_entropy

DIFFERENTIABLE = ("lse", "logprob", "entropy", "max_prob")
"""The outputs that have a gradient."""


@dataclass
class Problem:
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor
    token_weights: Tensor
    shard: VocabShard
    class_weights: Tensor | None = None
    perturbed_hidden: Tensor | None = None


def draw(
    tokens: int | tuple[int, ...],
    dim: int,
    vocab_size: int,
    *,
    padding: int = 0,
    ignored: float = 0.0,
    ignore_index: int = IGNORE_INDEX,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Gaussian logits of a few nats; `ignored` is the share of tokens without a target."""
    rows, shape = vocab_size + padding, (tokens,) if isinstance(tokens, int) else tokens
    targets = torch.randint(0, vocab_size, shape)
    targets[torch.rand(shape) < ignored] = ignore_index
    hidden = torch.randn(*shape, dim, dtype=dtype)
    return Problem(
        hidden=hidden,
        weight=(torch.randn(rows, dim) * 2 / dim**0.5).to(dtype),
        targets=targets,
        bias=torch.randn(rows, dtype=dtype),
        token_weights=torch.rand(shape, dtype=dtype),
        shard=VocabShard(0, rows, vocab_size),
        class_weights=torch.rand(vocab_size, dtype=dtype) * 2,
        perturbed_hidden=(hidden + torch.randn_like(hidden) / 3).to(dtype),
    )


def differentiate(
    problem: Problem,
    fields: Sequence[str] = ("loss",),
    upstream: dict[str, Tensor] | None = None,
    *,
    bias: bool = False,
    token_weights: bool = False,
    class_weights: bool = False,
    perturbed_hidden: bool = False,
    **settings: Any,
) -> tuple[LossOutput, list[Tensor], dict[str, Tensor]]:
    """The result; the gradients of hidden, weight and (where asked for) bias and perturbed_hidden; and the upstream
    gradients of the result's `fields`, where not given random and different for every element."""
    optional = {"bias": bias, "perturbed_hidden": perturbed_hidden}
    names = ["hidden", "weight", *(name for name, there in optional.items() if there)]
    leaves = {name: getattr(problem, name).detach().requires_grad_() for name in names}
    output = linear_cross_entropy(
        **leaves,
        targets=problem.targets,
        token_weights=problem.token_weights if token_weights else None,
        class_weights=problem.class_weights if class_weights else None,
        shard=problem.shard,
        **settings,
    )
    values = [getattr(output, field) for field in fields]
    if upstream is None:
        upstream = {
            field: torch.randn(value.shape, dtype=torch.float64) + 0.1
            for field, value in zip(fields, values, strict=True)
        }
    from_above = [upstream[field].to(value.dtype) for field, value in zip(fields, values, strict=True)]
    return output, list(torch.autograd.grad(values, list(leaves.values()), from_above)), upstream


def solve(problem: Problem, upstream: Tensor | None = None, **settings: Any) -> tuple[LossOutput, list[Tensor], Tensor]:
    """`differentiate` of the loss alone, and its upstream gradient."""
    output, gradients, given = differentiate(
        problem, ("loss",), None if upstream is None else {"loss": upstream}, **settings
    )
    return output, gradients, given["loss"]


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Largest absolute difference over the largest absolute value; 0 for two empty or two zero tensors."""
    assert got.shape == exact.shape
    if not exact.numel():
        return 0.0
    assert got.isfinite().all()
    difference = (got.double() - exact.double()).abs().max().item()
    return difference / max(exact.double().abs().max().item(), 1e-300) if difference else 0.0
