"""The arithmetic of one chunk up to its losses: logits, then their softmax, written over them.

A cancellation is avoided: the loss of a likely label is −log1p of minus the sum of the other probabilities.

Where ranks share the vocabulary, a rank's columns go through the same steps; between the softmax, which is then that of
the rank's columns alone, and the rest stands vocab_parallel.py.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .types import Terms


class ClassWeights(NamedTuple):
    """Those of this rank's columns (columns,), the sum over the whole vocabulary, and those of the labels (n, 1)."""

    columns: Tensor
    total: Tensor
    labels: Tensor


class Buffers:
    """What a chunk is computed in: (tokens, columns) each, made once a pass over the tokens."""

    def __init__(self, tokens: int, like: Tensor, columns: int, **wanted: bool) -> None:
        """`wanted`: of slope (the softcap's), powers (p^(tau − 1)) and scratch (for the entropy)."""
        self._whole = {
            name: like.new_empty((tokens, columns)) for name in ("logits", *wanted) if wanted.get(name, True)
        }

    def of(self, tokens: int) -> dict[str, Tensor]:
        """Their first rows."""
        return {name: buffer[:tokens] for name, buffer in self._whole.items()}


def write_logits(
    chosen: Tensor, matrix: Tensor, offsets: Tensor | None, terms: Terms, buffers: dict[str, Tensor]
) -> None:
    """Writes the final logits, after softcap and temperature, and to "slope" the softcap's derivative 1 − tanh²."""
    logits, slope = buffers["logits"], buffers.get("slope")
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
    smoothing: Tensor | None = None
    """With label smoothing: the sum of class weight times logit over vocab_size, or, unless tau is 1, times P."""
    entropy: Tensor | None = None
    top: Tensor | None = None
    """Column of the largest logit, the first of several."""
    top_here: Tensor | None = None
    """Whether that column is this rank's; None where one rank holds all."""
    correct: Tensor | None = None


def replace_by_softmax(
    buffers: dict[str, Tensor],
    labels: Tensor,
    mine: Tensor | None,
    terms: Terms,
    classes: ClassWeights | None,
    names: Collection[str],
) -> Softmax:
    """Overwrites buffers["logits"] (n, columns) by their softmax, with 0 at the labels, and "powers" by P.

    labels (n, 1) are columns; where `mine` (n, 1) is given and False, any column will do. No columns: no probability.
    `names`: the outputs that are wanted, or have an upstream gradient.
    """
    logits = buffers["logits"]
    if not logits.shape[1]:
        return softmax_of_nothing(logits, terms, names)
    label_logit = logits.gather(1, labels)
    top = logits.argmax(1, keepdim=True) if "correct" in names or "max_prob" in names else None
    largest = logits.amax(1, keepdim=True) if top is None else logits.gather(1, top)
    smoothing = _weighted_sum(logits, classes) / terms.vocab_size if terms.label_smoothing else None
    powers = buffers.get("powers")
    finite = largest
    if mine is not None:
        # One rank's columns may all be masked out by a bias of −inf. Any finite softmax will do: its share is 0.
        nothing = largest == float("-inf")
        finite = largest.masked_fill(nothing, 0.0)
        logits[:, :1].masked_fill_(nothing, 0.0)
    if powers is not None:
        torch.sub(logits, finite, out=powers)
    # torch's softmax has read a row's maximum and sum before it writes the row, so it may write where it reads.
    probabilities = torch.softmax(logits, -1, out=logits)
    max_prob = probabilities.amax(1, keepdim=True) if top is None else probabilities.gather(1, top)
    if powers is not None:
        # From the logits, not from p, which underflows where its power needn't.
        powers.add_(max_prob.log()).mul_(terms.tau - 1.0).exp_()
        smoothing = _weighted_sum(powers, classes)
    entropy = None
    if "entropy" in names:
        entropy = torch.special.entr(probabilities, out=buffers["scratch"]).sum(1, keepdim=True)
    label_probability = probabilities.gather(1, labels)
    if mine is None:
        probabilities.scatter_(1, labels, 0.0)
    else:
        probabilities.scatter_(1, labels, label_probability.masked_fill(mine, 0.0))
    return Softmax(
        largest_logit=largest,
        max_prob=max_prob,
        label_logit=label_logit,
        label_probability=label_probability,
        others=probabilities.sum(1, keepdim=True),
        smoothing=smoothing,
        entropy=entropy,
        top=top,
        correct=None if top is None else top == labels,
    )


