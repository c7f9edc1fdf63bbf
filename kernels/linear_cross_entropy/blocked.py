"""The blocked implementation, for any device: never more than a chunk of logits.

Reductions mean and sum form the gradients in the forward, while a chunk's logits are at hand (6 NVD); `none`, and
outputs that are differentiated, have to wait for their upstream gradients and compute the logits again (8 NVD). Where
nothing needs a gradient, 2 NVD. operator.py hangs these into autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import host_sees
from .gradient import Upstream
from .sweep import Problem, Swept, Wanted, sweep
from .types import Terms


@dataclass
class Reduced:
    """What one forward gives: the reduced loss; everything by token; and the gradients formed, if they were wanted.

    Gradients are those of Σ token_weights · losses / temperature but for `scale` and 1/temperature, still owed.
    """

    loss: Tensor
    swept: Swept
    scale: Tensor | None
    """What makes Σ token_weights · losses the loss: None for 1, always None for reduction none."""


def reduced_loss(
    problem: Problem, token_weights: Tensor | None, reduction: str, outputs: Sequence[str], wanted: Wanted
) -> Reduced:
    """The loss, and for mean and sum the gradients that are `wanted`.

    "mean" of no tokens, or of weights that sum to 0, is 0.
    """
    formed = wanted if reduction != "none" else Wanted()
    swept = sweep(problem, formed, Upstream(loss=token_weights if any(formed) else None), outputs)
    loss, scale = reduce(swept.losses, problem.targets, token_weights, problem.class_weights, problem.terms, reduction)
    return Reduced(loss, swept, scale)


def reduce(
    values: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    class_weights: Tensor | None,
    terms: Terms,
    reduction: str,
) -> tuple[Tensor, Tensor | None]:
    """What a reduction makes of values by token (N,), 0 where ignored; and the scale that makes their weighted sum of
    it, None for 1."""
    if token_weights is not None:
        values = values * token_weights.to(values.dtype).masked_fill(targets == terms.ignore_index, 0.0)
    if reduction == "none":
        return values, None
    if reduction == "sum":
        return values.sum(), None
    scale = mean_scale(targets, token_weights, class_weights, terms.ignore_index, values.dtype)
    return values.sum() * scale, scale


def mean_scale(
    targets: Tensor,
    token_weights: Tensor | None,
    class_weights: Tensor | None,
    ignore_index: int,
    dtype: torch.dtype,
) -> Tensor:
    """What makes a sum the mean over targets (N,): one over their count, each counting as much as its token weight
    times its class weight; 0 where that is 0."""
    counted = targets != ignore_index
    weights = counted.to(dtype)
    if token_weights is not None:
        weights = weights * token_weights.to(dtype)
    if class_weights is not None:
        weights = weights * class_weights.to(dtype)[targets.masked_fill(~counted, 0)]
    divisor = weights.masked_fill(~counted, 0.0).sum()
    return torch.where(divisor == 0, torch.zeros_like(divisor), 1.0 / divisor)


def owed_by_token(problem: Problem, token_weights: Tensor | None, upstream: Upstream) -> Upstream:
    """What `sweep` and the kernels take for what reaches each token's loss (before its weight) and outputs from above,
    (N,) each: with the token's weight, and the factor 1/temperature that their gradients owe."""
    loss = torch.zeros_like(problem.targets, dtype=problem.dtype) if upstream.loss is None else upstream.loss
    if token_weights is not None:
        loss = loss * token_weights.to(loss.dtype)
    scale = 1.0 / problem.terms.temperature
    return Upstream(*(None if value is None else value * scale for value in upstream._replace(loss=loss)))


def recomputed_gradients(problem: Problem, upstream: Upstream, wanted: Wanted) -> list[Tensor | None]:
    """Gradients of hidden, weight and bias, in the dtype of `Swept`; `upstream` as `owed_by_token` makes it."""
    swept = sweep(problem, wanted, upstream)
    return [swept.hidden_grad, swept.weight_grad, swept.bias_grad]


def scale_gradients(
    gradients: Sequence[Tensor | None], dtypes: Sequence[torch.dtype | None], scale: Tensor | None
) -> list[Tensor | None]:
    """Multiplies in place by a 0-dim scale, and casts each to the dtype of its input."""
    # A factor of 1 would be a pass over V × D for nothing. (What a compiler traces with is no plain Tensor, and has no
    # value to look at.)
    visible = scale is not None and type(scale) is Tensor and host_sees(scale)
    if scale is not None and not (visible and scale.item() == 1.0):
        # One-dimensional: promotion would let a 0-dim fp32 factor be rounded to the 16 bits of a 16-bit gradient first.
        factor = scale.reshape(1)
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(factor)
    return [None if gradient is None else gradient.to(dtype) for gradient, dtype in zip(gradients, dtypes, strict=True)]
