"""The exact target: full logits in float64, plain torch, gradients by autograd. Memory N × V, several times over."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .types import Terms


def reference_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    class_weights: Tensor | None,
    targets: Tensor,
    token_weights: Tensor | None,
    terms: Terms,
    reduction: str,
    outputs: Sequence[str],
    perturbed: Tensor | None = None,
    nu: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and outputs, all float64, of hidden (N, D), weight (rows, D), bias (rows,), targets and token_weights (N,)
    after the shift.

    Written to be read against the formulas of `linear_cross_entropy`, not to be fast; nothing is shared with the
    blocked implementation that it judges.
    """
    index = (targets != terms.ignore_index).nonzero().squeeze(1)
    kept, matrix = targets[index], weight[: terms.vocab_size].double()
    logits = hidden[index].double() @ matrix.T
    if bias is not None:
        logits = logits + bias[: terms.vocab_size].double()
    if terms.softcap is not None:
        logits = terms.softcap * torch.tanh(logits / terms.softcap)
    logits = logits / terms.temperature
    classes = torch.ones_like(matrix[:, 0].detach()) if class_weights is None else class_weights.double()

    lse = torch.logsumexp(logits, dim=-1)
    log_probs = torch.log_softmax(logits, dim=-1)
    label_log_probs = log_probs.gather(1, kept[:, None]).squeeze(1)
    losses = (1 - terms.label_smoothing) * classes[kept] * _comp_sum(label_log_probs, terms.tau)
    if terms.label_smoothing:  # the mean of the loss, were each token the label
        losses = losses + terms.label_smoothing * (classes * _comp_sum(log_probs, terms.tau)).mean(dim=-1)
    losses = losses + terms.z_loss * lse.square()
    if perturbed is not None:
        change = (perturbed[index].double() - hidden[index].double()) @ matrix.T
        margins = change.gather(1, kept[:, None]) - change
        losses = losses + nu * torch.linalg.vector_norm(margins, dim=-1)

    weights = classes[kept]
    if token_weights is not None:
        losses = losses * token_weights[index].double()
        weights = weights * token_weights[index].double()

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(targets.shape).index_put((index,), values)

    if reduction == "none":
        loss = spread(losses)
    else:
        loss = losses.sum()
        if reduction == "mean":
            divisor = weights.sum()
            loss = loss * torch.where(divisor == 0, torch.zeros_like(divisor), 1 / divisor)

    best = logits.argmax(dim=-1, keepdim=True)
    every = {
        "lse": lambda: lse,
        "logprob": lambda: label_log_probs,
        # exp(log p)·log p is 0 · −inf, hence NaN, for a token that a bias of −inf masks out.
        "entropy": lambda: torch.special.entr(log_probs.exp()).sum(dim=-1),
        "max_prob": lambda: log_probs.gather(1, best).squeeze(1).exp(),
        "correct": lambda: best.squeeze(1) == kept,
    }
    return loss, {name: spread(every[name]()) for name in outputs}


def _comp_sum(log_probs: Tensor, tau: float) -> Tensor:
    """(1 − p^(tau − 1)) / (tau − 1)."""
    if tau == 1.0:
        return -log_probs
    exponents = (tau - 1.0) * log_probs
    # expm1's own derivative is formed as expm1 + 1, which has no digits left where the exponential is small.
    small = exponents.clamp(max=-1.0).exp() - 1.0
    return -torch.where(exponents < -1.0, small, exponents.clamp(min=-1.0).expm1()) / (tau - 1.0)
