"""The numbers a token's softmax comes down to: from the kernel's ranges of columns to one softmax, and to and from the
tensors that the backward is given."""

from __future__ import annotations

import torch
from torch import Tensor

from ..chunk import ChunkStatistics, Softmax
from ..gradient import Coefficients, label_entry
from ..types import Terms

PLANES = 7
"""Of what `pack` makes, and of what the gradient kernel reads."""


def merge_splits(
    facts: Tensor, tops: Tensor, labels: Tensor, ignored: Tensor, terms: Terms, *, entropy: bool
) -> Softmax:
    """The softmax over all columns of a rank, (N, 1) each, from the facts over ranges of them (6, splits, N).

    labels as the kernels take them. At ignored tokens, whatever their hidden states hold, all is finite and means
    nothing.
    """
    facts = facts.masked_fill(ignored, 0.0)
    largest_logits, others, label_logits, smoothings, totals, weighted = facts.unbind(0)
    others = others.masked_fill(ignored, 1.0)
    largest = largest_logits.amax(0)
    nothing = largest == float("-inf")  # all columns masked out by a bias of −inf
    finite = largest.masked_fill(nothing, 0.0)
    distances = largest_logits - finite
    fading = distances.exp()
    label_logit = label_logits.sum(0)
    label_mass = (label_logit - finite).exp().masked_fill((labels < 0) | nothing, 0.0)
    total_others = (others * fading).sum(0)
    total = (total_others + label_mass).masked_fill(nothing, 1.0)
    empty = largest_logits == float("-inf")
    smoothing = entropies = top = None
    if terms.label_smoothing and terms.tau == 1.0:
        smoothing = smoothings.sum(0) / terms.vocab_size
    elif terms.label_smoothing:
        powers = ((terms.tau - 1.0) * (distances - total.log())).exp()
        smoothing = torch.where(empty, smoothings, smoothings * powers).sum(0)
    if entropy:
        moved = distances.masked_fill(empty, 0.0)
        mean = (fading * (weighted + totals * moved)).sum(0) / total
        entropies = (total.log() - mean).clamp(min=0.0)
    if tops.shape[1]:
        first = largest_logits.argmax(0, keepdim=True)  # of equally large logits the first range's have the lowest ids
        top = tops.gather(0, first).squeeze(0).long()

    def column(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[:, None]

    return Softmax(
        largest_logit=largest[:, None],
        max_prob=(1.0 / total)[:, None],
        label_logit=label_logit[:, None],
        label_probability=(label_mass / total)[:, None],
        others=(total_others / total)[:, None],
        smoothing=column(smoothing),
        entropy=column(entropies),
        top=column(top),
        correct=None if top is None else (top == labels)[:, None],
    )


def pack(whole: Softmax) -> tuple[Tensor, Tensor]:
    """The softmax as (PLANES, N) fp32, and the columns of the largest logits that are this rank's, (N,) int32: −1 where
    they are another's; of no elements where they were not asked for."""
    values = (
        whole.largest_logit, whole.max_prob, whole.label_logit, whole.label_probability, whole.others,
        whole.smoothing, whole.entropy,
    )  # fmt: skip
    zeros = torch.zeros_like(whole.largest_logit)
    planes = torch.cat([zeros if value is None else value for value in values], dim=1).t().contiguous()
    if whole.top is None:
        return planes, zeros.new_zeros(0, dtype=torch.int32)
    top = whole.top if whole.top_here is None else whole.top.masked_fill(~whole.top_here, -1)
    return planes, top.squeeze(1).int()


def unpack(planes: Tensor, terms: Terms, *, entropy: bool) -> Softmax:
    """The inverse, but for what concerns the largest logit's column."""
    largest, max_prob, label_logit, label_probability, others, smoothing, entropies = planes[:, :, None].unbind(0)
    return Softmax(
        largest_logit=largest,
        max_prob=max_prob,
        label_logit=label_logit,
        label_probability=label_probability,
        others=others,
        smoothing=smoothing if terms.label_smoothing else None,
        entropy=entropies if entropy else None,
    )


def kernel_coefficients(chunk: ChunkStatistics, coefficients: Coefficients, ignored: Tensor) -> Tensor:
    """What gradient_kernel reads, (PLANES, N) fp32."""
    whole, rows = chunk.whole, coefficients.rows
    one = torch.ones_like(whole.largest_logit)
    rows = one if rows is None else rows

    def plane(value: Tensor | float | None) -> Tensor:
        found = torch.zeros_like(one) if value is None else one * value * rows
        return found.masked_fill(ignored[:, None], 0.0)

    smoothing = coefficients.smoothing if chunk.terms.label_smoothing else None
    planes = (
        whole.largest_logit.masked_fill(ignored[:, None], float("inf")),
        plane((coefficients.label + coefficients.rest) * whole.max_prob),
        plane(label_entry(chunk, coefficients)),
        chunk.log_sum.masked_fill(ignored[:, None], 0.0),
        plane(coefficients.entropy),
        plane(smoothing),
        plane(coefficients.max_prob),
    )
    return torch.cat(planes, dim=1).t().contiguous()
