"""The arithmetic of one chunk: logits, then their softmax, then their gradient, each written over the one before.

Two cancellations are avoided: the label's entry of the gradient, p − 1, is minus the sum of the other probabilities,
and the loss of a likely label is −log1p of minus that sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .types import Terms


def write_logits(
    chosen: Tensor, matrix: Tensor, offsets: Tensor | None, terms: Terms, logits: Tensor, slope: Tensor | None
) -> None:
    """Writes the final logits, after softcap and temperature, and the softcap's derivative 1 − tanh²."""
    if offsets is None:
        torch.mm(chosen, matrix.t(), out=logits)
    else:
        torch.addmm(offsets, chosen, matrix.t(), out=logits)
    scale = 1.0 / terms.temperature
    if terms.softcap is not None:
        logits.div_(terms.softcap).tanh_()
        if slope is not None:
            torch.mul(logits, logits, out=slope).neg_().add_(1.0)
        scale *= terms.softcap
    if scale != 1.0:
        logits.mul_(scale)


@dataclass
class ChunkStatistics:
    """Per-token facts of a chunk, each (n, 1): what the losses and the gradients need of the logits."""

    label_probability: Tensor
    other_probability: Tensor
    surprise: Tensor
    lse: Tensor
    smoothing_loss: Tensor | None
    outputs: dict[str, Tensor]

    def losses(self, terms: Terms) -> Tensor:
        losses = self.surprise
        if self.smoothing_loss is not None:
            losses = (1.0 - terms.label_smoothing) * losses + terms.label_smoothing * self.smoothing_loss
        if terms.z_loss:
            losses = losses + terms.z_loss * self.lse.square()
        return losses


def replace_by_softmax(logits: Tensor, labels: Tensor, terms: Terms, outputs: Sequence[str]) -> ChunkStatistics:
    """Overwrites logits by their softmax, with 0 at the labels, and returns the statistics of the chunk."""
    label_logit = logits.gather(1, labels)
    largest = logits.amax(1, keepdim=True)
    mean_logit = logits.mean(1, keepdim=True) if terms.label_smoothing else None
    correct = logits.argmax(1, keepdim=True) == labels if "correct" in outputs else None
    # torch's softmax has read a row's maximum and sum before it writes the row, so it may write where it reads.
    probabilities = torch.softmax(logits, -1, out=logits)
    max_prob = probabilities.amax(1, keepdim=True)
    log_sum = -max_prob.log()  # log Σ exp(logit − largest): the likeliest token's term of the sum is 1
    entropy = torch.special.entr(probabilities).sum(1, keepdim=True) if "entropy" in outputs else None
    label_probability = probabilities.gather(1, labels)
    probabilities.scatter_(1, labels, 0.0)
    others = probabilities.sum(1, keepdim=True)
    surprise = torch.where(others < 0.5, -torch.log1p(-others), (largest - label_logit) + log_sum)
    lse = largest + log_sum
    every = {"lse": lse, "logprob": -surprise, "entropy": entropy, "max_prob": max_prob, "correct": correct}
    return ChunkStatistics(
        label_probability=label_probability,
        other_probability=others,
        surprise=surprise,
        lse=lse,
        smoothing_loss=None if mean_logit is None else (largest - mean_logit) + log_sum,
        outputs={name: value for name in outputs if (value := every[name]) is not None},
    )


def replace_by_gradient(
    probabilities: Tensor, labels: Tensor, chunk: ChunkStatistics, terms: Terms, slope: Tensor | None
) -> None:
    """Overwrites the softmax by the derivative of each token's loss by its logits (times temperature).

    (1 + 2·z_loss·lse)·p − (1 − smoothing)·onehot − smoothing / V, times the softcap's slope.
    """
    label_gradient = -chunk.other_probability
    if terms.z_loss:
        pull = 2.0 * terms.z_loss * chunk.lse
        probabilities.mul_(1.0 + pull)
        label_gradient = label_gradient + pull * chunk.label_probability
    if terms.label_smoothing:
        share = terms.label_smoothing / terms.vocab_size
        probabilities.sub_(share)
        label_gradient = label_gradient + (terms.label_smoothing - share)
    probabilities.scatter_(1, labels, label_gradient)
    if slope is not None:
        probabilities.mul_(slope)
