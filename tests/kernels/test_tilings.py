"""Which tiles and blocks are chosen: the table, what was measured, and the memory that blocks may take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.kernels import interpreter

if interpreter.why_not() is not None:
    pytest.skip(str(interpreter.why_not()), allow_module_level=True)

from harness.kernels.linear_cross_entropy.fused import launch, plan, tilings
from harness.kernels.linear_cross_entropy.fused.tilings import KERNELS, ProblemClass, Tiling

CLASSES = [
    ProblemClass(kernel, capability, element_bytes, rich, few)
    for kernel in KERNELS
    for capability in (0, 80, 86, 90, 100)
    for element_bytes in (2, 4)
    for rich in (False, True)
    for few in (False, True)
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tilings._read_cache.cache_clear()
    yield tilings.cache_file()
    tilings._read_cache.cache_clear()


def test_every_class_has_a_tiling_with_and_without_descriptors() -> None:
    for problem in CLASSES:
        assert not tilings.choose(problem, describable=False).descriptors
        chosen = tilings.choose(problem, describable=True)
        assert chosen.descriptors == (problem.capability >= 90 and problem.element_bytes == 2)
        for tiling in tilings.candidates(problem):
            assert plan.MULTIPLE % tiling.tokens == plan.MULTIPLE % tiling.columns == 0, "blocks hold whole tiles"


def test_the_fastest_is_remembered(cache: Path) -> None:
    problem = ProblemClass("gradient", 90, 2, False, False)
    table = tilings.candidates(problem)
    fastest = table[2]

    def measure(tiling: Tiling) -> float:
        if tiling is table[0]:
            raise RuntimeError("out of resource: shared memory")
        return 1.0 if tiling == fastest else 2.0

    assert tilings.tune(problem, measure, describable=True) == fastest
    assert tilings.choose(problem, describable=True) == fastest
    assert tilings.choose(ProblemClass("facts", 90, 2, False, False), describable=True) == table[0]
    assert not tilings.choose(problem, describable=False).descriptors
    assert list(json.loads(cache.read_text())) == [problem.key]


def test_a_cache_that_cannot_be_read_is_said_and_not_used(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("{")
    problem = CLASSES[0]
    assert tilings.choose(problem, describable=False) == tilings.candidates(problem)[0]
    assert "tilings come from the table" in caplog.text


def test_nothing_can_be_tuned_where_nothing_runs() -> None:
    def fail(tiling: Tiling) -> float:
        raise RuntimeError("no device")

    with pytest.raises(RuntimeError, match="no tiling of gradient runs here"):
        tilings.tune(ProblemClass("gradient", 90, 2, False, False), fail, describable=True)


@pytest.mark.parametrize(("tokens", "columns", "width"), [
    (8192, 256000, 2304), (8192, 128256, 4096), (32768, 50304, 768), (4096, 151936, 5120), (1, 1, 1), (100_000, 3, 8),
    (300_000, 50257, 768), (7, 1_000_000, 64),
])  # fmt: skip
def test_blocks_stay_within_the_workspace(tokens: int, columns: int, width: int) -> None:
    for parts in (1, 4):
        found = plan.plan_blocks(tokens, columns, width, 2, parts=parts)
        budget = max(0.01 * 4 * (tokens + columns) * width, min(64 << 20, 2 * 1.4e11 / (6 * width)))
        assert min(found.chunk, tokens) * min(found.strip, columns) * 2 <= budget
        assert found.chunk % plan.MULTIPLE == found.strip % plan.MULTIPLE == 0
        chunks = -(-tokens // found.chunk)
        assert chunks >= min(parts, tokens // plan.MULTIPLE)


def test_splits_fill_the_device() -> None:
    for token_tiles, column_tiles in ((64, 1000), (1, 197), (256, 197), (33, 500), (1, 1), (500, 3)):
        tiles = launch._tiles_a_split(token_tiles, column_tiles, 132)
        items = token_tiles * -(-column_tiles // tiles)
        rounds = -(-items // 132)
        busy = token_tiles * column_tiles / (132 * rounds * tiles)
        assert busy >= min(0.85, 0.5 * token_tiles * column_tiles / 132), (token_tiles, column_tiles, busy)


def test_descriptors_need_aligned_rows_that_lie_side_by_side() -> None:
    base = torch.zeros(64, 72, dtype=torch.bfloat16)
    assert launch.describes(base)
    assert launch.describes(base[3:, :40])
    assert not launch.describes(base[:, 1:])
    assert not launch.describes(base.t())
    assert not launch.describes(torch.zeros(64, 71, dtype=torch.bfloat16))
    assert not launch.describes(base[:1].expand(64, 72))
