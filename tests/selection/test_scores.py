"""Scores against their formulas, written out."""

from __future__ import annotations

import gzip
import random

import numpy as np
import pytest

from harness.config import HarnessError
from harness.selection import Targets, coverage, gain, ncd_alignment
from tests.selection.texts import CODE, draw_length, draw_text

pytestmark = pytest.mark.usefixtures("kernel")


def c(text: bytes, level: int) -> int:
    return len(gzip.compress(text, level))


def naive_alignment(x: bytes, targets: list[bytes], level: int) -> float:
    distances = []
    for y in targets:
        least, most = min(c(x, level), c(y, level)), max(c(x, level), c(y, level))
        distances.append((c(x + y, level) - least) / most)
    return 1 - sum(distances) / len(distances)


def naive_coverage(x: bytes, targets: list[bytes], level: int) -> float:
    counted = max(c(x, level), 200)
    shares = [(c(x, level) + c(y, level) - c(x + y, level)) / min(counted, c(y, level)) for y in targets]
    return sum(shares) / len(shares)


def draw(r: random.Random, count: int) -> list[bytes]:
    return [draw_text(r, draw_length(r, 3_000)) for _ in range(count)]


@pytest.mark.parametrize("level", range(1, 10))
def test_ncd_and_coverage(level: int) -> None:
    seed = random.randrange(1 << 48)
    r = random.Random(seed)
    sources, targets = draw(r, 25), draw(r, 7)
    expected = [naive_alignment(x, targets, level) for x in sources]
    np.testing.assert_allclose(ncd_alignment(sources, targets, level), expected, rtol=0, atol=1e-14, err_msg=str(seed))
    expected = [naive_coverage(x, targets, level) for x in sources]
    np.testing.assert_allclose(coverage(sources, targets, level), expected, rtol=0, atol=1e-14, err_msg=str(seed))


def test_gain() -> None:
    seed = random.randrange(1 << 48)
    r = random.Random(seed)
    sources, targets = draw(r, 150), [CODE[i : i + 700] for i in range(0, 60_000, 700)]
    context = b"".join(targets)[:20_000]
    expected = [(c(x, 6) - c(context + x, 6) + c(context, 6)) / max(c(x, 6), 200) for x in sources]
    np.testing.assert_allclose(gain(sources, targets, 6, 20_000), expected, rtol=0, atol=1e-14, err_msg=str(seed))


def test_what_is_like_the_targets_comes_first() -> None:
    r = random.Random(1)
    targets = [CODE[20_000 + 600 * i :][:600] for i in range(20)]
    code = [CODE[80_000 + 2_000 * i :][:2_000] for i in range(10)]
    words = ["river", "Ocean", "went", "slowly", "and", "north"]
    prose = [" ".join(r.choices(words, k=340)).encode() for _ in range(10)]
    for score in (ncd_alignment, coverage, gain):
        assert score(code, targets).min() > score(prose, targets).max()


def test_inputs() -> None:
    """Strings and bytes, a stream of sources, nothing at all, targets made beforehand; the default level is 9."""
    targets = ["größer", "kleiner"]
    expected = ncd_alignment(["größte"], Targets(targets), level=9)
    assert expected.dtype == np.float64
    assert list(ncd_alignment(iter(["größte".encode()]), iter(targets))) == list(expected)
    for score in (ncd_alignment, coverage, gain):
        assert score([], targets).shape == (0,)
        with pytest.raises(HarnessError, match="no targets"):
            score(["a"], [])
        with pytest.raises(HarnessError, match="level 0"):
            score(["a"], targets, 0)
        with pytest.raises(HarnessError, match="lone surrogate"):
            score(["a\udc00"], targets)


def test_a_few_words_are_like_no_target() -> None:
    """All of them is in any text, and more than half of their compressed bytes are the compressor's own."""
    targets = [CODE[i : i + 900] for i in range(0, 27_000, 900)]
    tiny = [b"a", b"it!", b"return", b"self.x = x", b"import os, sys"]
    real = [CODE[i : i + 2_000] for i in range(40_000, 60_000, 2_000)]
    for score in (coverage, gain):
        assert max(score(tiny, targets)) < min(score(real, targets))
