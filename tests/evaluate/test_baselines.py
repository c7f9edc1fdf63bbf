"""The baselines against a slow dictionary model and gzip itself."""

from __future__ import annotations

import gzip
import math
import random
from collections import Counter

import pytest

from harness.evaluate import gzip_bits_per_byte, order2_bits_per_byte


def slow_order2(training: list[bytes], held_out: list[bytes]) -> float:
    """Witten-Bell interpolation of orders 2, 1 and 0 over a uniform distribution, byte by byte."""
    counts: list[dict[bytes, Counter[int]]] = [{}, {}, {}]
    for document in training:
        padded = b"\0\0" + document
        for place in range(2, len(padded)):
            for order in range(3):
                counts[order].setdefault(padded[place - order : place], Counter())[padded[place]] += 1

    def probability(context: bytes, byte: int) -> float:
        shorter = 1 / 256 if not context else probability(context[1:], byte)
        seen = counts[len(context)].get(context)
        if not seen:
            return shorter
        return (seen[byte] + len(seen) * shorter) / (seen.total() + len(seen))

    bits, length = 0.0, 0
    for document in held_out:
        padded = b"\0\0" + document
        for place in range(2, len(padded)):
            bits -= math.log2(probability(padded[place - 2 : place], padded[place]))
            length += 1
    return bits / length


def test_order2_equals_a_dictionary_model() -> None:
    generator = random.Random(3)
    training, held_out = (
        [bytes(generator.choices(b"aab\x00\xff \n", k=generator.randint(0, 90))) for _ in range(30)] for _ in range(2)
    )
    held_out.append(b"zebra")  # bytes and contexts never seen
    assert order2_bits_per_byte(training, held_out) == pytest.approx(slow_order2(training, held_out), rel=1e-12)


def test_order2_learns_a_deterministic_text() -> None:
    assert order2_bits_per_byte([b"abcd" * 5000], [b"abcd" * 100]) < 0.05


def test_gzip_is_level_9_of_everything() -> None:
    documents = [b"some text " * 50, b"other text " * 70]
    expected = 8 * len(gzip.compress(b"".join(documents), 9)) / len(b"".join(documents))
    assert gzip_bits_per_byte(documents) == expected
