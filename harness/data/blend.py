"""Which corpus, and which of its samples, sample k of a blend is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .megatron import import_helpers

FIRST_SIZE = 1 << 14


class Blend:
    """megatron-core's blend over normalised weights: the corpus that lags furthest behind its share comes next.

    The table is built from the start and each entry depends on those before it alone, so a longer one begins with the
    shorter: nothing depends on how many samples a run will read. 10 bytes a sample are held in memory.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """`weights` are positive; they need not sum to 1."""
        self._weights = np.array(weights, dtype=np.float64) / np.sum(weights)
        self._corpora = np.zeros(0, dtype=np.int16)
        self._samples = np.zeros(0, dtype=np.int64)

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Corpus [n] and its sample [n] for the blend's samples `numbers`, int64 [n]."""
        if len(self._weights) == 1:
            return np.zeros(len(numbers), dtype=np.int16), numbers
        if len(numbers):
            self._extend(int(numbers.max()) + 1)
        return self._corpora[numbers], self._samples[numbers]

    def _extend(self, size: int) -> None:
        if size <= len(self._corpora):
            return
        size = max(FIRST_SIZE, 1 << (size - 1).bit_length())
        corpora, samples = np.zeros(size, dtype=np.int16), np.zeros(size, dtype=np.int64)
        import_helpers().build_blending_indices(corpora, samples, self._weights, len(self._weights), size, False)
        self._corpora, self._samples = corpora, samples
