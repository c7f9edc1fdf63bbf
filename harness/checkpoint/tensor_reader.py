"""Parts of the tensors in a safetensors file, read in pieces into memory that is there already.

The library's reader maps the file: every page is a fault and stays resident, a slice is one more copy, and a disk that
fails in the midst of it kills the process. Here a part needs no more than a few MiB beside its target. Whether a header
is a good one is left to the library.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .boxes import Box
from .dtypes import SAFETENSORS_NAMES
from .errors import CheckpointError
from .tensor_file import bytes_of

_BLOCK_BYTES = 8 << 20
_READ_BYTES = 1 << 30  # a single read gives no more than 2 GB
_DTYPES = {name: getattr(torch, ours) for ours, name in SAFETENSORS_NAMES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """What a file's header says of one tensor."""

    format_name: str
    """Of its dtype, as safetensors calls it: "F32"."""
    shape: tuple[int, ...]
    start: int
    """Byte of the file where its elements begin, in row-major order."""

    @property
    def dtype(self) -> torch.dtype | None:
        """None where it is one that no checkpoint of ours stores."""
        return _DTYPES.get(self.format_name)


class TensorFile:
    """A safetensors file. Raises CheckpointError where it is not one, is truncated, or cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt"):  # refuses what the header and the file's size contradict
                pass
            self._descriptor = os.open(path, os.O_RDONLY)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: is not a safetensors file: {error}") from None

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    @cached_property
    def entries(self) -> dict[str, TensorEntry]:
        """By name."""
        length = bytearray(8)
        self._fill(memoryview(length), 0)
        header = bytearray(int.from_bytes(length, "little"))
        self._fill(memoryview(header), 8)
        values = json.loads(header)
        values.pop("__metadata__", None)
        start = 8 + len(header)
        return {
            name: TensorEntry(entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0])
            for name, entry in values.items()
        }

    def read(self, name: str, parts: Sequence[tuple[Box, Tensor]]) -> None:
        """Fill each target with its box of one tensor, converted to the target's dtype where that is another.

        Targets may be of any stride and on any device. Raises CheckpointError where the disk fails.
        """
        entry = self.entries[name]
        bound = _bounding([box for box, _ in parts])
        # Columns that together are most of the rows are read once, as rows.
        if len(parts) > 1 and 2 * sum(box.elements for box, _ in parts) >= bound.elements:
            self._read(entry, bound, parts)
        else:
            for box, target in parts:
                self._read(entry, box, [(box, target)])

    def digest(self, name: str) -> str:
        """SHA-256 of a tensor's bytes, in hexadecimal."""
        entry, digest = self.entries[name], hashlib.sha256()
        assert entry.dtype is not None
        size = prod(entry.shape) * entry.dtype.itemsize
        for place in range(0, size, _BLOCK_BYTES):
            block = bytearray(min(_BLOCK_BYTES, size - place))
            self._fill(memoryview(block), entry.start + place)
            digest.update(block)
        return digest.hexdigest()

    def _read(self, entry: TensorEntry, bound: Box, parts: Sequence[tuple[Box, Tensor]]) -> None:
        """Read what lies in `bound` and hand it to the parts, which lie in it."""
        assert entry.dtype is not None
        place = _first_element(entry.shape, bound)
        direct = parts[0][1] if len(parts) == 1 and place is not None else None
        if (
            direct is not None
            and direct.device.type == "cpu"
            and direct.is_contiguous()
            and direct.dtype == entry.dtype
        ):
            assert place is not None
            self._fill(bytes_of(direct), entry.start + place * entry.dtype.itemsize)
            return
        for block in _blocks(bound, _BLOCK_BYTES // entry.dtype.itemsize):
            scratch = torch.empty(block.shape, dtype=entry.dtype)
            self._fetch(entry, block, scratch)
            for box, target in parts:
                common = box.intersect(block)
                if common is not None:
                    target.detach()[common.slices_in(box)].copy_(scratch[common.slices_in(block)])

    def _fetch(self, entry: TensorEntry, box: Box, into: Tensor) -> None:
        """A box into contiguous host memory of its shape and dtype, one read for each run of bytes in the file."""
        place = _first_element(entry.shape, box)
        if place is not None:
            self._fill(bytes_of(into), entry.start + place * into.element_size())
            return
        dimension = next(number for number, size in enumerate(box.shape) if size > 1)
        for index in range(box.shape[dimension]):
            offsets, shape = list(box.offsets), list(box.shape)
            offsets[dimension], shape[dimension] = offsets[dimension] + index, 1
            self._fetch(entry, Box(tuple(offsets), tuple(shape)), into.narrow(dimension, index, 1))

    def _fill(self, into: memoryview, start: int) -> None:
        done = 0
        while done < len(into):
            try:
                count = os.preadv(self._descriptor, [into[done : done + _READ_BYTES]], start + done)
            except OSError as error:
                raise CheckpointError(f"{self.path}: cannot be read: {error}") from None
            if count == 0:
                raise CheckpointError(f"{self.path}: cannot be read: it ends before byte {start + len(into)}")
            done += count


def _first_element(whole: tuple[int, ...], box: Box) -> int | None:
    """The element of a tensor of shape `whole` where the box begins; None where the box has gaps in the file."""
    cut = next((dimension for dimension, size in enumerate(box.shape) if size > 1), len(box.shape))
    if box.shape[cut + 1 :] != whole[cut + 1 :]:
        return None
    return sum(offset * prod(whole[dimension + 1 :]) for dimension, offset in enumerate(box.offsets))


def _bounding(boxes: Sequence[Box]) -> Box:
    starts = tuple(map(min, zip(*(box.offsets for box in boxes), strict=True)))
    ends = map(max, zip(*(map(sum, zip(box.offsets, box.shape, strict=True)) for box in boxes), strict=True))
    return Box(starts, tuple(end - start for start, end in zip(starts, ends, strict=True)))


def _blocks(box: Box, elements: int) -> list[Box]:
    """Consecutive pieces of about so many elements, cut in the first dimension that has more than one."""
    if not box.elements:
        return []
    dimension = next((number for number, size in enumerate(box.shape) if size > 1), None)
    if dimension is None:
        return [box]
    rows = max(elements * box.shape[dimension] // box.elements, 1)
    pieces = []
    for start in range(0, box.shape[dimension], rows):
        offsets, shape = list(box.offsets), list(box.shape)
        offsets[dimension] += start
        shape[dimension] = min(rows, box.shape[dimension] - start)
        pieces.append(Box(tuple(offsets), tuple(shape)))
    return pieces
