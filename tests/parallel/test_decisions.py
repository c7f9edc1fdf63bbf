"""A fault, a signal or a full disk on one rank of four: all ranks decide the same at the same step, and a resume
replays it. Real processes on gloo; decisions_worker.py has the injections."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from harness import runs
from harness.checkpoint import CheckpointStore
from tests.test_train import series

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="stages 1 to 3 need the extra `zero`")
ROOT = Path(__file__).parents[2]
MARKS = {"dp4-zero0": pytest.mark.slow}  # the same decisions again
LAYOUTS = {
    "tp2-dp2-zero1": {"tensor": 2, "sequence_parallel": True, "zero_stage": 1},
    "dp4-zero0": {"tensor": 1, "zero_stage": 0},
}


@pytest.fixture(
    scope="module", params=[pytest.param(LAYOUTS[name], id=name, marks=MARKS.get(name, ())) for name in LAYOUTS]
)
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder, and what the ranks saw, which must be the same on each."""
    folder = tmp_path_factory.mktemp("decisions")
    worker = Path(__file__).with_name("decisions_worker.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    done = subprocess.run(
        [*launch, str(worker), str(folder), json.dumps(request.param)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    views = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]
    for name, first in views[0].items():
        for view in views[1:]:
            for ours, theirs in zip(view[name], first, strict=True):
                assert (ours[0] is None) == (theirs[0] is None)
                assert ours[1] == theirs[1], f"{name}: the ranks decided differently"
    return folder / "runs", views[0]


def kinds(folder: Path) -> list[tuple[str, int]]:
    told = ("skipped", "rolled_back", "save_failed", "stopped")
    return [(event["event"], event["step"]) for event in runs.read(folder).events if event["event"] in told]


def test_nan_stop(job: tuple[Path, dict[str, Any]]) -> None:
    folder, seen = job
    ((outcome, decided),) = seen["nan-stop"]
    assert outcome.startswith("FaultError: step 9: the loss is nan; stopped before the optimizer step")
    assert decided == [["non_finite", "stop"]]
    assert series(folder / "nan-stop") == series(folder / "whole")[:8]


def test_nan_skip(job: tuple[Path, dict[str, Any]]) -> None:
    folder, seen = job
    assert seen["nan-skip"] == [[[14, None], [["non_finite", "skip"]]]]
    assert kinds(folder / "nan-skip") == [("skipped", 9)]
    ours, whole = series(folder / "nan-skip"), series(folder / "whole")
    assert ours[:8] == whole[:8]
    assert [record["step"] for record in ours if "skipped" in record] == [9]
    assert len(ours) == 14


def test_nan_rollback_and_its_replay(job: tuple[Path, dict[str, Any]]) -> None:
    folder, seen = job
    assert seen["nan-rollback"] == [[[14, None], [["non_finite", "rollback"]]]]
    assert kinds(folder / "nan-rollback") == [("rolled_back", 9)]
    ours = series(folder / "nan-rollback")
    assert [record["step"] for record in ours] == list(range(1, 15))
    assert ours[:6] == series(folder / "whole")[:6]
    assert ours[6:9] != series(folder / "whole")[6:9]
    for name in ("nan-killed", "nan-killed-later"):
        assert [outcome for outcome, _ in seen[name]] == ["killed", [14, None]]
        assert series(folder / name) == ours, "a resume replays what was decided"
        store = CheckpointStore(folder / name / "checkpoints")
        assert store.read_state(14)["stream"]["skipped"] == [[24, 36]]
        assert kinds(folder / name) == [("rolled_back", 9)]


@pytest.mark.parametrize(("policy", "event"), [("skip", "skipped"), ("rollback", "rolled_back")])
def test_a_spike_on_one_rank(job: tuple[Path, dict[str, Any]], policy: str, event: str) -> None:
    folder, seen = job
    assert seen[f"spike-{policy}"] == [[[14, None], [["spike", policy]]]]
    assert kinds(folder / f"spike-{policy}") == [(event, 8)]
    assert [record["step"] for record in series(folder / f"spike-{policy}")] == list(range(1, 15))


def test_a_signal_to_one_rank_stops_all(job: tuple[Path, dict[str, Any]]) -> None:
    folder, seen = job
    assert [outcome[0] for outcome, _ in seen["asked"]] == [5, 14]
    assert seen["asked"][0][0][1] is not None
    assert kinds(folder / "asked") == [("stopped", 5)]
    assert series(folder / "asked") == series(folder / "whole")


def test_a_disk_that_refuses_one_rank(job: tuple[Path, dict[str, Any]]) -> None:
    """No rank has a checkpoint then, and all try again."""
    folder, seen = job
    assert seen["full"][0][0] == [14, None]
    assert series(folder / "full") == series(folder / "whole")
    assert {kind for kind, _ in kinds(folder / "full")} == {"save_failed"}
    store = CheckpointStore(folder / "full" / "checkpoints")
    assert 4 not in store.steps()
    assert 14 in store.steps()
    assert all(store.verify(step) == [] for step in store.steps())
