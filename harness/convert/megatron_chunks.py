"""Tensors in the files of `torch.distributed.checkpoint`, of which Megatron-core's "torch_dist" checkpoints are made.

A folder holds `.metadata`, a pickle that says of every tensor its shape, its dtype, its chunks, and where each chunk
lies: in a `.distcp` file, from one byte to another, as what torch.save would write alone: a zip archive with the
elements as they are and a pickle that says how they make a tensor. Both pickles are read without being unpickled.
"""

from __future__ import annotations

import io
import os
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch
from torch import Tensor

from harness.checkpoint import Box, TensorEntry, TensorFile, cover_problem
from harness.config import HarnessError

from .megatron_pickles import Made, Named, Persistent, read_pickle

METADATA = ".metadata"
FORMAT_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_STORAGES = {"torch.FloatStorage": "float32", "torch.BFloat16Storage": "bfloat16", "torch.HalfStorage": "float16"}
_LOCAL_HEADER = struct.Struct("<26xHH")
"""Of a zip entry, up to its name: the lengths of the name and of what follows it."""


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and the bytes of a file that hold what torch.save wrote of it."""

    box: Box
    file: Path
    start: int
    length: int


@dataclass(frozen=True)
class ChunkedTensor:
    """A tensor that `chunks` tile."""

    shape: tuple[int, ...]
    dtype: str
    """Of torch: "float32"."""
    chunks: tuple[Chunk, ...]


class ChunkFolder:
    """The tensors of a folder whose names `wanted` takes; the others are not looked at.

    Raises HarnessError where the metadata are damaged, chunks do not tile a tensor, or a file is missing or too short.
    """

    def __init__(self, folder: Path, wanted: Callable[[str], bool]) -> None:
        self.folder = folder
        self.tensors = _read_metadata(folder, wanted)
        self._starts: dict[Chunk, int] = {}
        ends: dict[Path, int] = defaultdict(int)
        for tensor in self.tensors.values():
            for chunk in tensor.chunks:
                ends[chunk.file] = max(ends[chunk.file], chunk.start + chunk.length)
        for file, end in ends.items():
            if not file.is_file():
                raise HarnessError(f"{file}: no such file, and {METADATA} says that tensors lie in it")
            if file.stat().st_size < end:
                raise HarnessError(
                    f"{file}: is truncated: it has {file.stat().st_size} bytes, and by {METADATA} at least {end}"
                )

    def read(self, name: str, parts: Sequence[tuple[Box, Tensor]]) -> None:
        """Fill each target with its box of one tensor, converted to the target's dtype where that is another."""
        tensor = self.tensors[name]
        for chunk in tensor.chunks:
            found = [(common, box, target) for box, target in parts if (common := box.intersect(chunk.box))]
            if not found:
                continue
            if chunk not in self._starts:
                self._starts[chunk] = _find_elements(chunk, tensor.dtype, name)
            entry = TensorEntry(FORMAT_NAMES[tensor.dtype], chunk.box.shape, self._starts[chunk])
            with _ElementsFile(chunk.file, {name: entry}) as file:
                file.read(
                    name, [(_inside(common, chunk.box), target[common.slices_in(box)]) for common, box, target in found]
                )

    def verify(self, share: tuple[int, int]) -> list[str]:
        """Chunks whose bytes are not those of which the checksums were taken, a line each."""
        problems = []
        chunks = [(name, chunk) for name, tensor in self.tensors.items() for chunk in tensor.chunks]
        for name, chunk in chunks[share[0] :: share[1]]:
            try:
                with _open_archive(chunk, name) as (archive, _):
                    bad = archive.testzip()
            except HarnessError as error:
                problems.append(str(error))
                continue
            if bad is not None:
                problems.append(f"{_place(chunk, name)} is damaged: the checksum of its {bad} differs")
        return problems


class _ElementsFile(TensorFile):
    """Elements in a file of another kind, where `entries` say."""

    def __init__(self, path: Path, entries: dict[str, TensorEntry]) -> None:
        self.path, self.entries = path, entries
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise HarnessError(f"{path}: cannot be read: {error.strerror}") from None


def _inside(box: Box, outer: Box) -> Box:
    """A box in the coordinates of one that it lies in."""
    return Box(tuple(start - base for start, base in zip(box.offsets, outer.offsets, strict=True)), box.shape)


def _read_metadata(folder: Path, wanted: Callable[[str], bool]) -> dict[str, ChunkedTensor]:
    file = folder / METADATA
    try:
        content = file.read_bytes()
    except OSError as error:
        raise HarnessError(f"{file}: cannot be read: {error.strerror}") from None
    root = read_pickle(content, str(file))
    try:
        return dict(_parse_metadata(root, folder, wanted))
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise HarnessError(
            f"{file}: is not as torch.distributed.checkpoint writes it: {type(error).__name__} {error}"
        ) from None


