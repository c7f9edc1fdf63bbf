"""Sigma, modes and losses of a removal are those of one rank on every layout, and it goes on on another one."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from harness import runs
from harness.config import plain
from harness.parallel import ParallelLayout, ParallelSection
from harness.settings import Settings
from tests.normfree.small_removal import small_removal
from tests.normfree.test_removal import removal_state
from tests.parallel.layout_table import launch
from tests.parallel.layout_worker import run_job

STEPS, HALF = 16, 8
SIGMA = 1e-6
"""Relative, of every sigma that is in a checkpoint."""
LOSS = 5e-6
"""Relative. Sums of gradients in another order round differently, and AdamW's first steps magnify what is near zero;
what a wrong sigma of one site does is of the order of 1e-3."""
ONE = "one"
LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {
    # Processes, parallel section, sequences of a micro-batch (of 8 a step).
    ONE: (1, {}, 8),
    "one, accumulated": (1, {}, 2),
    "tp1-dp2": (2, {}, 4),
    "tp2-dp1": (2, {"tensor": 2}, 4),
    "tp2-dp1-sp": (2, {"tensor": 2, "sequence_parallel": True}, 8),
    "tp1-dp4": (4, {}, 1),
    "tp2-dp2": (4, {"tensor": 2}, 2),
    "tp2-dp2-sp": (4, {"tensor": 2, "sequence_parallel": True}, 4),
}
ZERO: dict[str, tuple[int, dict[str, Any], int]] = {
    "tp1-dp2-zero1": (2, {"zero_stage": 1}, 2),
    "tp2-dp2-zero3-sp": (4, {"tensor": 2, "zero_stage": 3, "sequence_parallel": True}, 2),
}
if find_spec("deepspeed") is not None:
    LAYOUTS |= ZERO
FAMILIES = ("gpt2", "llama")
GOES_ON = [("tp2-dp2-sp", ONE), (ONE, "tp2-dp2")]
"""Saved in the middle of the removal by the first, and continued by the second."""


def settings_of(folder: Path, family: str, layout: str, name: str) -> Settings:
    _, parallel, micro = LAYOUTS[layout]
    return small_removal(
        folder,
        family,
        run={"name": name},
        parallel={"device": "cpu", "threads": 1, **parallel},
        data={"document_masking": True},
        train={"steps": STEPS, "global_batch_size": 8, "micro_batch_size": micro},
        optimizer={"learning_rate": 1e-3, "epsilon": 1e-4},
        norm_removal={"ramp_steps": 3, "auxiliary": {"weight": 0.3, "relative": True}},
        validation={"enabled": False},
        checkpoint={"every_steps": HALF, "keep_last": None, "asynchronous": False},
    )


def job(folder: Path, family: str, layout: str, after: str | None = None) -> dict[str, Any]:
    name = f"{family}-{layout}" + (f"-after-{after}" if after else "")
    settings = settings_of(folder, family, layout, name)
    found: dict[str, Any] = {"settings": plain(settings)}
    if after:
        found["after"] = [str(settings.run.path.with_name(f"{family}-{after}")), HALF]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With all runs in it: one launch a world size."""
    folder = tmp_path_factory.mktemp("layouts")
    for world in (1, 4, 2):
        jobs = [job(folder, f, layout) for f in FAMILIES for layout in LAYOUTS if LAYOUTS[layout][0] == world]
        jobs += [job(folder, f, to, start) for f in FAMILIES for start, to in GOES_ON if LAYOUTS[to][0] == world > 1]
        if world > 1:
            launch(world, jobs, folder)
            continue
        with ParallelLayout(ParallelSection(device="cpu", threads=1)) as layout:
            for each in jobs:
                run_job(each, layout)
    with ParallelLayout(ParallelSection(device="cpu", threads=1)) as layout:
        for family in FAMILIES:
            for start, to in GOES_ON:
                if LAYOUTS[to][0] == 1:
                    run_job(job(folder, family, to, start), layout)
    return folder


def compare(folder: Path, family: str, name: str) -> None:
    run, truth = (folder / "runs" / f"{family}-{each}" for each in (name, ONE))
    mine, theirs = runs.read(run).metrics, runs.read(truth).metrics
    assert [record["step"] for record in mine] == list(range(1, STEPS + 1))
    for record, expected in zip(mine, theirs, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=LOSS), record["step"]
        assert record["norm_sites_left"] == expected["norm_sites_left"]
        for column in ("final_sigma", "final_sigma_ratio"):
            assert record[column] == pytest.approx(expected[column], rel=10 * SIGMA), record["step"]
    for step in (HALF, STEPS):
        states, expected_states = removal_state(run, step), removal_state(truth, step)
        assert states["began"] == expected_states["began"]
        for site, state in states["sites"].items():
            expected = expected_states["sites"][site]
            assert state["alpha"] == expected["alpha"]
            if expected["sigma"] is None:
                assert state["sigma"] is None
            else:
                assert state["sigma"] == pytest.approx(expected["sigma"], rel=SIGMA), (step, site)
        for site, average in states["averages"]["sites"].items():
            assert average == pytest.approx(expected_states["averages"]["sites"][site], rel=SIGMA), (step, site)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != ONE])
def test_sigma_and_modes_are_those_of_one_rank(folder: Path, family: str, layout: str) -> None:
    compare(folder, family, layout)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("start", "to"), GOES_ON)
def test_a_removal_goes_on_on_another_layout(folder: Path, family: str, start: str, to: str) -> None:
    compare(folder, family, f"{to}-after-{start}")


def test_all_sites_go_within_the_runs_and_across_the_save(folder: Path) -> None:
    """Else the tests above would compare less than they say."""
    for family in FAMILIES:
        half, whole = (removal_state(folder / "runs" / f"{family}-{ONE}", step) for step in (HALF, STEPS))
        alphas = {state["alpha"] for state in half["sites"].values()}
        assert {0.0, 1.0} < alphas, "real, frozen, and on the way"
        assert {state["alpha"] for state in whole["sites"].values()} == {1.0}
