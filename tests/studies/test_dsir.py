"""DSIR against its formula, spelled out."""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter

import numpy as np
import pytest

from harness.studies.selection.dsir import gumbel_order, log_weights


def plain_weights(pool: list[str], targets: list[str], buckets: int) -> list[float]:
    """Equations of the paper's section 4, with dictionaries, and words that are split by hand."""

    def grams(text: str) -> Counter[int]:
        words: list[str] = []
        last = "blank"
        for character in text.lower():
            kind = "word" if character.isalnum() or character == "_" else "blank" if character.isspace() else "mark"
            if kind != "blank" and last == kind:
                words[-1] += character
            elif kind != "blank":
                words.append(character)
            last = kind
        pairs = [" ".join(words[index : index + 2]) for index in range(len(words) - 1)]
        return Counter(
            int.from_bytes(hashlib.sha256(gram.encode()).digest(), "big") % buckets for gram in words + pairs
        )

    def model(texts: list[str]) -> dict[int, float]:
        counts: Counter[int] = Counter()
        for text in texts:
            counts += grams(text)
        return {bucket: count / counts.total() for bucket, count in counts.items()}

    p, q = model(targets), model(pool)
    return [
        sum(n * (math.log(p.get(b, 0) + 1e-8) - math.log(q.get(b, 0) + 1e-8)) for b, n in grams(text).items())
        for text in pool
    ]


@pytest.mark.parametrize("buckets", [7, 10_000])
def test_weights_are_the_paper_s(buckets: int) -> None:
    generator = random.Random()
    words = ["Der", "Zug", "von", "foo_bar(x)", "==", "3.14", "straße", "…", "[[", "naïve", "a\tb", "\n"]
    pool = [" ".join(generator.choices(words, k=generator.randint(0, 60))) for _ in range(40)]
    targets = [" ".join(generator.choices(words[:5], k=30)) for _ in range(3)]
    assert log_weights(pool, targets, buckets) == pytest.approx(plain_weights(pool, targets, buckets), rel=1e-9)


def test_gumbel_order_draws_without_replacement_by_weight() -> None:
    """First places ∝ p, and second places as if the first were gone."""
    probabilities = np.array([0.5, 0.3, 0.2])
    generator = np.random.default_rng()
    orders = [tuple(gumbel_order(np.log(probabilities), generator)) for _ in range(20_000)]
    for order, count in Counter(orders).items():
        first, second = probabilities[order[0]], probabilities[order[1]]
        assert count / len(orders) == pytest.approx(first * second / (1 - first), abs=0.02)
