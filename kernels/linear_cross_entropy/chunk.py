"""The arithmetic of one chunk: logits, then their softmax, then their gradient, each written over the one before.

Two cancellations are avoided: the label's entry of the gradient, p − 1, is minus the sum of the other probabilities,
and the loss of a likely label is −log1p of minus that sum.

Where ranks share the vocabulary, a rank's columns go through the same steps; between the softmax, which is then that of
the rank's columns alone, and the rest stands vocab_parallel.py.
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
class Softmax:
    """Per-token facts, each (n, 1), of the softmax over all columns or over those of one rank.

    Over one rank's columns what concerns the label means nothing where the label isn't among them, but that `others`,
    the sum of the probabilities of all other tokens, is always the rank's.
    """

    largest_logit: Tensor
    max_prob: Tensor
    label_logit: Tensor
    label_probability: Tensor
    others: Tensor
    mean_logit: Tensor | None
    entropy: Tensor | None
    correct: Tensor | None


@dataclass
class ChunkStatistics:
    """Per-token facts of a chunk, each (n, 1): what the losses and the gradients need of the logits.

    With a shared vocabulary the columns here hold their own softmax; times `share`, the probability that falls to this
    rank, it is the whole one's. `mine` says whether the label is among the columns. One rank alone: both None.
    """

    label_probability: Tensor
    other_probability: Tensor
    surprise: Tensor
    lse: Tensor
    smoothing_loss: Tensor | None
    outputs: dict[str, Tensor]
    share: Tensor | None = None
    mine: Tensor | None = None

    def losses(self, terms: Terms) -> Tensor:
        losses = self.surprise
        if self.smoothing_loss is not None:
            losses = (1.0 - terms.label_smoothing) * losses + terms.label_smoothing * self.smoothing_loss
        if terms.z_loss:
            losses = losses + terms.z_loss * self.lse.square()
        return losses


def replace_by_softmax(
    logits: Tensor, labels: Tensor, mine: Tensor | None, terms: Terms, outputs: Sequence[str]
) -> Softmax:
    """Overwrites logits (n, columns) by their softmax, with 0 at the labels.

    labels (n, 1) are columns; where `mine` (n, 1) is given and False, any column will do. No columns: no probability.
    """
    if not logits.shape[1]:
        return _softmax_of_nothing(logits, terms, outputs)
    label_logit = logits.gather(1, labels)
    largest = logits.amax(1, keepdim=True)
    mean_logit = logits.mean(1, keepdim=True) if terms.label_smoothing else None
    correct = logits.argmax(1, keepdim=True) == labels if "correct" in outputs else None
    if mine is not None:
        # One rank's columns may all be masked out by a bias of −inf. Any finite softmax will do: its share is 0.
        logits[:, :1].masked_fill_(largest == float("-inf"), 0.0)
    # torch's softmax has read a row's maximum and sum before it writes the row, so it may write where it reads.
    probabilities = torch.softmax(logits, -1, out=logits)
    max_prob = probabilities.amax(1, keepdim=True)
    entropy = torch.special.entr(probabilities).sum(1, keepdim=True) if "entropy" in outputs else None
    label_probability = probabilities.gather(1, labels)
    if mine is None:
        probabilities.scatter_(1, labels, 0.0)
    else:
        probabilities.scatter_(1, labels, label_probability.masked_fill(mine, 0.0))
    others = probabilities.sum(1, keepdim=True)
    return Softmax(largest, max_prob, label_logit, label_probability, others, mean_logit, entropy, correct)


def _softmax_of_nothing(logits: Tensor, terms: Terms, outputs: Sequence[str]) -> Softmax:
    """Of a rank with nothing but padding: with −inf for its largest logit, its share of the probability will be 0."""
    zeros = logits.new_zeros(len(logits), 1)
    return Softmax(
        largest_logit=zeros - float("inf"),
        max_prob=zeros + 1.0,
        label_logit=zeros,
        label_probability=zeros,
        others=zeros,
        mean_logit=zeros if terms.label_smoothing else None,
        entropy=zeros if "entropy" in outputs else None,
        correct=zeros.bool() if "correct" in outputs else None,
    )


def draw_statistics(softmax: Softmax, outputs: Sequence[str]) -> ChunkStatistics:
    """What follows from the softmax over all columns."""
    largest, others = softmax.largest_logit, softmax.others
    log_sum = -softmax.max_prob.log()  # log Σ exp(logit − largest): the likeliest token's term of the sum is 1
    surprise = torch.where(others < 0.5, -torch.log1p(-others), (largest - softmax.label_logit) + log_sum)
    lse = largest + log_sum
    every = {
        "lse": lse,
        "logprob": -surprise,
        "entropy": softmax.entropy,
        "max_prob": softmax.max_prob,
        "correct": softmax.correct,
    }
    return ChunkStatistics(
        label_probability=softmax.label_probability,
        other_probability=others,
        surprise=surprise,
        lse=lse,
        smoothing_loss=None if softmax.mean_logit is None else (largest - softmax.mean_logit) + log_sum,
        outputs={name: value for name in outputs if (value := every[name]) is not None},
    )


def replace_by_gradient(
    probabilities: Tensor, labels: Tensor, chunk: ChunkStatistics, terms: Terms, slope: Tensor | None
) -> None:
    """Overwrites the softmax by the derivative of each token's loss by its logits (times temperature).

    (1 + 2·z_loss·lse)·p − (1 − smoothing)·onehot − smoothing / V, times the softcap's slope.
    """
    if not probabilities.shape[1]:
        return
    label_gradient = -chunk.other_probability
    factor = chunk.share
    if terms.z_loss:
        pull = 2.0 * terms.z_loss * chunk.lse
        factor = 1.0 + pull if factor is None else factor * (1.0 + pull)
        label_gradient = label_gradient + pull * chunk.label_probability
    if factor is not None:
        probabilities.mul_(factor)
    if terms.label_smoothing:
        share = terms.label_smoothing / terms.vocab_size
        probabilities.sub_(share)
        label_gradient = label_gradient + (terms.label_smoothing - share)
    if chunk.mine is not None:
        label_gradient = torch.where(chunk.mine, label_gradient, probabilities.gather(1, labels))
    probabilities.scatter_(1, labels, label_gradient)
    if slope is not None:
        probabilities.mul_(slope)