def _weighted_sum(values: Tensor, classes: ClassWeights | None) -> Tensor:
    if classes is None:
        return values.sum(1, keepdim=True)
    return values @ classes.columns[:, None]


def softmax_of_nothing(logits: Tensor, terms: Terms, names: Collection[str]) -> Softmax:
    """Of a rank with nothing but padding: with −inf for its largest logit, its share of the probability will be 0."""
    zeros = logits.new_zeros(len(logits), 1)
    top = "correct" in names or "max_prob" in names
    return Softmax(
        largest_logit=zeros - float("inf"),
        max_prob=zeros + 1.0,
        label_logit=zeros,
        label_probability=zeros,
        others=zeros,
        smoothing=zeros if terms.label_smoothing else None,
        entropy=zeros if "entropy" in names else None,
        top=zeros.long() if top else None,
        correct=zeros.bool() if top else None,
    )


class Share(NamedTuple):
    """The probability that falls to a rank, (n, 1); and its P, where label smoothing needs it."""

    probability: Tensor
    power: Tensor | None


@dataclass
class ChunkStatistics:
    """Per-token facts of a chunk, each (n, 1): what losses, outputs and gradients need of the logits.

    With a shared vocabulary the columns here hold their own softmax; times `share`, the probability that falls to this
    rank, it is the whole one's. `mine` says whether the label is among the columns. One rank alone: both None.
    """

    whole: Softmax
    """Over all columns of all ranks."""
    terms: Terms
    classes: ClassWeights | None
    share: Share | None = None
    mine: Tensor | None = None

    def __post_init__(self) -> None:
        whole = self.whole
        # log Σ exp(logit − largest): the likeliest token's term of the sum is 1.
        self.log_sum = -whole.max_prob.log()
        self.lse = whole.largest_logit + self.log_sum
        unlikely = (whole.largest_logit - whole.label_logit) + self.log_sum
        self.surprise = torch.where(whole.others < 0.5, -torch.log1p(-whole.others), unlikely)

    def output(self, name: str) -> Tensor:
        """(n, 1) of one of OUTPUTS."""
        if name == "lse":
            return self.lse
        if name == "logprob":
            return -self.surprise
        value: Tensor = getattr(self.whole, name)
        return value

    def losses(self) -> Tensor:
        """(n, 1), before token weights."""
        terms, classes = self.terms, self.classes
        losses = self.surprise
        if terms.tau != 1.0:
            losses = torch.expm1((1.0 - terms.tau) * self.surprise) / (1.0 - terms.tau)
        if classes is not None:
            losses = losses * classes.labels
        if terms.label_smoothing:
            losses = (1.0 - terms.label_smoothing) * losses + terms.label_smoothing * self._smoothing_loss()
        if terms.z_loss:
            losses = losses + terms.z_loss * self.lse.square()
        return losses

    def _smoothing_loss(self) -> Tensor:
        """The mean over the vocabulary of class weight times loss, were each token the label."""
        assert self.whole.smoothing is not None
        if self.terms.tau != 1.0:
            return (self._mean_class_weight() - self.whole.smoothing / self.terms.vocab_size) / (self.terms.tau - 1.0)
        mean = self._mean_class_weight()
        return (mean * self.whole.largest_logit - self.whole.smoothing) + mean * self.log_sum

    def _mean_class_weight(self) -> Tensor | float:
        return 1.0 if self.classes is None else self.classes.total / self.terms.vocab_size

    def label_weight(self) -> Tensor | float:
        """w·P of the label; finite, so that it cannot make NaN of a probability of 0."""
        weight: Tensor | float = 1.0 if self.classes is None else self.classes.labels
        if self.terms.tau == 1.0:
            return weight
        power = ((1.0 - self.terms.tau) * self.surprise).exp()
        return weight * power.clamp(max=torch.finfo(power.dtype).max)

    def smoothing_weight(self) -> Tensor | float:
        """Σ w·P / V."""
        if self.terms.tau == 1.0 or self.whole.smoothing is None:
            return self._mean_class_weight()
        return self.whole.smoothing / self.terms.vocab_size
