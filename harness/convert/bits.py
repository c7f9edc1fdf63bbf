"""Every weight of two models, bit for bit, a piece at a time."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from harness.config import HarnessError
from harness.parallel import Fragment

from .source import ModelSource, decoder_shapes

_ELEMENTS = 16 << 20
"""Of a piece: 64 MiB."""


def compare_weights(source: ModelSource, result: ModelSource, rounded_to: torch.dtype | None) -> int:
    """The number of our tensors, all of which are the same in both; `rounded_to`: once the source's are rounded.

    Raises HarnessError, naming the tensor, where one is not, or holds what is no finite number.
    """
    shapes = decoder_shapes(source.section)
    for name, shape in shapes.items():
        for rows in _pieces(shape):
            ours, theirs = (_read(each, name, shape, rows) for each in (source, result))
            _check_finite(ours, f"{source.path}: tensor {name}", "the source's own")
            if rounded_to is not None:
                ours = ours.to(rounded_to).float()
                where = f"{source.path}: tensor {name}, rounded to {str(rounded_to).removeprefix('torch.')},"
                _check_finite(ours, where, "too large for it: choose another --dtype")
            if not torch.equal(ours.view(torch.int32), theirs.view(torch.int32)):
                raise HarnessError(
                    f"{source.path}: the result is not the same model, and is not kept: tensor {name} has other bits"
                )
    return len(shapes)


def _check_finite(values: Tensor, where: str, why: str) -> None:
    wrong = values.numel() - int(values.isfinite().sum())
    if wrong:
        raise HarnessError(
            f"{where} has {wrong} values that are no finite numbers ({why}); --no-proof converts it as it is"
        )


def _pieces(shape: tuple[int, ...]) -> Iterator[slice]:
    step = max(_ELEMENTS // prod(shape[1:]), 1)
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _read(source: ModelSource, name: str, shape: tuple[int, ...], rows: slice) -> Tensor:
    values = torch.empty(rows.stop - rows.start, *shape[1:])
    source.read([Fragment(name, "master", shape, (rows.start, *(0 for _ in shape[1:])), values)])
    return values
