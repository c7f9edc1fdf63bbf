"""The function: what it computes, what it costs, what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .blocked import blocked_loss
from .checks import check_shard, check_targets, check_tensors, check_terms
from .reference import reference_loss
from .types import IGNORE_INDEX, LossOutput, Reduction, Terms, VocabShard
from .vocab_parallel import gather_problem


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    outputs: Sequence[str] = (),
    shard: VocabShard | None = None,
    implementation: str = "auto",
) -> LossOutput:
    """Cross-entropy of the linear head `weight`, without ever holding the logits of all tokens.

    For each token, with h its hidden state, y its target and sums over the V rows below `shard.vocab_size`:

        u = weight · h + bias;  c = softcap · tanh(u / softcap), or u where softcap is None;  z = c / temperature
        lse = log Σ exp z
        loss = (1 − label_smoothing) · (lse − z_y) + label_smoothing · (lse − Σ z / V) + z_loss · lse²

    (the smoothed cross-entropy is torch's), times the token's weight where token_weights is given, and 0 where the
    target is ignore_index.

    hidden         (..., D), fp32, bf16, fp16 or float64; any strides.
    weight         (rows, D), the same choice of dtypes, not necessarily hidden's; rows at or beyond vocab_size are
                   padding: no probability, exactly zero gradient.
    targets        (...), int64 ids in [0, vocab_size), or ignore_index.
    bias           (rows,); token_weights (...), without gradient.
    reduction      "none" gives the losses, (...); "sum" their sum; "mean" divides the sum by this call's count of
                   tokens that are not ignored, or by the sum of their weights; it is 0 where that is 0.
    outputs        names of `LossOutput` fields wanted beside the loss; all of them are detached.
    shard          which rows the weight holds; by default all of the vocabulary, and all are real. See below.
    implementation "blocked", "reference" (float64, plain torch, full logits: for tests), or "auto": blocked.

    Arithmetic is fp32 for fp32 and 16-bit inputs (a 16-bit weight is copied to fp32 for the call), float64 where
    hidden or weight is float64. Autocast doesn't reach inside: the dtypes of the tensors given decide. The loss and
    the outputs have the dtype of the arithmetic; each gradient has the dtype of its input, and is accumulated in the
    dtype of the arithmetic.

    Costs in multiples of N·V·D operations, forward and backward: 6 for mean and sum, whose gradients are formed in the
    forward and can be used once (a second backward raises RuntimeError); 8 for none; 2 less for each of hidden and
    weight that needs no gradient; 2 under no_grad. torch.compile breaks its graph at the call.

    Where ranks share the vocabulary (`shard.group`): each holds its own rows of weight and bias, and all call this
    together, with otherwise the same arguments and the same inputs in need of gradients.
    - Loss and outputs are replicated, with the same bits on all ranks; upstream gradients are taken to be equal too.
    - The gradients of weight and bias are those of the rank's rows. That of hidden is complete, with the same bits on
      all ranks: one all-reduce where it is formed, in the dtype of the arithmetic, rounded to hidden's afterwards.
    - With `shard.sequence_parallel`, hidden is this rank's 1/ranks of the tokens (all dimensions but the last
      flattened, in rank order), while targets, token_weights and all results have all tokens. Then hidden is gathered
      inside, and its gradient reduce-scattered.
    - Beside these: an all-gather of four to seven numbers a token, once per chunk of tokens and pass over the logits
      (`none` makes a second one for its backward), and one of five integers at a shard's first use. How many
      there are depends only on what is the same on all ranks.
    - V in the costs is the rank's own. The reference gathers the whole problem, and solves it on every rank.

    Raises ValueError for shapes, dtypes and constants that don't fit, and on the CPU for a target out of range, naming
    its value and position (elsewhere an assertion on the device, since the host doesn't wait).
    """
    if torch.compiler.is_compiling():
        return _outside_compilation()(
            hidden,
            weight,
            targets,
            bias=bias,
            token_weights=token_weights,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            temperature=temperature,
            reduction=reduction,
            outputs=outputs,
            shard=shard,
            implementation=implementation,
        )
    if implementation not in ("auto", "blocked", "reference"):
        raise ValueError(f"implementation must be 'auto', 'blocked' or 'reference', got {implementation!r}")
    check_tensors(hidden, weight, targets, bias, token_weights, shard)
    shard = VocabShard(0, len(weight), len(weight)) if shard is None else shard
    check_shard(shard, weight)
    terms = Terms(shard.vocab_size, ignore_index, label_smoothing, z_loss, softcap, temperature)
    check_terms(terms, reduction, outputs)
    check_targets(targets, terms)

    rows = hidden.reshape(-1, hidden.shape[-1])
    weights = None if token_weights is None else token_weights.reshape(-1)
    if implementation == "reference" and shard.ranks > 1:
        rows, weight, bias = gather_problem(rows, weight, bias, shard)
    arguments = (rows, weight, bias, targets.reshape(-1), weights, terms, reduction, outputs)
    if implementation == "reference":
        loss, extras = reference_loss(*arguments)
        nvd = 2 + 2 * (hidden.requires_grad + weight.requires_grad) * torch.is_grad_enabled()
        ran = f"reference, {nvd} NVD"
    else:
        loss, extras, nvd = blocked_loss(*arguments, shard)
        ran = f"blocked, {nvd} NVD"
    if reduction == "none":
        loss = loss.reshape(targets.shape)
    return LossOutput(
        loss=loss,
        implementation=ran,
        **{key: value.reshape(targets.shape) for key, value in extras.items()},
    )


_uncompiled: Callable[..., LossOutput] | None = None


def _outside_compilation() -> Callable[..., LossOutput]:
    """linear_cross_entropy, which the compiler calls rather than traces.

    Made on first use in a compiled region: torch.compiler.disable imports the compiler, which takes seconds.
    """
    global _uncompiled
    if _uncompiled is None:
        _uncompiled = torch.compiler.disable(linear_cross_entropy)
    return _uncompiled
