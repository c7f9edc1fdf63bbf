"""Arithmetic of boxes: which part of a tensor lies where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Box:
    """An axis-aligned box of a tensor: where it starts and how far it reaches in each dimension; () is a scalar."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box as an index into the global tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offsets, self.shape, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """The part that both boxes have, in the coordinates of the global tensor; None where there is none."""
        starts = tuple(map(max, self.offsets, other.offsets))
        stops = [min(self._stop(d), other._stop(d)) for d in range(len(starts))]
        shape = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
        return Box(starts, shape) if all(size > 0 for size in shape) else None

    def slices_in(self, outer: Box) -> tuple[slice, ...]:
        """How to index the tensor that holds `outer` to get this box, which lies inside it."""
        return tuple(
            slice(start - base, start - base + size)
            for start, base, size in zip(self.offsets, outer.offsets, self.shape, strict=True)
        )

    def _stop(self, dimension: int) -> int:
        return self.offsets[dimension] + self.shape[dimension]


def cover_problem(global_shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """Why `boxes` are not a tiling of the tensor, each element in exactly one; None where they are."""
    whole = tuple(global_shape)
    for box in boxes:
        inside = len(box.offsets) == len(box.shape) == len(whole) and all(
            offset + size <= limit for offset, size, limit in zip(box.offsets, box.shape, whole, strict=True)
        )
        if not inside:
            return f"the part {box.shape} at {box.offsets} does not lie inside the shape {whole}"
    overlap = _find_overlap(boxes)
    if overlap:
        first, second = overlap
        return f"the parts {first.shape} at {first.offsets} and {second.shape} at {second.offsets} overlap"
    stored, wanted = sum(box.elements for box in boxes), prod(whole)
    return None if stored == wanted else f"only {stored} of its {wanted} elements are there"


def _find_overlap(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Sweep along the first dimension, in which most layouts cut: close to linear for them."""
    ordered = sorted((box for box in boxes if box.elements), key=lambda box: box.offsets)
    if ordered and not ordered[0].shape:
        return (ordered[0], ordered[1]) if len(ordered) > 1 else None
    active: list[Box] = []
    for box in ordered:
        active = [earlier for earlier in active if earlier._stop(0) > box.offsets[0]]
        for earlier in active:
            if earlier.intersect(box):
                return earlier, box
        active.append(box)
    return None
