"""Checkpoints are of no layout: each of six is saved and goes on on another, in a circle; two go on on their own.

The whole matrix is in benchmarks/checkpoint_layouts.json (resume_table.py writes it).
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

from harness.parallel import ParallelLayout, ParallelSection
from tests.parallel.layout_table import launch
from tests.parallel.layout_worker import run_job
from tests.parallel.resume_table import (
    FP32,
    ONE,
    SIZES,
    Pair,
    compare_pair,
    problem,
    resume_job,
    source_job,
    world_size,
)

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="stages 1 to 3 need the extra `zero`")

SERIES = replace(FP32, saved_step=4, steps=8)
# Each launch finds what it goes on from in an earlier one, or among its own runs.
WORLD_SIZES = (4, 3, 2)
CIRCLE = [ONE, *(layout for world in WORLD_SIZES for layout in SIZES if world_size(layout) == world), ONE]
PAIRS = [Pair(SERIES, save, load) for save, load in pairwise(CIRCLE)]
PAIRS += [Pair(SERIES, layout, layout) for layout in ("tp2-dp2-zero3-sp", "tp1-dp2-zero1")]


def test_checkpoints_are_of_no_layout(tmp_path: Path) -> None:
    assert {pair.save for pair in PAIRS} == {pair.load for pair in PAIRS} == set(SIZES)
    with ParallelLayout(ParallelSection(device="cpu", threads=1)) as layout:
        run_job(source_job(tmp_path, SERIES, ONE), layout)
    for world in WORLD_SIZES:
        jobs = [source_job(tmp_path, SERIES, layout) for layout in SIZES if world_size(layout) == world]
        jobs += [resume_job(tmp_path, pair) for pair in PAIRS if world_size(pair.load) == world]
        launch(world, jobs, tmp_path)
    with ParallelLayout(ParallelSection(device="cpu", threads=1)) as layout:
        for pair in PAIRS:
            if pair.load == ONE:
                run_job(resume_job(tmp_path, pair), layout)
    for pair in PAIRS:
        row = compare_pair(tmp_path, pair)
        assert problem(pair, row) is None, f"{pair.name}: {problem(pair, row)}: {row}"
