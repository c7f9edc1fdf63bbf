"""Reading a held-out split from beginning to end, as windows of tokens or as bytes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch

from harness.config import HarnessError

from .batch import IGNORED, Batch, make_batch
from .config import DataSection
from .prepared import Prepared, PreparedSplit


class EvaluationWindows:
    """(corpus name, Batch) over one split, corpus after corpus, in document order.

    A split of T tokens is ceil((T - 1) / S) consecutive windows of S inputs, so every token but the first is a target
    exactly once; the last window is filled up with ignored targets. Batches go to the data-parallel ranks in turn;
    every rank gets equally many, of the same shape within a corpus, so that collectives inside a forward pass meet:
    rows and batches that are left over hold ignored targets only. Can be iterated again.
    """

    def __init__(
        self,
        prepared: Prepared,
        config: DataSection,
        split: str,
        batch_size: int,
        data_rank: int = 0,
        data_size: int = 1,
        limit_samples: int | None = None,
    ) -> None:
        """`limit_samples` takes at most that many windows of each corpus, spread evenly over the split.

        Raises HarnessError where a corpus has nothing to predict in `split`.
        """
        if batch_size < 1 or (limit_samples is not None and limit_samples < 1):
            raise HarnessError(f"batch_size {batch_size} and limit_samples {limit_samples} should be at least 1")
        prepared.require(split, 2)
        self._splits = [prepared.split(corpus.name, split) for corpus in config.corpora]
        self._eod = prepared.tokenizer.eod
        self._config = config
        self._batch_size = batch_size
        self._data_rank = data_rank
        self._data_size = data_size
        self._limit = limit_samples

    def __len__(self) -> int:
        """Number of batches on each rank."""
        return sum(len(self._plan(part)) for part in self._splits)

    def __iter__(self) -> Iterator[tuple[str, Batch]]:
        for part in self._splits:
            flat = part.flat
            for windows in self._plan(part):
                yield part.corpus, self._read(flat, windows)

    def _plan(self, part: PreparedSplit) -> np.ndarray:
        """int64 [batches, rows]: this rank's window numbers, -1 where there is none."""
        total = -(-(part.tokens - 1) // self._config.sequence_length)
        count = total if self._limit is None else min(self._limit, total)
        windows = np.arange(count, dtype=np.int64) * total // count
        rows = min(self._batch_size, -(-count // self._data_size))
        batches = -(-count // (rows * self._data_size))
        plan = np.full(batches * self._data_size * rows, -1, dtype=np.int64)
        plan[:count] = windows
        return plan.reshape(batches, self._data_size, rows)[:, self._data_rank]

    def _read(self, flat: np.ndarray, windows: np.ndarray) -> Batch:
        length = self._config.sequence_length
        tokens = torch.full((len(windows), length), self._eod)
        targets = torch.full((len(windows), length), IGNORED)
        for row, window in enumerate(windows.tolist()):
            if window >= 0:
                start = window * length
                ids = torch.from_numpy(flat[start : start + length + 1].astype(np.int64))
                tokens[row, : len(ids) - 1] = ids[:-1]
                targets[row, : len(ids) - 1] = ids[1:]
        return make_batch(
            tokens,
            targets,
            eod=self._eod,
            document_masking=self._config.document_masking,
            mask_after_end_of_text=self._config.mask_after_end_of_text,
        )


def text_bytes(prepared: Prepared, corpus: str, split: str, limit_bytes: int | None = None) -> Iterator[bytes]:
    """The documents of a split, decoded, in order; at most `limit_bytes` in all, the last document cut short."""
    part = prepared.split(corpus, split)
    if part.documents == 0:
        return
    left = limit_bytes
    tokens, boundaries = part.indexed.tokens, part.boundaries
    for start, stop in pairwise(boundaries.tolist()):
        document = prepared.tokenizer.decode_bytes(tokens[start:stop].tolist())
        if left is not None:
            document = document[:left]
            left -= len(document)
        yield document
        if left == 0:
            return
