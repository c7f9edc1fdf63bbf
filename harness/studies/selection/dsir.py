"""DSIR's importance weights: a reimplementation from the paper's formulas, not the authors' package.

Xie et al., "Data Selection for Language Models via Importance Resampling", arXiv 2302.03169, section 4: hashed unigrams
and bigrams, a bag-of-words model of the targets and one of the pool, log weight = Σ_f counts_f (log p_f − log q_f).
tools/check_dsir.py compares the weights with those of their package data-selection 1.0.3: they are equal, bit for bit.
The package leaves out documents of fewer than 100 words by default; windows of a study are longer.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

BUCKETS = 10_000
SMOOTHING = 1e-8
"""Added to each probability, as the authors' code does."""
WORD = re.compile(r"\w+|[^\w\s]+")
"""nltk's WordPunctTokenizer, which their code uses."""


def features(text: str, buckets: int = BUCKETS) -> np.ndarray:
    """int64 [buckets]: how many of the text's lower-cased words and pairs of neighbours fall into each bucket."""
    words = WORD.findall(text.lower())
    grams = [*words, *(f"{first} {second}" for first, second in pairwise(words))]
    return np.bincount([_bucket(gram, buckets) for gram in grams], minlength=buckets)


def log_weights(pool: Sequence[str], targets: Iterable[str], buckets: int = BUCKETS) -> np.ndarray:
    """float64 [pool]: log p(x) / q(x), p fitted on the targets and q on the whole pool."""
    target = np.sum([features(text, buckets) for text in targets], axis=0)
    raw = np.zeros(buckets, dtype=np.int64)
    for text in pool:
        raw += features(text, buckets)
    ratio = np.log(target / target.sum() + SMOOTHING) - np.log(raw / raw.sum() + SMOOTHING)
    return np.array([features(text, buckets) @ ratio for text in pool])


def gumbel_order(weights: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Indices in an order whose first k are k draws without replacement, with probabilities ∝ exp(weights)."""
    return np.argsort(-(weights + generator.gumbel(size=len(weights))), kind="stable")


@functools.lru_cache(maxsize=1 << 20)
def _bucket(gram: str, buckets: int) -> int:
    return int(hashlib.sha256(gram.encode()).hexdigest(), 16) % buckets
