"""Sizes by every compressor against the packages themselves."""

from __future__ import annotations

import gzip
import random
import sys
from collections.abc import Callable

import numpy as np
import pytest

from harness.config import HarnessError
from harness.selection import Targets
from harness.selection.codecs import DEFAULT_LEVELS, Codec, Compressor
from tests.selection.texts import draw_length, draw_text

pytestmark = pytest.mark.usefixtures("kernel")


def by_package(compressor: Compressor) -> Callable[[bytes, int], bytes]:
    if compressor == "gzip":
        return gzip.compress
    if compressor == "zstd":
        zstandard = pytest.importorskip("zstandard")
        return lambda text, level: zstandard.ZstdCompressor(level=level).compress(text)
    frame = pytest.importorskip("lz4.frame")
    return lambda text, level: frame.compress(text, compression_level=level)


@pytest.mark.parametrize(
    ("compressor", "levels"), [("gzip", (1, 6, 9)), ("lz4", (0, 1, 3, 9, 12)), ("zstd", (1, 3, 9, 19))]
)
def test_sizes_are_the_packages_own(compressor: Compressor, levels: tuple[int, ...]) -> None:
    compress = by_package(compressor)
    seed = random.randrange(1 << 48)
    r = random.Random(seed)
    sources = [draw_text(r, draw_length(r, 70_000)) for _ in range(12)] + [b"", r.randbytes(66_000)]
    texts = [draw_text(r, draw_length(r, 2_000)) for _ in range(5)] + [b"", sources[-1][-40_000:]]
    for level in levels:
        codec = Codec(compressor, level)
        alone, together = codec.pair_sizes(sources, Targets(texts))
        expected = [[len(compress(x + y, level)) for y in texts] for x in sources]
        assert together.tolist() == expected, (seed, level)
        assert alone.tolist() == codec.sizes(sources).tolist() == [len(compress(x, level)) for x in sources], seed
        assert codec.sizes([]).dtype == codec.pair_sizes([], Targets(texts))[1].dtype == np.int64
        assert codec.pair_sizes([], Targets(texts))[1].shape == (0, 7)


def test_default_levels_are_the_packages_own() -> None:
    """For gzip, Python's function's."""
    zstandard, frame = pytest.importorskip("zstandard"), pytest.importorskip("lz4.frame")
    text = draw_text(random.Random(3), 0) + b"".join(b"%d " % (n * n % 977) for n in range(2_000))
    expected = {
        "gzip": len(gzip.compress(text)),
        "lz4": len(frame.compress(text)),
        "zstd": len(zstandard.ZstdCompressor().compress(text)),
    }
    assert {name: Codec(name, level).sizes([text])[0] for name, level in DEFAULT_LEVELS.items()} == expected


@pytest.mark.parametrize(
    ("compressor", "level", "said"),
    [
        ("gzip", 0, "shortest first"),
        ("gzip", 10, "1 to 9"),
        ("lz4", -1, "negative ones search less"),
        ("lz4", 13, "0 to 12"),
        ("zstd", 0, "default, 3"),
        ("zstd", 23, "1 to 22"),
        ("zstd", -1, "negative ones leave"),
    ],
)
def test_levels_that_are_refused(compressor: Compressor, level: int, said: str) -> None:
    with pytest.raises(HarnessError, match=said):
        Codec(compressor, level)


def test_without_lz4_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lz4.frame", None)  # the import system's word for absent
    with pytest.raises(HarnessError, match="pip install lz4"):
        Codec("lz4", 0)
    Codec("zstd", 3)
