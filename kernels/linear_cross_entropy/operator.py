"""The loss as a custom operator, so that a compiler carries it in its graph as one node.

Two operators: the loss (with the gradients, where they are formed in the forward), and the gradients recomputed. Each
runs the blocked form or the Triton kernels, as it is told, and has a fake implementation, which says shapes and dtypes;
the first has the autograd formula that binds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .blocked import owed_by_token, recomputed_gradients, reduce, reduced_loss, scale_gradients
from .checks import check_shard, check_targets
from .fused.facts import PLANES
from .gradient import Upstream
from .sweep import Problem, Wanted, arithmetic_dtype
from .types import OUTPUTS, Terms, VocabShard

Results = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]
Gradients = tuple[Tensor, Tensor, Tensor]
DIFFERENTIABLE = tuple(name for name in OUTPUTS if name != "correct")


@torch.library.custom_op("harness::linear_cross_entropy", mutates_args=())
def loss_operator(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    class_weights: Tensor | None,
    targets: Tensor,
    token_weights: Tensor | None,
    shard_key: str,
    vocab_size: int,
    ignore_index: int,
    shift: int,
    tau: float,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    temperature: float,
    reduction: str,
    outputs: str,
    weight_grad_dtype: torch.dtype | None,
    fused: bool,
    filter_bound: float | None,
    filter_weight: bool,
    wanted: list[bool],
) -> Results:
    """Loss; the outputs named (by commas); the gradients of hidden, weight and bias that are wanted, where the blocked
    form has formed them (mean and sum), and the scale that they, or the upstream gradient, still owe; and what the
    kernels keep for the backward (`fused`: fused.Kept). Tensors of no elements stand for what there is not.

    `shard_key` is that of a VocabShard over several ranks, or empty. Arguments are those of the interface, checked.
    """
    terms = Terms(vocab_size, ignore_index, shift, tau, label_smoothing, z_loss, softcap, temperature)
    problem, weights = _problem(hidden, weight, bias, class_weights, targets, token_weights, shard_key, terms)
    check_targets(targets, terms)
    names = outputs.split(",") if outputs else []
    kept: Sequence[Tensor | None] = (None,) * 4
    if fused:
        from .fused.passes import forward_pass

        swept, left = forward_pass(problem, names, filter_bound)
        kept = (left.planes, left.tops, left.needed, left.share)
        loss, scale = reduce(swept.losses, problem.targets, weights, problem.class_weights, terms, reduction)
    else:
        reduced = reduced_loss(problem, weights, reduction, names, Wanted(*wanted))
        swept, loss, scale = reduced.swept, reduced.loss, reduced.scale
    found = [swept.outputs.get(name) for name in OUTPUTS]
    # Cloned, as what autograd holds for views may not be changed in place.
    shaped = [None if value is None else value.reshape(targets.shape).clone() for value in found]
    formed = [swept.hidden_grad, swept.weight_grad, swept.bias_grad]
    if formed[0] is not None:
        formed[0] = formed[0].reshape(hidden.shape)
    loss = loss.reshape(targets.shape).clone() if reduction == "none" else loss
    rest = (_or_nothing(value, hidden) for value in (*shaped, *formed, scale, *kept))
    return loss, *rest  # type: ignore[return-value]


@torch.library.custom_op("harness::linear_cross_entropy_backward", mutates_args=())
def gradients_operator(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    class_weights: Tensor | None,
    targets: Tensor,
    token_weights: Tensor | None,
    loss_grad: Tensor | None,
    lse_grad: Tensor | None,
    logprob_grad: Tensor | None,
    entropy_grad: Tensor | None,
    max_prob_grad: Tensor | None,
    kept: list[Tensor],
    shard_key: str,
    vocab_size: int,
    ignore_index: int,
    shift: int,
    tau: float,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    temperature: float,
    outputs: str,
    weight_grad_dtype: torch.dtype | None,
    filter_weight: bool,
    wanted: list[bool],
) -> Gradients:
    """Gradients of hidden, weight and bias from those of each token's loss and outputs, all in the targets' shape.

    kept: the fields of fused.Kept where the kernels ran the forward, else nothing; `outputs` are the forward's.
    """
    terms = Terms(vocab_size, ignore_index, shift, tau, label_smoothing, z_loss, softcap, temperature)
    problem, weights = _problem(hidden, weight, bias, class_weights, targets, token_weights, shard_key, terms)
    given = (loss_grad, lse_grad, logprob_grad, entropy_grad, max_prob_grad)
    upstream = Upstream(*(None if value is None else value.reshape(-1) for value in given))
    upstream = owed_by_token(problem, weights, upstream)
    dtypes = _gradient_dtypes(hidden, weight, bias, weight_grad_dtype)
    if kept:
        from .fused.passes import Kept, backward_pass

        names = outputs.split(",") if outputs else []
        formed = backward_pass(problem, Kept(*kept), upstream, Wanted(*wanted), dtypes[1], filter_weight, names)
    else:
        formed = recomputed_gradients(problem, upstream, Wanted(*wanted))
    if formed[0] is not None:
        formed[0] = formed[0].reshape(hidden.shape)
    first, second, third = (_or_nothing(value, hidden) for value in scale_gradients(formed, dtypes, None))
    return first, second, third


def _problem(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    class_weights: Tensor | None,
    targets: Tensor,
    token_weights: Tensor | None,
    shard_key: str,
    terms: Terms,
) -> tuple[Problem, Tensor | None]:
    """Flattened and shifted; and the token weights."""
    shard = VocabShard.find(shard_key) if shard_key else VocabShard(0, len(weight), terms.vocab_size)
    check_shard(shard, weight)
    targets, token_weights = flatten(targets, token_weights, terms)
    rows = hidden.reshape(-1, hidden.shape[-1])
    return Problem(rows, weight, bias, class_weights, targets, terms, shard), token_weights


def flatten(targets: Tensor, token_weights: Tensor | None, terms: Terms) -> tuple[Tensor, Tensor | None]:
    """Both as (N,), after the shift."""
    flat = shifted(targets, terms.shift, terms.ignore_index).reshape(-1)
    return flat, None if token_weights is None else shifted(token_weights, terms.shift, 0.0).reshape(-1)


def shifted(values: Tensor, shift: int, filling: float) -> Tensor:
    """At each place of the last dimension what stands `shift` further on, and at the end `filling`."""
    if shift == 0:
        return values
    if values.dim() == 0:
        return torch.full_like(values, filling)
    moved = torch.full_like(values, filling)
    moved[..., : max(values.shape[-1] - shift, 0)] = values[..., shift:]
    return moved


def _or_nothing(value: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if value is None else value


def _gradient_dtypes(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, weight_grad_dtype: torch.dtype | None
) -> tuple[torch.dtype, torch.dtype, torch.dtype | None]:
    return hidden.dtype, weight_grad_dtype or weight.dtype, None if bias is None else bias.dtype


@loss_operator.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    class_weights: Tensor | None,
    targets: Tensor,
    token_weights: Tensor | None,
    *settings: Any,
) -> Results:
    reduction, outputs, _, fused, filter_bound, _, wanted = settings[-7:]
    dtype, names = arithmetic_dtype(hidden, weight), outputs.split(",")
    formed = Wanted(*wanted) if reduction != "none" and not fused else Wanted()
    tokens, topped = targets.numel(), fused and not {"correct", "max_prob"}.isdisjoint(names)

    def empty(there: bool, shape: Sequence[int], dtype: torch.dtype = dtype) -> Tensor:
        return hidden.new_empty(shape, dtype=dtype) if there else hidden.new_empty(0)

    needed = hidden.new_empty(0, dtype=torch.bool if fused else None)
    if fused and filter_bound:  # how many tiles there are is the kernels' choice
        needed = hidden.new_empty((tokens, torch.library.get_ctx().new_dynamic_size()), dtype=torch.bool)

    return (
        hidden.new_empty(targets.shape if reduction == "none" else (), dtype=dtype),
        empty("lse" in names, targets.shape),
        empty("logprob" in names, targets.shape),
        empty("entropy" in names, targets.shape),
        empty("max_prob" in names, targets.shape),
        empty("correct" in names, targets.shape, torch.bool),
        empty(formed.hidden, hidden.shape),
        empty(formed.weight, weight.shape),
        empty(formed.bias, weight.shape[:1]),
        empty(reduction == "mean", ()),
        empty(fused, (PLANES, tokens)),
        hidden.new_empty(tokens if topped else 0, dtype=torch.int32 if fused else None),
        needed,
        empty(fused, ()),
    )


@gradients_operator.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Gradients:
    weight_grad_dtype, _, wanted = rest[-3:]
    needed = Wanted(*wanted)
    dtypes = _gradient_dtypes(hidden, weight, bias, weight_grad_dtype)
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    first, second, third = (
        hidden.new_empty(shape, dtype=dtype) if there else hidden.new_empty(0)
        for there, shape, dtype in zip(needed, shapes, dtypes, strict=True)
    )
    return first, second, third


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    tensors, settings = inputs[:6], inputs[6:]
    reduction, outputs, weight_grad_dtype, fused, _, filter_weight, wanted = settings[-7:]
    formed, scale, kept = output[6:9], output[9], output[10:]
    differentiable = [name for name in DIFFERENTIABLE if name in outputs.split(",")]
    ctx.set_materialize_grads(False)
    # What was not asked for is a tensor of no elements, from which nothing may come back.
    others = [value for name, value in zip(OUTPUTS, output[1:], strict=False) if name not in differentiable]
    ctx.mark_non_differentiable(*others, *formed, scale, *kept)
    ctx.formed = reduction != "none" and not fused
    # The inputs are kept only where the logits may have to be computed again.
    again = not ctx.formed or bool(differentiable)
    # Saved as tensors rather than kept as attributes, so that activation checkpointing can drop and remake them.
    ctx.save_for_backward(*formed, scale, *(kept if fused else ()), *(tensors if again else ()))
    ctx.settings, ctx.wanted, ctx.weight_grad_dtype = settings[:-7], wanted, weight_grad_dtype
    ctx.reduction, ctx.temperature, ctx.fused = reduction, settings[8], fused
    ctx.outputs, ctx.filter_weight = outputs, filter_weight
    ctx.dtypes = _gradient_dtypes(inputs[0], inputs[1], inputs[2], weight_grad_dtype)
    ctx.spent = False


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        # Under create_graph. once_differentiable raises in a second derivative only if an upstream gradient needs one,
        # and would drop, in silence, that these gradients depend on hidden and weight.
        upstream = tuple(None if value is None else value.detach().requires_grad_() for value in upstream)
    gradients: tuple[Tensor | None, ...] = _gradients(ctx, *upstream)
    return gradients


@once_differentiable
def _gradients(ctx: Any, loss_grad: Tensor | None, *rest: Tensor | None) -> tuple[Tensor | None, ...]:
    if ctx.formed and ctx.spent and loss_grad is not None:
        raise RuntimeError(
            "linear_cross_entropy: second backward through one loss; its gradients were formed in the forward and "
            "have been used. Compute the loss again, or use reduction='none'."
        )
    saved = ctx.saved_tensors
    formed, scale, saved = saved[:3], saved[3], saved[4:]
    kept, inputs = (list(saved[:4]), saved[4:]) if ctx.fused else ([], saved)
    scale = scale if ctx.reduction == "mean" else None
    output_grads = rest[: len(DIFFERENTIABLE)]
    if ctx.formed and all(gradient is None for gradient in output_grads):
        gradients = _hand_over(ctx, formed, scale, loss_grad)
    else:
        if ctx.reduction != "none" and loss_grad is not None:
            loss_grad = (loss_grad if scale is None else loss_grad * scale).expand(inputs[4].shape)
        options = ctx.outputs, ctx.weight_grad_dtype, ctx.filter_weight, ctx.wanted
        gradients = list(gradients_operator(*inputs, loss_grad, *output_grads, kept, *ctx.settings, *options))
    found = [gradient if there else None for gradient, there in zip(gradients, ctx.wanted, strict=True)]
    return (*found, *[None] * 19)


def _hand_over(
    ctx: Any, formed: Sequence[Tensor], scale: Tensor | None, loss_grad: Tensor | None
) -> list[Tensor | None]:
    """The gradients that the forward left, times what they still owe: in place, so only once."""
    if loss_grad is None:
        return [None, None, None]
    ctx.spent = True
    owed = loss_grad / ctx.temperature
    # `.data`, for the versions that autograd counts: outputs may yet be differentiated, with what else was saved.
    there = [gradient.data if wanted else None for gradient, wanted in zip(formed, ctx.wanted, strict=True)]
    return scale_gradients(there, ctx.dtypes, owed if scale is None else owed * scale)


loss_operator.register_autograd(_backward, setup_context=_remember)
