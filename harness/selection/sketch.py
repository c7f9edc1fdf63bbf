"""What the cheapest look at a text tells of its score: a tenth of the price of compressing the text once.

Two numbers a text, from the 16-bit hashes of its runs of four bytes: how many different ones there are, which with the
text's length predicts C(x); and in how many targets each of them occurs, summed, which predicts what text and targets
share. native/grams.h counts them; without it numpy counts the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from .codecs import Codec
from .sizes import kernel
from .targets import Targets, joined

GRAM_BYTES = 4
HASHES = 1 << 16
MULTIPLIER = 0x9E3779B1
"""A prime near 2^32 by the golden ratio (Knuth). native/grams.h has the same."""
PIECES_A_LENGTH = 12
SHORTEST_PIECE, LONGEST_PIECE = 64, 8192


class Sketch:
    """Predictors of a score over fixed targets; made once, used for every text."""

    def __init__(self, method: str, codec: Codec, targets: Targets, target_sizes: np.ndarray) -> None:
        self.method = method
        self._targets = len(targets)
        self._weights = gram_weights(targets)
        self._sizes = _SizeMeans(target_sizes)
        # How C(x) follows from the counts differs with compressor and level: that is learnt from the targets' own text.
        pieces = list(_pieces(targets.buffer))
        sizes = codec.sizes(pieces).astype(np.float64)
        known = self._design(pieces, count_grams(pieces, self._weights))
        self._coefficients, *_ = np.linalg.lstsq(known / sizes[:, None], np.ones(len(pieces)), rcond=None)
        self._least = float(codec.sizes([b""])[0])

    def __call__(self, texts: Sequence[bytes]) -> np.ndarray:
        """Predictors without any compression: float64 [texts, 4].

        `columns` with C(x) estimated, then the mean over the targets of what a shared byte adds to the score, and that
        times the number of different hashes.
        """
        counts = count_grams(texts, self._weights)
        sizes = np.maximum(self._design(texts, counts) @ self._coefficients, self._least)
        a_byte = self._a_byte(sizes)
        return np.column_stack([self._columns(sizes, counts), a_byte, a_byte * counts[:, 0]])

    def columns(self, texts: Sequence[bytes], sizes: np.ndarray) -> np.ndarray:
        """With C(x) known, [texts]: float64 [texts, 2].

        The mean over the targets of min(C(x), C(y)) / max(C(x), C(y)), which no alignment exceeds; and that of how many
        different hashes text and target share, each worth a byte.
        """
        return self._columns(sizes.astype(np.float64), count_grams(texts, self._weights))

    def _columns(self, sizes: np.ndarray, counts: np.ndarray) -> np.ndarray:
        return np.column_stack([self._sizes.shares(sizes), self._a_byte(sizes) * counts[:, 1] / self._targets])

    def _a_byte(self, sizes: np.ndarray) -> np.ndarray:
        return self._sizes.over_larger(sizes) if self.method == "ncd" else self._sizes.over_smaller(sizes)

    @staticmethod
    def _design(texts: Sequence[bytes], counts: np.ndarray) -> np.ndarray:
        lengths = np.fromiter(map(len, texts), dtype=np.float64, count=len(texts))
        return np.column_stack([lengths, counts[:, 0], np.ones(len(texts))])


class _SizeMeans:
    """Means over all targets of functions of C(x) and C(y), from prefix sums over the sorted C(y)."""

    def __init__(self, target_sizes: np.ndarray) -> None:
        self._sorted = np.sort(target_sizes).astype(np.float64)
        self._sum = np.concatenate([[0.0], np.cumsum(self._sorted)])
        self._inverse = np.concatenate([[0.0], np.cumsum(1 / self._sorted)])

    def over_larger(self, sizes: np.ndarray) -> np.ndarray:
        """Mean of 1 / max(C(x), C(y)): float64 of the shape of `sizes`."""
        smaller = self._smaller(sizes)
        return (smaller / sizes + self._inverse[-1] - self._inverse[smaller]) / len(self._sorted)

    def over_smaller(self, sizes: np.ndarray) -> np.ndarray:
        """Mean of 1 / min(C(x), C(y))."""
        smaller = self._smaller(sizes)
        return (self._inverse[smaller] + (len(self._sorted) - smaller) / sizes) / len(self._sorted)

    def shares(self, sizes: np.ndarray) -> np.ndarray:
        """Mean of min(C(x), C(y)) / max(C(x), C(y))."""
        smaller = self._smaller(sizes)
        larger = sizes * (self._inverse[-1] - self._inverse[smaller])
        return (self._sum[smaller] / sizes + larger) / len(self._sorted)

    def _smaller(self, sizes: np.ndarray) -> np.ndarray:
        """How many targets have no larger a size."""
        return np.searchsorted(self._sorted, sizes, side="right")


def gram_weights(targets: Targets) -> np.ndarray:
    """In how many targets each hash occurs, 65,535 at most: uint16 [65536]."""
    weights = np.zeros(HASHES, dtype=np.int64)
    for target in targets:
        weights[_hashes(target)] += 1  # once for each target, however often it occurs there
    return np.minimum(weights, np.iinfo(np.uint16).max).astype(np.uint16)


def count_grams(texts: Sequence[bytes], weights: np.ndarray, *, native: bool = True) -> np.ndarray:
    """How many different hashes each text has, and the sum of their `weights`: int64 [texts, 2].

    `native=False` counts in numpy where the kernel is there too (for tests and measurements).
    """
    counts = np.empty((len(texts), 2), dtype=np.int64)
    deflate_sizes = kernel() if native else None
    if deflate_sizes is not None:
        deflate_sizes.grams(weights, *joined(texts), counts)
        return counts
    for row, text in zip(counts, texts, strict=True):
        seen = np.zeros(HASHES, dtype=bool)
        seen[_hashes(text)] = True
        row[:] = np.count_nonzero(seen), weights[seen].sum(dtype=np.int64)
    return counts


def _hashes(text: bytes) -> np.ndarray:
    """The hash of every run of four bytes: uint32 [bytes − 3], below 65536."""
    if len(text) < GRAM_BYTES:
        return np.empty(0, dtype=np.uint32)
    byte = np.frombuffer(text, dtype=np.uint8).astype(np.uint32)
    count = len(byte) - GRAM_BYTES + 1
    grams = np.zeros(count, dtype=np.uint32)
    for i in range(GRAM_BYTES):
        grams |= byte[i : i + count] << np.uint32(8 * i)
    return (grams * np.uint32(MULTIPLIER)) >> np.uint32(16)


def _pieces(buffer: bytes) -> Iterator[bytes]:
    """Pieces of several lengths from all over a text, at least one."""
    length = min(SHORTEST_PIECE, len(buffer))
    while length <= min(LONGEST_PIECE, len(buffer)):
        for i in range(PIECES_A_LENGTH):
            start = (len(buffer) - length) * i // PIECES_A_LENGTH
            yield buffer[start : start + length]
        length = max(2 * length, 1)
