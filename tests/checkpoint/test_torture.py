"""The short form of tools/torture_checkpoints.py, and that what it looks with sees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.runs import RunFolder
from harness.runs.event_files import EventFileWriter
from tests.checkpoint.kills import POINTS
from tests.checkpoint.records import BrokenRunError, check_tensorboard, difference, series

TOOL = Path(__file__).resolve().parents[2] / "tools" / "torture_checkpoints.py"
VARIANTS = ("2 ranks, data", "gpt2, dropout, bf16, spike, rollback")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs fork, and Linux's /proc")
def test_killed_at_every_point_and_still_the_same_run(tmp_path: Path) -> None:
    """One run on one rank, that is rolled back, and one on two; some kills at random times may come on top."""
    out = tmp_path / "figures.json"
    command = [sys.executable, str(TOOL), "--kills", "16", "--least", "1", "--folder", str(tmp_path), "--out", str(out)]
    result = subprocess.run(
        [*command, "--variants", *VARIANTS],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )
    assert result.returncode == 0, result.stdout
    figures = json.loads(out.read_text())
    assert figures["kills"] == sum(figures["kills_by_point"].values()) >= 16
    assert {point for point in POINTS if figures["kills_by_point"].get(point, 0) < 1} == set()
    assert figures["kills_of_two_ranks"] > 0
    assert [path.name for path in tmp_path.iterdir()] == [out.name], "nothing is left where nothing was wrong"


def record(folder: Path, losses: list[float], *, resume_at: int | None = None) -> None:
    with RunFolder(folder) as run:
        run.begin("{}", resume_at=resume_at)
        for step, loss in enumerate(losses, (resume_at or 0) + 1):
            run.log_metrics(step, {"loss": loss, "step_seconds": step + 0.5})


def test_a_resumed_series_is_that_of_an_undisturbed_run(tmp_path: Path) -> None:
    record(tmp_path / "whole", [4.0, 3.0, 2.0, 1.0])
    record(tmp_path / "resumed", [4.0, 3.0, 9.0])
    assert "9.0" in difference(series(tmp_path / "resumed"), series(tmp_path / "whole"))
    record(tmp_path / "resumed", [2.0, 1.0], resume_at=2)
    check_tensorboard(tmp_path / "resumed")
    assert series(tmp_path / "resumed") == series(tmp_path / "whole")
    assert "4 lines, where 3" in difference(series(tmp_path / "resumed"), series(tmp_path / "whole")[:3])


@pytest.mark.parametrize(("step", "loss"), [(2, 3.0), (4, 2.0), (3, 2.5)])
def test_a_step_too_many_in_tensorboard_is_seen(tmp_path: Path, step: int, loss: float) -> None:
    record(tmp_path, [4.0, 3.0, 2.0])
    check_tensorboard(tmp_path)
    writer = EventFileWriter(tmp_path / "tensorboard", 4 if step != 3 else 3)
    writer.add_scalars(step, {"loss": loss, "step_seconds": 3.5})
    writer.close()
    with pytest.raises(BrokenRunError, match="TensorBoard"):
        check_tensorboard(tmp_path)
