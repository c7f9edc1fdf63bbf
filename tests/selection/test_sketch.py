"""The sketch's counts and means against their definitions; what it predicts."""

from __future__ import annotations

import random

import numpy as np
import pytest

from harness.selection import ScoreSection, Targets, open_scorer
from harness.selection.codecs import Codec, Compressor
from harness.selection.sketch import HASHES, Sketch, count_grams, gram_weights
from tests.selection.texts import CODE, draw_length, draw_text

pytestmark = pytest.mark.usefixtures("kernel")


def hashes(text: bytes) -> set[int]:
    """Plain integers: the upper half of four bytes times Knuth's multiplier."""
    return {(int.from_bytes(text[i : i + 4], "little") * 2_654_435_761 % (1 << 32)) >> 16 for i in range(len(text) - 3)}


def test_counts() -> None:
    seed = random.randrange(1 << 48)
    r = random.Random(seed)
    texts = [draw_text(r, draw_length(r, 20_000)) for _ in range(40)] + [b"", b"abc", b"abcd", b"\xff" * 5]
    targets = Targets([draw_text(r, draw_length(r, 3_000)) for _ in range(20)] + [b"", b"abcde", CODE])
    weights = gram_weights(targets)
    of_targets = [hashes(target) for target in targets]
    assert weights.shape == (HASHES,)
    assert weights.tolist() == [sum(n in each for each in of_targets) for n in range(HASHES)], seed
    expected = [[len(hashes(text)), sum(int(weights[n]) for n in hashes(text))] for text in texts]
    assert count_grams(texts, weights).tolist() == expected, seed
    assert count_grams(texts, weights, native=False).tolist() == expected, seed
    assert count_grams([], weights).shape == (0, 2)


def test_a_weight_never_overflows() -> None:
    weights = gram_weights(Targets([b"abcd"] * 65_537 + [b"abce"]))
    assert sorted(weights[weights > 0].tolist()) == [1, 65_535]


@pytest.mark.parametrize("method", ["ncd", "coverage"])
def test_columns_with_the_size_known(method: str) -> None:
    r = random.Random(2)
    targets = Targets([draw_text(r, draw_length(r, 2_000)) for _ in range(30)])
    texts = [draw_text(r, draw_length(r, 5_000)) for _ in range(50)]
    codec = Codec("gzip", 9)
    cx, cy = codec.sizes(texts), codec.sizes(list(targets))
    found = Sketch(method, codec, targets, cy).columns(texts, cx)
    counts = count_grams(texts, gram_weights(targets))
    for row, x, (_, weight) in zip(found, cx, counts, strict=True):
        share = np.mean([min(x, y) / max(x, y) for y in cy])
        a_byte = np.mean([1 / (max(x, y) if method == "ncd" else min(x, y)) for y in cy])
        np.testing.assert_allclose(row, [share, a_byte * weight / 30], rtol=1e-12)


@pytest.mark.parametrize("compressor", ["gzip", "lz4", "zstd"])
def test_a_regression_on_the_sketch_predicts_the_score(compressor: Compressor) -> None:
    r = random.Random(3)
    cuts = [(r.randrange(len(CODE) - 9_000), r.randint(300, 5_000)) for _ in range(300)]
    words = ["river", "Ocean", "went", "slowly", "and", "north", "return", "self", *CODE[:900].decode().split()]
    texts = [CODE[start : start + length] for start, length in cuts]
    texts += [" ".join(r.choices(words, k=r.randint(50, 700))).encode() for _ in range(100)]
    targets = Targets([CODE[i : i + 200 + 9 * (i // 1_000)] for i in range(50_000, 80_000, 1_000)])
    scorer = open_scorer(ScoreSection(method="ncd", compressor=compressor), targets)
    exact, sketch = scorer.scores(texts), scorer.sketch(texts)
    assert sketch.dtype == np.float32
    columns = np.column_stack([sketch, np.ones(len(texts))]).astype(np.float64)
    fit, *_ = np.linalg.lstsq(columns[::2], exact[::2], rcond=None)
    assert (exact - columns @ fit)[1::2].var() < 0.25 * exact.var()
    assert scorer.can_sketch == (compressor != "zstd")


@pytest.mark.parametrize("texts", [[b""], [b"", b""], [b"a"], [b"abcdefg" * 2]])
def test_targets_too_small_to_learn_from(texts: list[bytes]) -> None:
    scorer = open_scorer(ScoreSection(method="ncd"), Targets(texts))
    for found in (scorer.sketch([b"", CODE[:2_000], CODE]), scorer.features([b"", CODE[:2_000], CODE])):
        assert np.isfinite(found).all()
