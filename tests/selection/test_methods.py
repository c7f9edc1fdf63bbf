"""The scorer against the formulas written out, over every compressor, with windows."""

from __future__ import annotations

import math
import pickle
import random
from typing import Any

import numpy as np
import pytest

from harness.config import HarnessError, validate
from harness.selection import ScoreSection, Targets, coverage, gain, ncd_alignment, open_scorer
from harness.selection.codecs import Compressor
from harness.selection.windows import cut_windows
from tests.selection.test_codecs import by_package
from tests.selection.texts import CODE, draw_length, draw_text, unicode

pytestmark = pytest.mark.usefixtures("kernel")

LEVELS: dict[Compressor, int] = {"gzip": 9, "lz4": 0, "zstd": 3}


def naive_score(method: str, compressor: Compressor, x: bytes, targets: list[bytes], context_bytes: int) -> float:
    """One window's, by the formula, with correctly rounded sums."""
    compress, level = by_package(compressor), LEVELS[compressor]

    def c(text: bytes) -> int:
        return len(compress(text, level))

    if method == "gain":
        context = b"".join(targets)[:context_bytes]
        counted = max(c(x), 200)
        return 1 - (c(context + x) - c(context) + counted - c(x)) / counted
    if method == "coverage":
        return math.fsum((c(x) + c(y) - c(x + y)) / min(max(c(x), 200), c(y)) for y in targets) / len(targets)
    return 1 - math.fsum((c(x + y) - min(c(x), c(y))) / max(c(x), c(y)) for y in targets) / len(targets)


@pytest.mark.parametrize("windows", ["mean", "max"])
@pytest.mark.parametrize("compressor", ["gzip", "lz4", "zstd"])
@pytest.mark.parametrize("method", ["ncd", "coverage", "gain"])
def test_scores_are_the_formula_s_to_the_last_bit(method: str, compressor: Compressor, windows: str) -> None:
    seed = random.randrange(1 << 48)
    r = random.Random(seed)
    texts = [draw_text(r, draw_length(r, 4_000)) for _ in range(12)] + [b"", CODE[:1_500]]
    targets = [draw_text(r, draw_length(r, 900)) for _ in range(6)]
    fields: dict[str, Any] = {"method": method, "compressor": compressor, "windows": windows}
    scorer = open_scorer(ScoreSection(**fields, window_bytes=1_000, context_bytes=1_500), Targets(targets))
    expected = []
    for text in texts:
        each = [naive_score(method, compressor, x, targets, 1_500) for x in cut_windows(text, 1_000)]
        expected.append(max(each) if windows == "max" else math.fsum(each) / len(each))
    assert scorer.scores(texts).tolist() == expected, seed
    assert scorer.scores(texts[-1:]).tolist() == expected[-1:], seed
    assert scorer.scores([]).shape == (0,)


def test_the_plain_functions_are_the_scorer_s_without_windows() -> None:
    seed = random.randrange(1 << 48)
    r = random.Random(seed)
    texts, targets = [draw_text(r, draw_length(r, 40_000)) for _ in range(20)], Targets([CODE[:300], CODE[900:2_000]])
    for method, plain in (("ncd", ncd_alignment), ("coverage", coverage), ("gain", gain)):
        section = validate(ScoreSection, {"method": method, "window_bytes": None, "level": 4}, "test")
        assert open_scorer(section, targets).scores(texts).tolist() == plain(texts, targets, 4).tolist(), seed


def test_neither_order_nor_batches_nor_processes_change_a_bit() -> None:
    r = random.Random(5)
    texts = [draw_text(r, draw_length(r, 20_000)) for _ in range(30)]
    targets = [CODE[i : i + 400] for i in range(0, 12_000, 400)]
    scorer = open_scorer(ScoreSection(level=6, window_bytes=2_000), Targets(targets))
    expected = scorer.scores(texts).tolist()
    shuffled = open_scorer(scorer.section, Targets(r.sample(targets, len(targets))))
    assert shuffled.scores(texts).tolist() == expected
    assert [scorer.scores([text])[0] for text in texts] == expected
    copy = pickle.loads(pickle.dumps(scorer))
    assert copy.scores(texts).tolist() == expected
    assert copy.features(texts).tolist() == scorer.features(texts).tolist()
    assert len(pickle.dumps(scorer)) < len(scorer.targets.buffer) + 2_000