def _parse_metadata(root: Any, folder: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, ChunkedTensor]]:
    stored = {}
    for index, info in _state(root, "Metadata")["storage_data"].items():
        key = _state(index, "MetadataIndex")
        if wanted(key["fqn"]) and key.get("offset") is not None:
            stored[key["fqn"], _size(key["offset"])] = _state(info, "_StorageInfo")
    for name, value in _state(root, "Metadata")["state_dict_metadata"].items():
        if value.of.name != "TensorStorageMetadata" or not wanted(name):
            continue
        tensor = value.state
        chunks = []
        for part in tensor["chunks"]:
            box = Box(_size(part.state["offsets"]), _size(part.state["sizes"]))
            info = stored[name, box.offsets]
            if info.get("transform_descriptors"):
                raise HarnessError(
                    f"{folder / METADATA}: tensor {name} is stored through {info['transform_descriptors']}, and only "
                    f"what torch.save writes can be read"
                )
            path, start, length = info["relative_path"], info["offset"], info["length"]
            if (
                not isinstance(path, str)
                or Path(path).name != path
                or type(start) is not int
                or type(length) is not int
            ):
                raise ValueError(f"{name} lies at {path!r}, {start!r}, {length!r}")
            chunks.append(Chunk(box, folder / path, start, length))
        shape, dtype = _size(tensor["size"]), tensor["properties"].state[0].name
        problem = cover_problem(shape, [chunk.box for chunk in chunks])
        if problem:
            raise HarnessError(f"{folder / METADATA}: tensor {name}: {problem}")
        yield name, ChunkedTensor(shape, dtype, tuple(chunks))


def _state(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, Made) or value.of.name != name or not isinstance(value.state, dict):
        raise TypeError(f"no {name}")
    return value.state


def _size(value: Any) -> tuple[int, ...]:
    """torch.Size is a call with one tuple."""
    sizes = value.arguments[0] if isinstance(value, Made) else value
    if not isinstance(sizes, tuple) or not all(type(size) is int and size >= 0 for size in sizes):
        raise TypeError(f"no size: {sizes!r}")
    return sizes


def _find_elements(chunk: Chunk, dtype: str, name: str) -> int:
    """The byte of the file where a chunk's elements begin. Raises HarnessError unless they lie there in order."""
    with _open_archive(chunk, name) as (archive, window):
        entries = {each.filename.partition("/")[2]: each for each in archive.infolist()}
        if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
            raise HarnessError(f"{_place(chunk, name)}: its bytes are big-endian, and only little-endian can be read")
        tensor = read_pickle(archive.read(entries["data.pkl"]), _place(chunk, name))
        if str(tensor.of) != "torch._utils._rebuild_tensor_v2":
            raise ValueError(f"it is a {tensor.of}")
        storage, first, shape, stride = tensor.arguments[:4]
        kind, key, elements = _storage(storage)
        if kind != dtype or shape != chunk.box.shape:
            raise ValueError(f"it is {kind} {shape}, and by {METADATA} {dtype} {chunk.box.shape}")
        if any(
            size > 1 and step != prod(shape[at + 1 :])
            for at, (size, step) in enumerate(zip(shape, stride, strict=True))
        ):
            raise HarnessError(
                f"{_place(chunk, name)}: its elements are not stored in order (strides {stride}); load and save it anew"
            )
        entry, itemsize = entries[f"data/{key}"], getattr(torch, dtype).itemsize
        header = os.pread(window.descriptor, _LOCAL_HEADER.size, chunk.start + entry.header_offset)
        start = entry.header_offset + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(header)) + first * itemsize
        fits = first >= 0 and (first + prod(shape)) * itemsize <= min(entry.file_size, elements * itemsize)
        if entry.compress_type != ZIP_STORED or not fits or start + prod(shape) * itemsize > chunk.length:
            raise ValueError("its elements are not all there")
        return chunk.start + start


def _storage(value: Any) -> tuple[str, str, int]:
    """dtype, key and length of what the pickle of a tensor says of its elements."""
    if not isinstance(value, Persistent):
        raise TypeError("no storage")
    tag, kind, key, _, elements = value.key
    if tag != "storage" or not isinstance(kind, Named) or type(elements) is not int:
        raise TypeError("no storage")
    return _STORAGES.get(str(kind), str(kind)), str(key), elements


@contextmanager
def _open_archive(chunk: Chunk, name: str) -> Iterator[tuple[ZipFile, _Window]]:
    """HarnessError, naming the chunk, for whatever turns out to be wrong with it."""
    try:
        with _Window(chunk) as window, ZipFile(io.BufferedReader(window)) as archive:
            yield archive, window
    except HarnessError:
        raise
    except OSError as error:
        raise HarnessError(f"{chunk.file}: cannot be read: {error}") from None
    except (BadZipFile, KeyError, ValueError, TypeError, AttributeError, IndexError, EOFError, NotImplementedError,
            RuntimeError, struct.error) as error:  # fmt: skip
        raise HarnessError(f"{_place(chunk, name)} is damaged: {error or type(error).__name__}") from None


def _place(chunk: Chunk, name: str) -> str:
    return f"{chunk.file}: the part of {name} at byte {chunk.start}"


class _Window(io.RawIOBase):
    """The bytes of a chunk as a file of its own."""

    def __init__(self, chunk: Chunk) -> None:
        self._chunk, self._position = chunk, 0
        self.descriptor = os.open(chunk.file, os.O_RDONLY)

    def close(self) -> None:
        if not self.closed:
            os.close(self.descriptor)
        super().close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._chunk.length}[whence]
        if base + offset < 0:
            raise ValueError("a place before the beginning")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        view = view[: max(self._chunk.length - self._position, 0)]
        count = os.preadv(self.descriptor, [view], self._chunk.start + self._position) if view else 0
        self._position += count
        return count
