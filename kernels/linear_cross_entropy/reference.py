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
    targets: Tensor,
    token_weights: Tensor | None,
    terms: Terms,
    reduction: str,
    outputs: Sequence[str],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and outputs, all float64, of hidden (N, D), weight (rows, D), bias (rows,), targets and token_weights (N,).

    Written to be read against the formulas of `linear_cross_entropy`, not to be fast; nothing is shared with the
    blocked implementation that it judges.
    """
    index = (targets != terms.ignore_index).nonzero().squeeze(1)
    kept = targets[index]
    logits = hidden[index].double() @ weight[: terms.vocab_size].double().T
    if bias is not None:
        logits = logits + bias[: terms.vocab_size].double()
    if terms.softcap is not None:
        logits = terms.softcap * torch.tanh(logits / terms.softcap)
    logits = logits / terms.temperature

    lse = torch.logsumexp(logits, dim=-1)
    log_probs = torch.log_softmax(logits, dim=-1)
    logprob = log_probs.gather(1, kept[:, None]).squeeze(1)
    losses = (1 - terms.label_smoothing) * -logprob + terms.z_loss * lse.square()
    if terms.label_smoothing:
        losses = losses + terms.label_smoothing * -log_probs.mean(dim=-1)
    divisor = torch.tensor(float(len(index)), dtype=torch.float64, device=losses.device)
    if token_weights is not None:
        kept_weights = token_weights[index].double()
        losses, divisor = losses * kept_weights, kept_weights.sum()

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(targets.shape).index_put((index,), values)

    if reduction == "none":
        loss = spread(losses)
    else:
        loss = losses.sum()
        if reduction == "mean":
            loss = loss * torch.where(divisor == 0, torch.zeros_like(divisor), 1 / divisor)

    probs = log_probs.detach().exp()
    every = {
        "lse": lse.detach,
        "logprob": logprob.detach,
        "entropy": lambda: torch.special.entr(probs).sum(dim=-1),
        "max_prob": lambda: probs.amax(dim=-1),
        "correct": lambda: logits.detach().argmax(dim=-1) == kept,
    }
    return loss, {name: spread(every[name]()) for name in outputs}