@pytest.mark.parametrize("compressor", ["gzip", "lz4", "zstd"])
@pytest.mark.parametrize("windows", ["mean", "max"])
@pytest.mark.parametrize("method", ["ncd", "coverage"])
def test_a_regression_on_the_features_predicts_the_scores(method: str, compressor: Compressor, windows: str) -> None:
    r = random.Random(6)
    cuts = [(r.randrange(len(CODE) - 9_000), r.randint(300, 9_000)) for _ in range(300)]
    texts = [CODE[start : start + length] for start, length in cuts]
    texts += [unicode(r, 900), *(r.randbytes(r.randint(100, 3_000)) for _ in range(60))]
    targets = Targets([CODE[i : i + 200 + 9 * (i // 1_000)] for i in range(50_000, 80_000, 1_000)])
    fields: dict[str, Any] = {"method": method, "compressor": compressor, "windows": windows}
    scorer = open_scorer(ScoreSection(**fields, window_bytes=2_000), targets)
    exact, features = scorer.scores(texts), scorer.features(texts)
    assert features.dtype == np.float32
    assert features.shape[0] == len(texts) == len(scorer.count_windows(texts))
    assert 1 <= 8 * scorer.probes <= scorer.pairs == len(targets)
    columns = np.column_stack([features, np.ones(len(texts))]).astype(np.float64)
    fit, *_ = np.linalg.lstsq(columns[::2], exact[::2], rcond=None)
    residual = exact[1::2] - columns[1::2] @ fit
    assert residual.var() < 0.1 * exact.var()
    assert scorer.features([]).shape == (0, features.shape[1])


@pytest.mark.parametrize("windows", ["mean", "max"])
@pytest.mark.parametrize("method", ["ncd", "coverage"])
def test_features_are_scores_over_single_targets(method: str, windows: str) -> None:
    """Those in the middle of each third, by C(y), of 24 targets, and then what the sketch says."""
    r = random.Random(9)
    texts = [draw_text(r, draw_length(r, 5_000)) for _ in range(40)]
    targets = Targets([draw_text(r, 40 * i) + CODE[:i] for i in r.sample(range(24), 24)])
    fields: dict[str, Any] = {"method": method, "windows": windows}
    section = ScoreSection(**fields, window_bytes=1_000)
    features = open_scorer(section, targets).features(texts)
    order = np.argsort(targets.sizes(9), kind="stable")
    for column, index in zip(features.T, order[[4, 12, 20]], strict=False):
        expected = open_scorer(section, targets.take([index])).scores(texts)
        np.testing.assert_allclose(column, expected, atol=1e-7)
    assert features.shape == (40, 3 + 2)


def test_gain_is_not_raced() -> None:
    scorer = open_scorer(ScoreSection(method="gain"), Targets([b"abc"]))
    assert not scorer.can_race
    assert open_scorer(ScoreSection(), Targets([b"abc"])).can_race
    for predictors in (scorer.features, scorer.sketch):
        with pytest.raises(HarnessError, match="nothing cheaper"):
            predictors([b"abc"])


def test_windows() -> None:
    r = random.Random(7)
    for text in (CODE[:10_001], unicode(r, 5_000), r.randbytes(9_999), b"\x80" * 3_000, b"ab" * 500, b""):
        for size in (64, 1_000, 1_001, 5_000):
            windows = cut_windows(text, size)
            assert b"".join(windows) == text
            assert len(windows) == max(1, -(-len(text) // size))
            assert max(map(len, windows)) <= min(len(text), size + 3)
            assert max(map(len, windows)) - min(map(len, windows)) <= 7
    for window in cut_windows(unicode(r, 5_000), 777):
        window.decode()
    assert cut_windows(CODE, None) == [CODE]
    scorer = open_scorer(ScoreSection(), Targets([b"abc"]))
    assert scorer.count_windows([b"", CODE[:8_192], CODE[:8_193], CODE[:24_577]]).tolist() == [1, 1, 2, 4]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"level": 0}, "shortest first"),
        ({"compressor": "lz4", "level": 16}, "0 to 12"),
        ({"compressor": "zstd", "level": 0}, "default, 3"),
        ({"window_bytes": 0}, "window_bytes"),
        ({"method": "ndc"}, "method"),
        ({"compressor": "bzip2"}, "compressor"),
    ],
)
def test_settings_that_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(HarnessError, match=said):
        validate(ScoreSection, values, "test")


def test_levels() -> None:
    assert [ScoreSection(compressor=name).effective_level for name in LEVELS] == list(LEVELS.values())
    assert ScoreSection(level=1).effective_level == 1
