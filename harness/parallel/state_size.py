"""How much of a model's training state one rank holds: what is divided by data-parallel ranks, and how it is padded.

Counted from DeepSpeed 0.19's code, whose padding and buffers stages 1 to 3 have; a test compares with real engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .config import ParallelSection

FP32_BYTES = 4
ALIGNMENT = 2
"""Stages 1 and 2 pad a parameter group to a multiple of this times the number of data-parallel ranks."""


@dataclass(frozen=True)
class StatePart:
    """Memory of one kind on one rank."""

    kind: str
    """weights, masters, moments, gradients or buffers; a kind may have several parts."""
    elements: int
    element_bytes: int
    divided: bool
    """Whether the data-parallel ranks hold a share each."""
    remark: str = ""

    @property
    def bytes(self) -> int:
        return self.elements * self.element_bytes


def state_parts(
    groups: Sequence[Sequence[int]], precision: str, section: ParallelSection, data_size: int, data_rank: int
) -> list[StatePart]:
    """What a rank holds between a step's micro-batches, by kind.

    groups: the sizes of the parameters, as they lie on this tensor-parallel rank with their padding, by the
    optimizer's groups and in its order.
    """
    small = 2 if precision == "bf16" else FP32_BYTES
    if section.zero_stage == 0:
        return _whole(sum(map(sum, groups)), small)
    if section.zero_stage == 3:
        return _by_parameter(groups, small, section, data_size)
    return _by_group(groups, small, section, data_size, data_rank)


def stays_whole(elements: int, section: ParallelSection) -> bool:
    """Whether a parameter of so many elements is on every data-parallel rank at stage 3."""
    return elements <= section.zero.keep_whole_below


def _whole(elements: int, small: int) -> list[StatePart]:
    """Stage 0. In fp32 the weights are the masters."""
    return [
        StatePart("weights", elements, small, divided=False),
        *([StatePart("masters", elements, FP32_BYTES, divided=False)] if small != FP32_BYTES else []),
        StatePart("moments", elements, 2 * FP32_BYTES, divided=False),
        StatePart("gradients", elements, FP32_BYTES, divided=False),
    ]


def _by_group(
    groups: Sequence[Sequence[int]], small: int, section: ParallelSection, data_size: int, data_rank: int
) -> list[StatePart]:
    """Stages 1 and 2: each group is laid end to end, padded, and cut into equal shares."""
    elements = sum(map(sum, groups))
    shares = [-(-sum(group) // (ALIGNMENT * data_size)) * ALIGNMENT for group in groups]
    share, padded = sum(shares), sum(shares) * data_size
    parts = [
        StatePart("weights", padded, small, divided=False),
        StatePart("masters", share, FP32_BYTES, divided=True),
        StatePart("moments", share, 2 * FP32_BYTES, divided=True),
    ]
    if section.zero_stage == 1 and small != FP32_BYTES:
        return [
            *parts,
            StatePart("gradients", padded, FP32_BYTES, divided=False, remark="their sum"),
            StatePart("gradients", elements, small, divided=False, remark="of a micro-batch"),
        ]
    if section.zero_stage == 1:
        gradients = StatePart("gradients", elements, FP32_BYTES, divided=False)
    elif small != FP32_BYTES:
        gradients = StatePart("gradients", share, FP32_BYTES, divided=True)
    else:  # of a parameter that crosses the share's border all is kept
        touched = sum(_touched(group, size, data_rank) for group, size in zip(groups, shares, strict=True))
        gradients = StatePart("gradients", touched, FP32_BYTES, divided=True)
    copies = 2 if section.zero.overlap else 1
    buffers = StatePart(
        "buffers", copies * section.zero.bucket_elements, small, divided=False, remark="parallel.zero.bucket_elements"
    )
    return [*parts, gradients, buffers]


def _touched(group: Sequence[int], share: int, data_rank: int) -> int:
    """Elements of the parameters that begin, end or lie in a rank's share of a group."""
    start, stop, position, touched = data_rank * share, (data_rank + 1) * share, 0, 0
    for size in group:
        if position < stop and position + size > start:
            touched += size
        position += size
    return touched


def _by_parameter(
    groups: Sequence[Sequence[int]], small: int, section: ParallelSection, data_size: int
) -> list[StatePart]:
    """Stage 3: each parameter is padded and cut into equal shares; small ones are kept whole beside their share."""
    sizes = [size for group in groups for size in group]
    share = sum(-(-size // data_size) for size in sizes)
    whole = sum(size for size in sizes if stays_whole(size, section))
    gathered = min(section.zero.live_elements, sum(sizes) - whole)
    return [
        StatePart("weights", share, small, divided=True),
        StatePart("weights", whole, small, divided=False, remark="parallel.zero.keep_whole_below"),
        StatePart("weights", gathered, small, divided=False, remark="gathered, at most (parallel.zero.live_elements)"),
        StatePart("masters", share, FP32_BYTES, divided=True),
        StatePart("moments", share, 2 * FP32_BYTES, divided=True),
        StatePart("gradients", share, FP32_BYTES, divided=True),
        StatePart(
            "buffers", section.zero.bucket_elements, FP32_BYTES, divided=False, remark="parallel.zero.bucket_elements"
        ),
    ]
