"""The function: what it computes, what it costs, what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .adversarial import margin_changes
from .blocked import reduce
from .checks import check_perturbation, check_shard, check_targets, check_tensors, check_terms, refuse_forward_mode
from .choice import choose, target
from .comp_sum import CompSum, CrossEntropy
from .operator import flatten, loss_operator
from .reference import reference_loss
from .sweep import arithmetic_dtype
from .types import IGNORE_INDEX, OUTPUTS, LossOutput, Reduction, Terms, VocabShard
from .vocab_parallel import gather_problem, whole_hidden

CROSS_ENTROPY = CrossEntropy()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    class_weights: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift: int = 0,
    loss: CrossEntropy | CompSum = CROSS_ENTROPY,
    perturbed_hidden: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    outputs: Sequence[str] = (),
    shard: VocabShard | None = None,
    weight_grad_dtype: torch.dtype | None = None,
    deterministic: bool = False,
    filter_bound: float | None = None,
    filter_weight: bool = False,
    implementation: str = "auto",
) -> LossOutput:
    """Cross-entropy, or another comp-sum loss, of the linear head `weight`, without ever holding all tokens' logits.

    For each token, with h its hidden state, y its target, V the vocabulary (`shard.vocab_size`, or all rows), sums over
    its rows, and w the class weights (1 where none are given):

        u = weight · h + bias;  c = softcap · tanh(u / softcap), or u where softcap is None
        z = c / (temperature · rho);  lse = log Σ exp z;  log p = z − lse
        f(p) = −log p, or (1 − p^(tau − 1)) / (tau − 1) for CompSum
        loss = (1 − label_smoothing) · w_y · f(p_y) + label_smoothing · Σ w · f(p) / V + z_loss · lse² + nu · ‖change‖

    (the smoothed cross-entropy is torch's; for `change` see `CompSum`), times the token's weight where token_weights is
    given, and 0 where the target is ignore_index.

    hidden         (..., D), fp32, bf16, fp16 or float64; any strides.
    weight         (rows, D), the same choice of dtypes, not necessarily hidden's; rows at or beyond vocab_size are
                   padding: no probability, exactly zero gradient.
    targets        (...), int64 ids in [0, vocab_size), or ignore_index.
    bias           (rows,).
    class_weights  (vocab_size,), without gradient; of the whole vocabulary also where ranks share it.
    token_weights  (...), without gradient.
    shift          hidden at place t of the last dimension of targets predicts targets[t + shift], which brings its
                   token weight along; the last `shift` places count as ignored.
    reduction      "none" gives the losses, (...); "sum" their sum; "mean" divides the sum by this call's count of
                   tokens that are not ignored, or by the sum of their w_y times their token weight; it is 0 where that
                   is 0.
    outputs        names of `LossOutput` fields wanted beside the loss.
    shard          which rows the weight holds; by default all of the vocabulary, and all are real. See below.
    weight_grad_dtype  dtype in which the weight's gradient is handed to autograd; None: the weight's. With fp32 and a
                   16-bit weight the sum that was formed in fp32 reaches `weight.grad` unrounded, if
                   `weight.grad_dtype = torch.float32` was set (torch 2.10); otherwise autograd rounds it.
    deterministic  the same bits for the same inputs, machine and threads: both forms always are, the Triton form as far
                   as torch's own products are.
    filter_bound   share of a token's probability that may be left out of hidden's gradient: tiles of the softmax that
                   no token in them needs are not multiplied out. None and 0: nothing is left out, and the blocked form
                   never leaves out anything. Not together with label_smoothing. `LossOutput.kept_share` tells what was
                   kept.
    filter_weight  leave the same tiles out of weight's and bias's gradients too, and do not compute them again. A bound
                   on a token's probability is none on a row of weight: not for pretraining.
    implementation "blocked": plain torch, a chunk of logits at a time; "triton": kernels for GPUs from Ampere on, which
                   never hold logits (or anywhere in Triton's interpreter); "reference": float64, plain torch, full
                   logits, for tests; "auto": triton for 16-bit tensors on a GPU, else blocked. A fallback is logged,
                   and `LossOutput.implementation` says what ran.

    Arithmetic is fp32 for fp32 and 16-bit inputs, float64 where hidden or weight is float64: the blocked form copies a
    16-bit weight to fp32 for the call; the kernels multiply 16-bit numbers, round a logit's gradient to 16 bits for the
    products that it enters, and sum in fp32. Autocast doesn't reach inside: the dtypes of the tensors given decide. The
    loss and the outputs have the dtype of the arithmetic; each gradient has the dtype of its input, and is accumulated
    in the dtype of the arithmetic.

    Costs in multiples of N·V·D operations, forward and backward. Blocked: 6 for mean and sum, whose gradients are
    formed in the forward and can be used once (a second backward raises RuntimeError); 8 for none; 2 less for each of
    hidden and weight that needs no gradient; 2 under no_grad. Where outputs are differentiated beside a mean or sum,
    all is recomputed in the backward: 6 more. Triton: 8, or 2 less likewise, whatever the reduction; the backward may
    be run more than once. Its memory beyond the gradients is 1 % of theirs in fp32, or up to 64 MiB where D is small;
    hidden states of ignored tokens must be finite. torch.compile takes the call into its graph as one operator.

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
    - A loss with nu adds two all-reduces, of D · (D + 1) numbers and of D for each token, a small one of D, and under
      sequence parallelism a gather of the perturbations.
    - Where the logits are computed again in the backward, the shard must live until then.
    - V in the costs is the rank's own. The reference gathers the whole problem, and solves it on every rank.

    Differentiable once, backwards: a second derivative raises RuntimeError, forward mode NotImplementedError.

    Raises ValueError for shapes, dtypes and constants that don't fit, and on the CPU for a target out of range, naming
    its value and position (elsewhere an assertion on the device, since the host doesn't wait).
    """
    check_tensors(hidden, weight, targets, bias, class_weights, token_weights, shard)
    check_perturbation(loss, perturbed_hidden, hidden, softcap)
    if shard is None:
        shard = VocabShard(0, len(weight), len(weight))
    tau, rho, nu = (loss.tau, loss.rho, loss.nu) if isinstance(loss, CompSum) else (1.0, 1.0, 0.0)
    terms = Terms(shard.vocab_size, ignore_index, shift, tau, label_smoothing, z_loss, softcap, temperature)
    check_terms(terms, reduction, outputs, weight_grad_dtype, filter_bound)
    names = tuple(dict.fromkeys(outputs))
    if shard.ranks == 1:
        check_shard(shard, weight)
    terms = replace(terms, temperature=temperature * rho)
    needed = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in (hidden, weight, bias)]
    if perturbed_hidden is not None:
        # Both parts of the loss have gradients of these: added up before they are rounded.
        dtype = arithmetic_dtype(hidden, weight)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    runs = choose(implementation, hidden, weight, targets.numel())
    if runs == "reference":
        value, extras = _reference(
            hidden, weight, bias, class_weights, targets, token_weights, terms, reduction, names, shard,
            perturbed_hidden, nu,
        )  # fmt: skip
        ran = f"reference, {2 + 2 * (needed[0] + needed[1])} NVD"
        return LossOutput(value, ran, **extras)

    refuse_forward_mode(hidden, weight, bias)
    value, *rest = loss_operator(
        hidden,
        weight,
        bias,
        class_weights,
        targets,
        token_weights,
        shard.key,
        terms.vocab_size,
        terms.ignore_index,
        terms.shift,
        terms.tau,
        terms.label_smoothing,
        terms.z_loss,
        terms.softcap,
        terms.temperature,
        reduction,
        ",".join(names),
        weight_grad_dtype,
        runs == "triton",
        filter_bound,
        filter_weight,
        needed,
    )
    extras = {name: output for name, output in zip(OUTPUTS, rest, strict=False) if name in names}
    share = (rest[-1] if runs == "triton" else value.new_ones(())) if filter_bound else None
    if perturbed_hidden is not None:
        value = value + nu * _adversarial_part(
            hidden, perturbed_hidden, weight, targets, token_weights, class_weights, terms, reduction, shard
        )
    name = f"triton for {target(hidden.device)}" if runs == "triton" else "blocked"
    formed = runs == "blocked" and reduction != "none"
    return LossOutput(value, f"{name}, {_account(needed, formed)}", kept_share=share, **extras)


def _account(needed: Sequence[bool], formed: bool) -> str:
    """Where the gradients are formed, and the cost."""
    products = 2 * (needed[0] + needed[1])
    if not any(needed):
        return "2 NVD"
    return f"formed in the forward, {2 + products} NVD" if formed else f"recomputed in the backward, {4 + products} NVD"


def _reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    class_weights: Tensor | None,
    targets: Tensor,
    token_weights: Tensor | None,
    terms: Terms,
    reduction: str,
    names: Sequence[str],
    shard: VocabShard,
    perturbed: Tensor | None,
    nu: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and outputs in the shapes of the interface."""
    check_shard(shard, weight)
    check_targets(targets, terms)
    rows = hidden.reshape(-1, hidden.shape[-1])
    moved = None if perturbed is None else perturbed.reshape(rows.shape)
    if shard.ranks > 1:
        if moved is not None and shard.sequence_parallel:
            moved = whole_hidden(moved, shard)
        rows, weight, bias = gather_problem(rows, weight, bias, shard)
    flat, weights = flatten(targets, token_weights, terms)
    value, extras = reference_loss(rows, weight, bias, class_weights, flat, weights, terms, reduction, names, moved, nu)
    shaped = {name: output.reshape(targets.shape) for name, output in extras.items()}
    return value.reshape(targets.shape) if reduction == "none" else value, shaped


def _adversarial_part(
    hidden: Tensor,
    perturbed: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    class_weights: Tensor | None,
    terms: Terms,
    reduction: str,
    shard: VocabShard,
) -> Tensor:
    """The change of the margins, weighted and reduced as the loss is."""
    flat, weights = flatten(targets, token_weights, terms)
    rows = hidden.reshape(-1, hidden.shape[-1])
    changes = margin_changes(rows, perturbed.reshape(rows.shape), weight, flat, terms, shard)
    part, _ = reduce(changes, flat, weights, class_weights, terms, reduction)
    return part.reshape(targets.shape) if reduction == "none" else part
