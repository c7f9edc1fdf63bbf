"""Compressed sizes are gzip.compress's own, to the byte, whichever way they are computed."""

from __future__ import annotations

import gzip
import logging
import pickle
import random
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.config import HarnessError
from harness.selection import Targets, compressed_sizes, current_implementation, sizes
from tests.selection.texts import CODE, draw_length, draw_targets, draw_text, without_repeats

LEVELS = range(1, 10)
FAST = ("native", "zlib")


def check(source: bytes, targets: list[bytes], level: int, note: object = "") -> int:
    """Compare with gzip.compress; return how many sizes were compared."""
    expected = [len(gzip.compress(source + target, level)) for target in [b"", *targets]]
    for implementation in FAST:
        alone, together = compressed_sizes(source, Targets(targets), level, implementation)
        assert [alone, *together] == expected, f"{implementation}, level {level}, {len(source)} B, {note}"
    return len(expected)


def check_random_pairs(pairs: int, longest: int) -> None:
    seed = random.randrange(1 << 48)
    r = random.Random(seed)
    while pairs > 0:
        source = draw_text(r, draw_length(r, longest))
        targets = draw_targets(r, source, 6)
        for level in r.sample(LEVELS, 3):
            pairs -= check(source, targets, level, f"seed {seed}")


@pytest.mark.usefixtures("kernel")
def test_random_pairs() -> None:
    check_random_pairs(2_500, 200_000)
    check_random_pairs(4_000, 5_000)


@pytest.mark.slow
@pytest.mark.usefixtures("kernel")
def test_a_hundred_thousand_random_pairs() -> None:
    check_random_pairs(50_000, 200_000)
    check_random_pairs(100_000, 20_000)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("level", LEVELS)
def test_all_short_lengths(level: int) -> None:
    """Sources and targets of 0 to 9 bytes, where a hash may need both, of one letter and of several."""
    for letters in (b"aaaaaaaaaaaaaaaaaaaaaaa", b"abcabcabcabdabcabcabcdab"):
        for length in range(10):
            source, rest = letters[:length], letters[length:]
            check(source, [rest[:count] for count in range(10)], level)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("level", LEVELS)
def test_repeats_that_begin_in_the_source_and_end_in_the_target(level: int) -> None:
    r = random.Random(level)
    text = draw_text(r, 0) + CODE[5_000:7_000]
    whole = text + text[300:1_300]
    for cut in (1_998, 1_999, 2_000, 2_001, 2_002, 2_100, 2_257, 2_258, 2_259, 2_262, 2_500):
        targets = [whole[cut : cut + count] for count in (0, 1, 2, 3, 100, 258, 259, 262, 500, 1_000)]
        check(whole[:cut], targets, level, cut)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("level", LEVELS)
def test_periods_that_source_and_target_share(level: int) -> None:
    """Much that repeats at several distances at once, within the target and across the source's end."""
    seed = random.randrange(1 << 48)
    r = random.Random(seed)
    for _ in range(40):
        pieces = [bytes(r.choices(b"abcd", k=r.randint(1, 12))) for _ in range(3)]
        whole = b"".join(r.choices(pieces, k=60))
        cut = r.randrange(len(whole))
        check(whole[:cut], [whole[cut : cut + r.randint(0, 300)] for _ in range(6)], level, f"seed {seed}")


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("level", [1, 4, 9])
@pytest.mark.parametrize("distance", range(32_504, 32_509))
def test_repeats_from_as_far_back_as_the_window_allows(level: int, distance: int) -> None:
    """32,506 is allowed to the nearest candidate alone."""
    r = random.Random(distance)
    source = bytes(byte & 127 for byte in r.randbytes(33_000))
    far = source[len(source) - distance :]
    near = source[:30_000] + far[5:9] + source[30_004:]
    check(source, [far[:count] for count in (3, 4, 5, 258, 300, 480)] + [b"\xff" + far[1:300]], level)
    check(near, [far[:count] for count in (8, 9, 300)], level)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("level", LEVELS)
def test_a_block_that_ends_in_source_or_target(level: int) -> None:
    """A block ends with its 16,383rd symbol; with the last of all, an empty one follows at levels 1 to 3."""
    literals = without_repeats(32_200)
    for length in (16_381, 16_382, 16_383, 16_384):
        check(literals[:length], [literals[length : length + count] for count in (0, 1, 2, 3, 16_000)], level, length)
        compressible = bytes(byte & 15 for byte in literals[:length]) + literals[:4]
        check(compressible, [literals[4:count] for count in (4, 5, 400)], level, length)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("windows", "seed"), [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)])
