"""Scores of documents by compression: how much of what a document says the targets say too.

With C(z) = len(gzip.compress(z, level)), x a document, y a target and ⊕ for one behind the other, I(x, y) = C(x) + C(y)
− C(x⊕y) is the number of bytes that the two share, as far as deflate sees it. Each score divides I by something else:

- `ncd_alignment`: I / max(C(x), C(y)), the ZIP-FIT paper's. A document is capped at min/max of the two sizes, so length
  alone explains most of the order.
- `coverage`: I / min(C(x), C(y)), the share of the smaller text that is in the other.
- `gain`: how much smaller a document becomes behind a sample of the targets.

In these two a document counts as SMALL bytes at least: of a few words all is in any text, and what a compressor adds to
each text (20 bytes in gzip's case) would count as shared.

deflate sees 32 KiB back: of a longer document only the last 32 KiB can share anything with a target behind it.

These are the plain functions, over whole documents; methods.py has the same scores over other compressors, windows and
batches, by the same formulas.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from .codecs import Codec
from .targets import Targets, encode

SMALL = 200
"""Compressed bytes that a document counts as at least: some 300 to 400 of text."""
PAIRS_A_BATCH = 1 << 16
DOCUMENTS_A_BATCH = 64


def ncd_alignment(
    sources: Iterable[bytes | str], targets: Targets | Iterable[bytes | str], level: int = 9
) -> np.ndarray:
    """ZIP-FIT's alignment of every source with all targets: float64 [sources], higher is more alike.

    1 − mean over the targets y of NCD(x, y), where NCD(x, y) = (C(x⊕y) − min(C(x), C(y))) / max(C(x), C(y)), the source
    x first (Obbad et al., arXiv 2410.18194, algorithm 1; the distance is Cilibrasi and Vitányi's, IEEE Transactions on
    Information Theory 51, 2005). Since C(x) + C(y) = min + max, this is the mean of I(x, y) / max(C(x), C(y)).

    `level` is gzip's, 1 to 9; the paper names none, and its ablation favours low ones. Strings are encoded as UTF-8.
    The sum is correctly rounded, so it is the same on every machine and in every order of the targets. HarnessError for
    another level, for no targets and for a string without an encoding.
    """
    return _over_pairs("ncd", sources, targets, level)


def coverage(sources: Iterable[bytes | str], targets: Targets | Iterable[bytes | str], level: int = 9) -> np.ndarray:
    """Mean over the targets of I(x, y) / min(max(C(x), SMALL), C(y)): float64 [sources]; like `ncd_alignment` in all
    else."""
    return _over_pairs("coverage", sources, targets, level)


def gain(
    sources: Iterable[bytes | str],
    targets: Targets | Iterable[bytes | str],
    level: int = 9,
    context_bytes: int = 30_000,
) -> np.ndarray:
    """(C(x) − C(x given W)) / max(C(x), SMALL), with C(x given W) = C(W⊕x) − C(W): float64 [sources].

    W is the beginning of all targets, one behind the other, `context_bytes` long at most: with deflate's 32 KiB there
    is no use in more, and a document loses sight of it from its own 32 KiB on. Raises what `ncd_alignment` does.
    """
    codec, context = Codec("gzip", level), as_targets(targets).buffer[:context_bytes]
    return _joined(gains(codec, batch, context) for batch in _batches(sources, DOCUMENTS_A_BATCH))


def pair_terms(method: str, cx: np.ndarray, cy: np.ndarray, cxy: np.ndarray) -> np.ndarray:
    """What is averaged over the targets: NCD(x, y) for ncd, I / min(max(C(x), SMALL), C(y)) for coverage: float64.

    `cx`, `cy` and `cxy` are sizes in bytes, int64, of shapes that go together.
    """
    if method == "ncd":
        return (cxy - np.minimum(cx, cy)) / np.maximum(cx, cy)
    return (cx + cy - cxy) / np.minimum(np.maximum(cx, SMALL), cy)


def pair_scores(
    method: str, codec: Codec, texts: list[bytes], targets: Targets, target_sizes: np.ndarray
) -> np.ndarray:
    """`ncd` or `coverage` of every text over all targets, whose C(y) are `target_sizes`: float64 [texts]."""
    scores = []
    step = max(1, PAIRS_A_BATCH // len(targets))
    for start in range(0, len(texts), step):
        alone, together = codec.pair_sizes(texts[start : start + step], targets)
        scores += [exact_mean(terms) for terms in pair_terms(method, alone[:, None], target_sizes, together)]
    means = np.array(scores, dtype=np.float64)
    return 1 - means if method == "ncd" else means


def gains(codec: Codec, texts: list[bytes], context: bytes) -> np.ndarray:
    """`gain` of every text behind a context: float64 [texts]."""
    if not texts:
        return np.empty(0)
    # The context comes first here, so the texts are what follows it.
    alone, behind = codec.pair_sizes([context], Targets(texts))
    sizes = codec.sizes(texts)
    counted = np.maximum(sizes, SMALL)
    return 1 - (behind[0] - alone[0] + counted - sizes) / counted


def exact_mean(terms: np.ndarray) -> float:
    """The correctly rounded sum of float64 [terms], divided by their number: no order of adding shows in it."""
    return math.fsum(terms.tolist()) / len(terms)


def as_targets(targets: Targets | Iterable[bytes | str]) -> Targets:
    return targets if isinstance(targets, Targets) else Targets(targets)


def _over_pairs(
    method: str, sources: Iterable[bytes | str], targets: Targets | Iterable[bytes | str], level: int
) -> np.ndarray:
    codec, targets = Codec("gzip", level), as_targets(targets)
    own = targets.sizes(level)
    batches = _batches(sources, DOCUMENTS_A_BATCH)
    return _joined(pair_scores(method, codec, batch, targets, own) for batch in batches)


def _batches(sources: Iterable[bytes | str], count: int) -> Iterator[list[bytes]]:
    texts = (encode(source) for source in sources)
    while batch := list(islice(texts, count)):
        yield batch


def _joined(scores: Iterator[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0), *scores])
