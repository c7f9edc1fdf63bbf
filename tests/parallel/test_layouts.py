"""Tensor, sequence and ZeRO parallelism follow one rank: real processes on gloo, one launch a world size.

The whole table is in benchmarks/parallel_layouts.json (layout_table.py writes it); here is a pairwise cover of it.
From one layout to another: test_resume_layouts.py.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from harness import runs
from harness.config import plain
from harness.evaluate import EvaluateSection, evaluate
from tests.parallel.layout_table import (
    TOLERANCE,
    all_cases,
    bf16_cases,
    compare,
    compare_bf16,
    launch,
    pairwise_cover,
    train_references,
)

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="stages 1 to 3 need the extra `zero`")

COVER = pairwise_cover(all_cases())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("layouts")
    train_references(place)
    return place


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_layouts_follow_one_rank(folder: Path, world_size: int) -> None:
    cases = [case for case in COVER if case.world_size == world_size]
    jobs = [{"settings": plain(case.settings(folder))} for case in cases]
    half = [case for case in bf16_cases() if case.world_size == world_size == 2]
    jobs += [{"settings": plain(case.settings(folder, "bf16", f"bf16-{case}"))} for case in half]
    launch(world_size, jobs, folder)
    for case in half:
        ours, seeds = compare_bf16(folder, case)
        assert ours < 0.2 * seeds, f"{case}: {ours} beside {seeds} of two seeds"
    for case in cases:
        result = compare(folder / "runs" / str(case), folder / "runs" / case.reference)
        assert result.pop("fell_by") > 0.1, "a loss that stands still proves nothing"
        assert all(result[key] <= TOLERANCE[key] for key in result), f"{case}: {result}"
    trained = folder / "runs" / str(cases[-1])  # on one process now, whatever trained it
    settings = cases[-1].settings(folder)
    found = evaluate(trained, EvaluateSection(samples=10), settings.data, settings.parallel)
    assert found["loss"] == pytest.approx(runs.read(trained).metrics[-1]["validation_loss"], rel=1e-6)
