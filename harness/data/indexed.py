"""Reading .bin/.idx pairs: document boundaries and the flat array of tokens."""

from __future__ import annotations

import os
import struct
from functools import cached_property
from typing import Any

import numpy as np

from harness.config import HarnessError

from .megatron import import_indexed_dataset, quiet_megatron

MAGIC = b"MMIDIDX\0\0"
HEAD = struct.Struct("<9sQBQQ")


class IndexedTokens:
    """A Megatron .bin/.idx pair, memory-mapped.

    Raises HarnessError where the pair is missing, empty, cut off or no Megatron dataset.
    """

    def __init__(self, prefix: str, label: str) -> None:
        """`prefix` is the path without ending; `label` is how messages name the pair."""
        module = import_indexed_dataset()
        for ending in (".idx", ".bin"):
            if not os.path.isfile(prefix + ending):
                raise HarnessError(f"{label}: no such file: {prefix}{ending}; a Megatron dataset is a .bin and a .idx")
        if os.path.getsize(prefix + ".bin") == 0:
            raise HarnessError(f"{label}: {prefix}.bin is empty")
        _check_index(prefix + ".idx", label)
        with quiet_megatron():
            self.dataset: Any = module.IndexedDataset(prefix, mmap=True)
        expected = int(self.dataset.sequence_lengths.sum(dtype=np.int64)) * np.dtype(self.dataset.index.dtype).itemsize
        found = os.path.getsize(prefix + ".bin")
        if found != expected:
            raise HarnessError(
                f"{label}: {prefix}.bin has {found} bytes and its .idx says {expected}; it is cut off, or another's"
            )
        self.prefix = prefix

    @cached_property
    def tokens(self) -> np.ndarray:
        """All tokens in file order, in the file's own dtype."""
        return np.memmap(self.prefix + ".bin", dtype=self.dataset.index.dtype, mode="r")

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.dataset.document_indices) - 1

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 [documents + 1]: where each document begins in `tokens`."""
        ends = np.concatenate([[0], np.cumsum(self.dataset.sequence_lengths, dtype=np.int64)])
        return ends[self.dataset.document_indices]

    def sequences(self, start: int, stop: int) -> np.ndarray:
        """int32: numbers of the sequences that documents [start, stop) consist of; harness writes one a document."""
        first, last = self.dataset.document_indices[[start, stop]]
        return np.arange(first, last, dtype=np.int32)


def _check_index(path: str, label: str) -> None:
    """Refuse what is no .idx, or only part of one, before megatron-core maps it.

    Layout: magic, version (u64), dtype code (u8), sequences (u64), documents + 1 (u64); then per sequence an int32
    length and an int64 place, per document an int64, and for multimodal data an int8 per sequence.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(HEAD.size)
    if len(head) < HEAD.size or not head.startswith(MAGIC):
        raise HarnessError(f"{label}: {path} is not a Megatron index (it should begin with {MAGIC[:7].decode()})")
    _, version, code, sequences, documents = HEAD.unpack(head)
    if version != 1 or not 1 <= code <= 8:
        raise HarnessError(f"{label}: {path} is a Megatron index of version {version} with dtype {code}: not read here")
    expected = HEAD.size + 12 * sequences + 8 * documents
    if size not in (expected, expected + sequences):
        raise HarnessError(f"{label}: {path} has {size} bytes, its head says {expected}; it is cut off or damaged")
