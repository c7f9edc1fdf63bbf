"""Tensors into the files of `torch.distributed.checkpoint`, one at a time.

torch's own writer keeps what it has written of a file until the file is whole, and Megatron-core's copies the model
first (and calls CUDA). Here torch plans and describes, and each tensor is fetched when its turn comes.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from harness.checkpoint import Box, StoredFile

from .megatron_chunks import METADATA

DATA = "__0_0.distcp"


@dataclass(frozen=True)
class Piece:
    """A chunk to write: a box of a tensor of some shape."""

    name: str
    shape: tuple[int, ...]
    box: Box
    fetch: Callable[[], Tensor]
    """Of the box's elements, in any shape."""


def write_chunks(
    folder: Path, pieces: Sequence[Piece], objects: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, StoredFile]:
    """Write a checkpoint of one file of tensors and plain values; sizes and digests of what was written.

    Raises OSError, and what fetching raises.
    """
    writer = _Writer(folder)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")
            checkpoint.save({}, storage_writer=writer, planner=_Planner(pieces, objects, dtype), no_dist=True)
    except checkpoint.CheckpointException as error:  # no Exception, and what went wrong is inside
        raise next(iter(error.failures.values()))[0] from None
    described = (folder / METADATA).read_bytes()
    return {
        DATA: StoredFile(bytes=writer.size, sha256=writer.digest.hexdigest()),
        METADATA: StoredFile(bytes=len(described), sha256=hashlib.sha256(described).hexdigest()),
    }


def saved(value: Any) -> bytes:
    """What torch.save writes of a plain value."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class _Planner(checkpoint.DefaultSavePlanner):
    def __init__(self, pieces: Sequence[Piece], objects: Mapping[str, Any], dtype: torch.dtype) -> None:
        super().__init__(flatten_state_dict=False)
        self._dtype, self._objects = dtype, objects
        self._pieces = {(piece.name, piece.box.offsets): piece for piece in pieces}

    def create_local_plan(self) -> SavePlan:
        items = [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in self._objects]
        for piece in self._pieces.values():
            chunk = ChunkStorageMetadata(torch.Size(piece.box.offsets), torch.Size(piece.box.shape))
            written = TensorWriteData(chunk, TensorProperties(dtype=self._dtype), torch.Size(piece.shape))
            items.append(
                WriteItem(MetadataIndex(piece.name, piece.box.offsets), WriteItemType.SHARD, tensor_data=written)
            )
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        index = write_item.index
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(saved(self._objects[index.fqn]))
        assert index.offset is not None
        piece = self._pieces[index.fqn, tuple(index.offset)]
        return piece.fetch().reshape(piece.box.shape)


class _Writer(checkpoint.FileSystemWriter):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._file = folder / DATA
        self.size, self.digest = 0, hashlib.sha256()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        with self._file.open("xb") as self._stream:
            for item in plan.items:
                start = self.size
                self._write_item(planner.resolve_data(item))
                place = _StorageInfo(DATA, start, self.size - start)
                results.append(WriteResult(item.index, self.size - start, place))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write_item(self, value: Tensor | io.BytesIO) -> None:
        """A function of its own, so that a tensor is let go before the next is fetched."""
        if isinstance(value, io.BytesIO):
            self.write(value.getbuffer())
        else:
            torch.save(value.contiguous(), cast(IO[bytes], self))

    def write(self, data: Any) -> int:
        """Of a file, for torch.save."""
        self.digest.update(data)
        self.size += len(data)
        return self._stream.write(data)

    def flush(self) -> None:
        self._stream.flush()
