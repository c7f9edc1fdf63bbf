"""Reading .bin/.idx pairs: document boundaries and the flat array of tokens."""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any

import numpy as np

from harness.config import HarnessError

from .megatron import import_indexed_dataset, quiet_megatron


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
        try:
            with quiet_megatron():
                self.dataset: Any = module.IndexedDataset(prefix, mmap=True)
        except (AssertionError, ValueError, KeyError, OSError) as error:
            raise HarnessError(f"{label}: {prefix}.idx is not a Megatron index ({error})") from None
        expected = int(self.dataset.sequence_lengths.sum(dtype=np.int64)) * np.dtype(self.dataset.index.dtype).itemsize
        found = os.path.getsize(prefix + ".bin")
        if found != expected:
            raise HarnessError(
                f"{label}: {prefix}.bin has {found} bytes and its .idx says {expected}; it is cut off, or not of this .idx"
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
        """int32: numbers of the sequences that documents [start, stop) consist of (one each, as harness writes them)."""
        first, last = self.dataset.document_indices[[start, stop]]
        return np.arange(first, last, dtype=np.int32)
