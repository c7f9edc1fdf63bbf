"""Scores of documents by compression: how much of what a document says the targets say too.

With C(z) = len(gzip.compress(z, level)), x a document, y a target and ⊕ for one behind the other, I(x, y) = C(x) + C(y)
− C(x⊕y) is the number of bytes that the two share, as far as deflate sees it. Each score divides I by something else:

- `ncd_alignment`: I / max(C(x), C(y)), the ZIP-FIT paper's. A document is capped at min/max of the two sizes, so length
  alone explains most of the order.
- `coverage`: I / min(C(x), C(y)), the share of the smaller text that is in the other.
- `gain`: how much smaller a document becomes behind a sample of the targets.

deflate sees 32 KiB back: of a longer document only the last 32 KiB can share anything with a target behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice

import numpy as np

from .sizes import compressed_sizes
from .targets import Targets, encode

DOCUMENTS_A_BATCH = 64


def ncd_alignment(
    sources: Iterable[bytes | str], targets: Targets | Iterable[bytes | str], level: int = 9
) -> np.ndarray:
    """ZIP-FIT's alignment of every source with all targets: float64 [sources], higher is more alike.

    1 − mean over the targets y of NCD(x, y), where NCD(x, y) = (C(x⊕y) − min(C(x), C(y))) / max(C(x), C(y)), the source
    x first (Obbad et al., arXiv 2410.18194, algorithm 1; the distance is Cilibrasi and Vitányi's, IEEE Transactions on
    Information Theory 51, 2005). Since C(x) + C(y) = min + max, this is the mean of I(x, y) / max(C(x), C(y)).

    `level` is gzip's, 1 to 9; the paper names none, and its ablation favours low ones. Strings are encoded as UTF-8.
    HarnessError for another level, for no targets and for a string without an encoding.
    """
    return _scores(sources, targets, level, lambda cx, cy, cxy: 1 - np.mean((cxy - _least(cx, cy)) / _most(cx, cy)))


def coverage(sources: Iterable[bytes | str], targets: Targets | Iterable[bytes | str], level: int = 9) -> np.ndarray:
    """Mean over the targets of I(x, y) / min(C(x), C(y)): float64 [sources]; like `ncd_alignment` in all else."""
    return _scores(sources, targets, level, lambda cx, cy, cxy: np.mean((cx + cy - cxy) / _least(cx, cy)))


def gain(
    sources: Iterable[bytes | str],
    targets: Targets | Iterable[bytes | str],
    level: int = 9,
    context_bytes: int = 30_000,
) -> np.ndarray:
    """1 − C(x given W) / C(x), with C(x given W) = C(W⊕x) − C(W): float64 [sources].

    W is the beginning of all targets, one behind the other, `context_bytes` long at most: with deflate's 32 KiB there
    is no use in more, and a document loses sight of it from its own 32 KiB on. Raises what `ncd_alignment` does.
    """
    context = _as_targets(targets).buffer[:context_bytes]
    scores: list[np.ndarray] = []
    documents = iter(sources)
    while batch := list(islice(documents, DOCUMENTS_A_BATCH)):
        texts = Targets(batch)  # the context comes first here, so the documents are what follows it
        alone, behind = compressed_sizes(context, texts, level)
        scores.append(1 - (behind - alone) / texts.sizes(level))
    return np.concatenate([np.empty(0), *scores])


def _as_targets(targets: Targets | Iterable[bytes | str]) -> Targets:
    return targets if isinstance(targets, Targets) else Targets(targets)


def _scores(
    sources: Iterable[bytes | str],
    targets: Targets | Iterable[bytes | str],
    level: int,
    score: Callable[[int, np.ndarray, np.ndarray], float],
) -> np.ndarray:
    targets = _as_targets(targets)
    own = targets.sizes(level)
    scores = []
    for source in sources:
        alone, together = compressed_sizes(encode(source), targets, level)
        scores.append(score(alone, own, together))
    return np.array(scores, dtype=np.float64)


def _least(cx: int, cy: np.ndarray) -> np.ndarray:
    return np.minimum(cx, cy)


def _most(cx: int, cy: np.ndarray) -> np.ndarray:
    return np.maximum(cx, cy)