def test_input_that_runs_out_where_the_window_moves(windows: int, seed: int) -> None:
    """A repeat from exactly MAX_DIST back is lost if the window has moved, which depends on how input arrives."""
    r = random.Random(seed)
    head = bytes(byte & 127 for byte in r.randbytes(65_274 + 32_768 * windows))  # few repeats, not stored
    whole = head + head[-32_506:][:700]
    for level in (1, 9):
        for extra in (0, 100, 261, 262):
            cut = len(head) + extra
            check(whole[:cut], [whole[cut : cut + n] for n in (0, 1, 161, 162, 300)], level, extra)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("level", LEVELS)
def test_targets_leave_nothing_behind(level: int) -> None:
    """In any order, and again, and from several threads at once, the sizes are the same."""
    seed = random.randrange(1 << 48)
    r = random.Random(seed)
    for length in (2_000, 17_000, 66_000):
        source = draw_text(r, length)
        texts = draw_targets(r, source, 40)
        targets = Targets([*texts, texts[0]])
        alone, first = compressed_sizes(source, targets, level, "native")
        assert first[0] == first[-1], seed
        order = r.sample(range(len(texts)), len(texts))
        shuffled = compressed_sizes(source, targets.take(order), level, "native")[1]
        assert list(shuffled) == [first[i] for i in order], seed
        sources = [source, *(draw_text(r, 1_000 * i) for i in range(6))] * 3
        with ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(compressed_sizes, each, targets, level, "native") for each in sources]
        for again in (job.result() for job in jobs[::7]):
            assert again[0] == alone, seed
            assert np.array_equal(again[1], first), seed


@pytest.fixture
def undecided() -> Iterator[None]:
    current_implementation.cache_clear()
    yield
    current_implementation.cache_clear()


@pytest.mark.usefixtures("kernel", "undecided")
def test_the_kernel_is_used_where_it_agrees(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "harness.selection"):
        assert current_implementation().name == "native"
    assert "compressed sizes by native" in caplog.text


