"""Where a rank's part of a parameter lies in the global tensor, and the boxes that a flat range of it is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from torch import nn

from .tensor import TensorParallel


@dataclass(frozen=True)
class Placement:
    """A tensor-parallel rank's box of a parameter. Padding rows, the last ones of a table, belong to no box."""

    global_shape: tuple[int, ...]
    """Of the whole parameter, without padding."""
    offsets: tuple[int, ...]
    """Where the box starts in it."""
    shape: tuple[int, ...]
    """The box's shape; the local tensor may have more rows, which are padding. May have no rows."""
    sharded: bool
    """Whether the tensor-parallel ranks hold different boxes; otherwise each has all of it."""

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box as an index into the global tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offsets, self.shape, strict=True))


def place_parameters(
    model: nn.Module, tensor: TensorParallel, real_rows: Mapping[str, int] | None = None
) -> dict[str, Placement]:
    """The placement of every parameter of `model` by name, tied ones once, from the modules' `tensor_sharded`.

    `real_rows`: of tables padded at the end, how many rows there are in all.
    """
    dimensions: dict[str, int] = {}
    for prefix, module in model.named_modules():
        for name, dimension in getattr(module, "tensor_sharded", {}).items():
            dimensions[f"{prefix}.{name}" if prefix else name] = dimension
    placements = {}
    for name, parameter in model.named_parameters():
        local = tuple(getattr(parameter, "ds_shape", parameter.shape))  # what DeepSpeed divided further looks empty
        dimension = dimensions.get(name) if tensor.size > 1 else None
        offsets = [0] * len(local)
        whole = list(local)
        if dimension is not None:
            offsets[dimension] = local[dimension] * tensor.rank
            whole[dimension] = local[dimension] * tensor.size
        shape = list(local)
        if real_rows is not None and name in real_rows:
            whole[0] = real_rows[name]
            offsets[0] = min(offsets[0], whole[0])
            shape[0] = min(shape[0], whole[0] - offsets[0])
        placements[name] = Placement(tuple(whole), tuple(offsets), tuple(shape), dimension is not None)
    return placements


def flat_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """(offsets, sizes, first element) of boxes that together are elements [start, stop) of a row-major tensor.

    Of a matrix at most three: the rest of a row, whole rows, the beginning of a row.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield (start,) * len(shape), (stop - start,) * len(shape), start
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # inside one row
        for offsets, sizes, begin in flat_boxes(shape[1:], start - last * row, stop - last * row):
            yield (last, *offsets), (1, *sizes), begin + last * row
        return
    if start < first * row:
        above = first - 1
        for offsets, sizes, begin in flat_boxes(shape[1:], start - above * row, row):
            yield (above, *offsets), (1, *sizes), begin + above * row
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:]), first * row
    if last * row < stop:
        for offsets, sizes, begin in flat_boxes(shape[1:], 0, stop - last * row):
            yield (last, *offsets), (1, *sizes), begin + last * row
