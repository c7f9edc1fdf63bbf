"""The blocked implementation, for any device: never more than a chunk of logits, gradients through autograd.

Reductions mean and sum form the gradients in the forward, while a chunk's logits are at hand (6 NVD); `none` has to
wait for its upstream gradient and computes the logits again (8 NVD). Where nothing needs a gradient, 2 NVD.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import host_sees
from .sweep import Swept, Wanted, sweep
from .types import Terms, VocabShard


def blocked_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    token_weights: Tensor | None,
    terms: Terms,
    reduction: str,
    outputs: Sequence[str],
    shard: VocabShard,
) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, outputs, and the NVD of forward and backward, of hidden (N, D), weight (rows, D), targets (N,).

    Raises RuntimeError in a second backward through one loss of reduction mean or sum: its gradients were formed once,
    and are handed over, not copied.
    """
    names = tuple(dict.fromkeys(outputs))
    needed = Wanted(*(x is not None and x.requires_grad for x in (hidden, weight, bias)))
    if not (torch.is_grad_enabled() and any(needed)):
        swept = sweep(hidden, weight, bias, targets, None, terms, shard, Wanted(), names)
        loss, _ = reduce_losses(swept, targets, token_weights, terms, reduction)
        return loss, swept.outputs, 2
    products = 2 * (needed.hidden + needed.weight)
    if reduction == "none":
        loss, *rest = _Recomputed.apply(hidden, weight, bias, targets, token_weights, terms, names, shard)
        nvd = 4 + products
    else:
        loss, *rest = _FormedInForward.apply(
            hidden, weight, bias, targets, token_weights, terms, reduction, names, shard
        )
        nvd = 2 + products
    return loss, dict(zip(names, rest, strict=True)), nvd


def reduce_losses(
    swept: Swept, targets: Tensor, token_weights: Tensor | None, terms: Terms, reduction: str
) -> tuple[Tensor, Tensor | None]:
    """The reduced loss, and the factor that turns Σ weight · loss into it: None for 1, always None for `none`.

    "mean" of no tokens, or of weights that sum to 0, is 0.
    """
    losses = swept.losses
    counted = targets != terms.ignore_index
    weights = None
    if token_weights is not None:
        weights = token_weights.to(losses.dtype).masked_fill(~counted, 0.0)
        losses = losses * weights
    if reduction == "none":
        return losses, None
    if reduction == "sum":
        return losses.sum(), None
    divisor = counted.sum().to(losses.dtype) if weights is None else weights.sum()
    factor = torch.where(divisor == 0, torch.zeros_like(divisor), 1.0 / divisor)
    return losses.sum() * factor, factor


class _FormedInForward(torch.autograd.Function):
    """Reductions mean and sum: backward only has to scale what the forward left."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        token_weights: Tensor | None,
        terms: Terms,
        reduction: str,
        outputs: tuple[str, ...],
        shard: VocabShard,
    ) -> tuple[Tensor, ...]:
        wanted = Wanted(*ctx.needs_input_grad[:3])
        swept = sweep(hidden, weight, bias, targets, token_weights, terms, shard, wanted, outputs)
        loss, factor = reduce_losses(swept, targets, token_weights, terms, reduction)
        # Saved as tensors rather than kept as attributes, so that activation checkpointing can drop and remake them.
        ctx.save_for_backward(swept.hidden_grad, swept.weight_grad, swept.bias_grad, factor)
        ctx.spent = False
        ctx.temperature = terms.temperature
        ctx.dtypes = [hidden.dtype, weight.dtype, None if bias is None else bias.dtype]
        rest = [swept.outputs[name] for name in outputs]
        ctx.mark_non_differentiable(*rest)
        return loss, *rest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError(
                "linear_cross_entropy: second backward through one loss; its gradients were formed in the forward and "
                "have been used. Compute the loss again, or use reduction='none'."
            )
        ctx.spent = True
        *gradients, factor = ctx.saved_tensors
        scale = upstream / ctx.temperature
        if factor is not None:
            scale = scale * factor
        return (*scale_gradients(gradients, ctx.dtypes, scale), None, None, None, None, None, None)


class _Recomputed(torch.autograd.Function):
    """Reduction none: the upstream gradient gives each token its own factor, so the logits are computed twice."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        token_weights: Tensor | None,
        terms: Terms,
        outputs: tuple[str, ...],
        shard: VocabShard,
    ) -> tuple[Tensor, ...]:
        swept = sweep(hidden, weight, bias, targets, None, terms, shard, Wanted(), outputs)
        loss, _ = reduce_losses(swept, targets, token_weights, terms, "none")
        ctx.save_for_backward(hidden, weight, bias, targets, token_weights)
        ctx.terms, ctx.shard = terms, shard
        rest = [swept.outputs[name] for name in outputs]
        ctx.mark_non_differentiable(*rest)
        return loss, *rest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, token_weights = ctx.saved_tensors
        factors = upstream / ctx.terms.temperature
        if token_weights is not None:
            factors = factors * token_weights.to(factors.dtype)
        wanted = Wanted(*ctx.needs_input_grad[:3])
        swept = sweep(hidden, weight, bias, targets, factors, ctx.terms, ctx.shard, wanted)
        gradients = [swept.hidden_grad, swept.weight_grad, swept.bias_grad]
        dtypes = [hidden.dtype, weight.dtype, None if bias is None else bias.dtype]
        return (*scale_gradients(gradients, dtypes, None), None, None, None, None, None)


def scale_gradients(
    gradients: Sequence[Tensor | None], dtypes: Sequence[torch.dtype | None], scale: Tensor | None
) -> list[Tensor | None]:
    """Multiplies in place by a 0-dim scale, and casts each to the dtype of its input."""
    # A factor of 1 would be a pass over V × D for nothing.
    if scale is not None and not (host_sees(scale) and scale.item() == 1.0):
        # One-dimensional: promotion would let a 0-dim fp32 factor be rounded to the 16 bits of a 16-bit gradient first.
        factor = scale.reshape(1)
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(factor)
    return [None if gradient is None else gradient.to(dtype) for gradient, dtype in zip(gradients, dtypes, strict=True)]
