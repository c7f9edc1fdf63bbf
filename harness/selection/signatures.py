"""Near-duplicates among the chosen: MinHash signatures, and who is dropped for whom."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from harness.config import HarnessError

from .config import DuplicatesSection

WORD = re.compile(r"\w+")
SCHEME = "affine32"
FALSE_POSITIVES_AND_NEGATIVES = (0.05, 0.95)
"""How much each is to be avoided by the index: what it finds wrongly is compared, what it misses is not."""


class Signer:
    """MinHash signatures of documents' sets of word shingles (Broder 1997), by the package datasketch."""

    def __init__(self, section: DuplicatesSection) -> None:
        self._section = section
        self._empty = _datasketch().MinHash(num_perm=section.permutations, seed=1, scheme=SCHEME)

    def sign(self, text: str) -> np.ndarray:
        """uint32 [permutations]. A text of fewer words than a shingle has one shingle, all of them."""
        words = WORD.findall(text.lower())
        count = self._section.shingle_words
        last = max(len(words) - count, 0)
        shingles = {" ".join(words[start : start + count]).encode() for start in range(last + 1)}
        if not words:  # signs alone are not all the same text
            shingles = {text.strip().encode()}
        signature = self._empty.copy()
        signature.update_batch(sorted(shingles))
        return np.asarray(signature.hashvalues, dtype=np.uint32)


def find_repeats(signatures: Iterable[np.ndarray], section: DuplicatesSection) -> np.ndarray:
    """Which of the documents, best first, are near-duplicates of a better one that is kept: bool [documents].

    A document is compared with those that share a band of their signatures with it (locality-sensitive hashing), and
    dropped where the estimated Jaccard similarity with one of them reaches `section.similarity`.
    """
    datasketch = _datasketch()
    index = datasketch.MinHashLSH(section.similarity, section.permutations, weights=FALSE_POSITIVES_AND_NEGATIVES)
    permutations = datasketch.MinHash(num_perm=section.permutations, seed=1, scheme=SCHEME).permutations
    kept: dict[int, Any] = {}
    repeats = []
    for position, values in enumerate(signatures):
        signature = datasketch.MinHash(hashvalues=values, permutations=permutations, seed=1, scheme=SCHEME)
        similar = any(signature.jaccard(kept[other]) >= section.similarity for other in index.query(signature))
        repeats.append(similar)
        if not similar:
            kept[position] = signature
            index.insert(position, signature)
    return np.array(repeats, dtype=bool)


def _datasketch() -> Any:
    try:
        import datasketch
    except ModuleNotFoundError:
        raise HarnessError(
            "near-duplicates are found by datasketch: pip install datasketch, or set duplicates.remove=exact"
        ) from None
    return datasketch
