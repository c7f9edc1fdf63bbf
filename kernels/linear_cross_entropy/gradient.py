"""The arithmetic of one chunk's gradient, written over the softmax.

With p the softmax, w the class weights, ε the label smoothing and P = p^(tau − 1), which is 1 for the cross-entropy,
the derivative of a token's loss by its logit k is

    (E + F)·p_k − E·[k is the label] − ε/V·w_k·P_k
    E = (1 − ε)·w_label·P_label,   F = ε/V·Σ w·P + 2·z_loss·lse

and what reaches its outputs from above joins E (logprob) and F (lse, entropy, max_prob).

A cancellation is avoided: the label's p − 1 is minus the sum of the other probabilities.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .chunk import ChunkStatistics


class Upstream(NamedTuple):
    """What reaches each token's loss and outputs from above, (N,), or (n, 1) of a chunk.

    None is 1 for the loss, and 0 for the others.
    """

    loss: Tensor | None = None
    lse: Tensor | None = None
    logprob: Tensor | None = None
    entropy: Tensor | None = None
    max_prob: Tensor | None = None


class Coefficients(NamedTuple):
    """What makes a chunk's gradient of its softmax, each (n, 1) or a number."""

    label: Tensor | float
    """E: of p − onehot."""
    rest: Tensor | float
    """F: of p."""
    smoothing: Tensor | float = 0.0
    """ε/V: of −w·P."""
    entropy: Tensor | None = None
    """Of −p·log p."""
    max_prob: Tensor | None = None
    """Of the largest p's onehot."""
    rows: Tensor | None = None
    """Of each whole row; None for 1. Cheaper applied to (n, D) than to (n, columns)."""


def weigh(chunk: ChunkStatistics, upstream: Upstream) -> Coefficients:
    """The coefficients of the gradient of Σ upstream · (loss and outputs)."""
    terms, whole = chunk.terms, chunk.whole
    loss_alone = all(value is None for value in upstream[1:])
    loss: Tensor | float = 1.0 if loss_alone or upstream.loss is None else upstream.loss
    rows = upstream.loss if loss_alone else None

    label = loss * (1.0 - terms.label_smoothing) * chunk.label_weight()
    if upstream.logprob is not None:
        label = label - upstream.logprob
    parts: list[Tensor | float] = []
    if terms.label_smoothing:
        parts.append(loss * terms.label_smoothing * chunk.smoothing_weight())
    if terms.z_loss:
        parts.append(loss * (2.0 * terms.z_loss) * chunk.lse)
    if upstream.lse is not None:
        parts.append(upstream.lse)
    if upstream.entropy is not None:
        assert whole.entropy is not None
        parts.append(-upstream.entropy * whole.entropy)
    if upstream.max_prob is not None:
        parts.append(-upstream.max_prob * whole.max_prob)
    if not parts:
        # Then E is of the whole row, and nothing has to be written but the softmax and the label's own entry.
        if isinstance(label, Tensor):
            rows = label if rows is None else label * rows
        return Coefficients(1.0, 0.0, rows=rows)
    return Coefficients(
        label=label,
        rest=sum(parts[1:], parts[0]),
        smoothing=loss * (terms.label_smoothing / terms.vocab_size),
        entropy=upstream.entropy,
        max_prob=None if upstream.max_prob is None else upstream.max_prob * whole.max_prob,
        rows=rows,
    )


def label_entry(chunk: ChunkStatistics, coefficients: Coefficients) -> Tensor:
    """(n, 1): the derivative by the label's own logit, but for the factors of the rows and for `max_prob`."""
    whole = chunk.whole
    entry = coefficients.rest * whole.label_probability - coefficients.label * whole.others
    if coefficients.entropy is not None:
        entry = entry + coefficients.entropy * torch.special.entr(whole.label_probability)
    if chunk.terms.label_smoothing:
        entry = entry - coefficients.smoothing * chunk.label_weight()
    return entry


def replace_by_gradient(
    buffers: dict[str, Tensor], labels: Tensor, chunk: ChunkStatistics, coefficients: Coefficients
) -> None:
    """Overwrites the softmax by the derivative by the logits (times temperature), but for the factors of the rows."""
    probabilities, whole = buffers["logits"], chunk.whole
    if not probabilities.shape[1]:
        return
    label, rest, smoothing, entropy, max_prob, _ = coefficients
    label_gradient = label_entry(chunk, coefficients)
    scale = label + rest
    if chunk.share is not None:
        scale = scale * chunk.share.probability
    if entropy is not None:
        terms = buffers["scratch"]
        torch.mul(probabilities, 1.0 if chunk.share is None else chunk.share.probability, out=terms)
        torch.special.entr(terms, out=terms).mul_(entropy)
    if isinstance(scale, Tensor) or not math.isclose(scale, 1.0):
        probabilities.mul_(scale)
    if entropy is not None:
        probabilities.add_(terms)
    if chunk.terms.label_smoothing:
        _subtract_smoothing(probabilities, buffers.get("powers"), chunk, smoothing)
    if chunk.mine is not None:
        label_gradient = torch.where(chunk.mine, label_gradient, probabilities.gather(1, labels))
    probabilities.scatter_(1, labels, label_gradient)
    if max_prob is not None:
        assert whole.top is not None
        probabilities.scatter_add_(1, whole.top, max_prob if whole.top_here is None else max_prob * whole.top_here)
    if "slope" in buffers:
        probabilities.mul_(buffers["slope"])


def _subtract_smoothing(
    probabilities: Tensor, powers: Tensor | None, chunk: ChunkStatistics, smoothing: Tensor | float
) -> None:
    """Subtracts smoothing · w·P."""
    if powers is not None:
        if chunk.share is not None:  # the powers are those of the rank's own softmax
            assert chunk.share.power is not None
            smoothing = smoothing * chunk.share.power
        if chunk.classes is not None:
            powers.mul_(chunk.classes.columns)
        probabilities.sub_(powers.mul_(smoothing))
    elif chunk.classes is None:
        probabilities.sub_(smoothing)
    elif isinstance(smoothing, Tensor):
        probabilities.addr_(smoothing.squeeze(1), chunk.classes.columns, alpha=-1)
    else:
        probabilities.sub_(smoothing * chunk.classes.columns)