@pytest.mark.usefixtures("kernel", "undecided")
@pytest.mark.parametrize("wrong_at", [1, 9])
def test_the_kernel_is_refused_where_gzip_gives_other_bytes(
    wrong_at: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As with zlib-ng in zlib's place: one level's sizes differ by a byte for one kind of input."""

    def kernel(sources: list[bytes], targets: Targets, level: int) -> tuple[np.ndarray, np.ndarray]:
        alone, together = by_kernel(sources, targets, level)
        return alone, together + (level == wrong_at and len(sources[0]) > 60_000)

    by_kernel = sizes._sizes_by_kernel
    monkeypatch.setattr(sizes, "_sizes_by_kernel", kernel)
    assert current_implementation().name == "zlib"
    assert "the native kernel's sizes are not those of zlib" in caplog.text
    monkeypatch.setattr(sizes, "_sizes_by_copies", lambda source, targets, level: [1] * (1 + len(targets)))
    current_implementation.cache_clear()
    assert current_implementation().name == "naive"
    targets = Targets([CODE[:500], b""])
    expected = [len(gzip.compress(CODE[9:900] + target, 5)) for target in targets]
    assert list(compressed_sizes(CODE[9:900], targets, 5)[1]) == expected


@pytest.mark.usefixtures("kernel")
def test_what_is_too_long_for_the_kernel_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sizes, "LONGEST_NATIVE", 5_000)
    sizes._say_too_long.cache_clear()
    for length in (4_000, 4_001, 4_002):
        check(CODE[:length], [CODE[:1_000]], 9)
        assert len(caplog.records) == (length > 4_000)
    assert "slower" in caplog.text


@pytest.mark.usefixtures("undecided")
def test_without_the_kernel_python_alone_gives_the_sizes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "harness.selection.deflate_sizes", None)  # the import system's word for absent
    monkeypatch.delattr("harness.selection.deflate_sizes", raising=False)
    assert current_implementation().name == "zlib"
    assert "the native kernel is not in this installation" in caplog.text
    source, target = CODE[:3_000], CODE[2_000:2_500]
    alone, together = compressed_sizes(source, Targets([target]), 9)
    assert (alone, together[0]) == (len(gzip.compress(source)), len(gzip.compress(source + target)))


@pytest.mark.usefixtures("undecided")
def test_a_kernel_that_cannot_be_loaded_says_what_the_system_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "deflate_sizes.abi3.so").write_bytes(b"of another machine")
    monkeypatch.setattr("harness.selection.__path__", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "harness.selection.deflate_sizes", raising=False)
    assert current_implementation().name == "zlib"
    assert "the native kernel is there but cannot be loaded (" in caplog.text
    assert "deflate_sizes.abi3.so: " in caplog.text
    assert "compile" not in caplog.text


@pytest.mark.parametrize("wanted", [2_000, 40_000])
def test_the_window_of_the_copies_is_no_larger_than_needed(wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The price of a copy is the window's: 4 KiB hold 3,834 bytes, and what does not fit takes 32."""
    windows = []

    def compressobj(*arguments: Any) -> Any:
        windows.append(-arguments[2])
        return made(*arguments)

    made = zlib.compressobj
    monkeypatch.setattr(zlib, "compressobj", compressobj)
    compressed_sizes(bytes(wanted), Targets([bytes(1_834)]), 9, "zlib")
    compressed_sizes(bytes(wanted), Targets([bytes(1_835)]), 9, "zlib")
    assert windows == ([12, 13] if wanted == 2_000 else [15, 15])


@pytest.mark.parametrize(("level", "said"), [(0, "shortest first"), (10, "1 to 9"), (-1, "1 to 9")])
def test_levels_that_are_refused(level: int, said: str) -> None:
    with pytest.raises(HarnessError, match=said):
        compressed_sizes(b"abc", Targets([b"abc"]), level)
    with pytest.raises(HarnessError, match=said):
        Targets([b"abc"]).sizes(level)


@pytest.mark.usefixtures("kernel")
def test_the_kernel_refuses_buffers_that_do_not_fit() -> None:
    from harness.selection import deflate_sizes

    offsets = np.array([0, 2, 4])
    prepared = deflate_sizes.prepare(b"abcd", offsets, 9)
    one, two, three = (np.empty(count, np.int64) for count in (1, 2, 3))
    source = np.array([0, 3])
    for alone, together in ((two, two), (one, one), (one, three)):
        with pytest.raises(ValueError, match="one int64 a source"):
            deflate_sizes.sizes(prepared, b"abc", source, alone, together)
    weights = np.zeros(1 << 16, np.uint16)
    for wrong in ([0, 3, 2], [0, 2, 5], [1, 2, 4], [0, 5, 4], [0, -1, 4]):
        with pytest.raises(ValueError, match="must ascend"):
            deflate_sizes.prepare(b"abcd", np.array(wrong), 9)
        with pytest.raises(ValueError, match="must ascend"):
            deflate_sizes.sizes(prepared, b"abcd", np.array(wrong), two, np.empty(4, np.int64))
        with pytest.raises(ValueError, match="must ascend"):
            deflate_sizes.grams(weights, b"abcd", np.array(wrong), np.empty(4, np.int64))
    with pytest.raises(ValueError, match="65,536"):
        deflate_sizes.grams(weights[1:], b"abc", source, two)
    with pytest.raises(ValueError, match="two int64 a source"):
        deflate_sizes.grams(weights, b"abc", source, one)
    with pytest.raises(ValueError, match="one more than"):
        deflate_sizes.prepare(b"abcd", b"", 9)
    with pytest.raises(ValueError, match="1 to 9"):
        deflate_sizes.prepare(b"abcd", offsets, 0)
    with pytest.raises(BufferError):
        deflate_sizes.sizes(prepared, b"abc", source, one, bytes(16))


def test_targets() -> None:
    texts = ["def f():\n", b"\xff\x00", "é", b""]
    targets = Targets(texts)
    assert list(targets) == [b"def f():\n", b"\xff\x00", "é".encode(), b""]
    assert targets[-1] == b""
    assert list(targets.take([2, 0, 2])) == ["é".encode(), b"def f():\n", "é".encode()]
    assert targets.longest == 9
    assert list(targets.sizes(3)) == [len(gzip.compress(text, 3)) for text in targets]
    compressed_sizes(b"abc", targets, 9)
    again = pickle.loads(pickle.dumps(targets))
    assert list(again) == list(targets)
    assert np.array_equal(again.sizes(3), targets.sizes(3))


def test_targets_that_are_refused() -> None:
    with pytest.raises(HarnessError, match="no targets"):
        Targets([])
    with pytest.raises(HarnessError, match=r"lone surrogate \(U\+D800 at character 1\)"):
        Targets(["a\ud800"])
