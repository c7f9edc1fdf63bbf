"""The short form of tools/torture_checkpoints.py, and that what it looks with sees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.checkpoint import CheckpointStore
from harness.runs import RunFolder
from harness.runs.event_files import EventFileWriter
from harness.train import Trainer, train
from tests.checkpoint.kills import POINTS
from tests.checkpoint.records import BrokenRunError, check_tensorboard, difference, series, step_of
from tests.checkpoint.torture_variants import VARIANTS

TOOL = Path(__file__).resolve().parents[2] / "tools" / "torture_checkpoints.py"
SHORT = ("2 ranks, data", "gpt2, dropout, bf16, spike, rollback")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs fork, and Linux's /proc")
def test_killed_at_every_point_and_still_the_same_run(tmp_path: Path) -> None:
    """One run on one rank, that is rolled back, and one on two; some kills at random times may come on top."""
    out = tmp_path / "figures.json"
    command = [sys.executable, str(TOOL), "--kills", "14", "--least", "1", "--folder", str(tmp_path), "--out", str(out)]
    result = subprocess.run(
        [*command, "--variants", *SHORT],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )
    assert result.returncode == 0, result.stdout
    figures = json.loads(out.read_text())
    assert figures["kills"] == sum(figures["kills_by_point"].values()) >= 14
    assert {point for point in POINTS if figures["kills_by_point"].get(point, 0) < 1} == set()
    assert figures["kills_of_two_ranks"] > 0
    assert [path.name for path in tmp_path.iterdir()] == [out.name], "nothing is left where nothing was wrong"


class KilledError(BaseException):
    """Not an Exception: nothing in between may swallow it."""


@pytest.mark.parametrize("after", ["delete", "resume_at"])
def test_killed_in_a_rollback_no_checkpoint_is_ahead_of_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    """Else the resume, if the fault does not come again, leaves a hole in metrics.jsonl."""
    variant = VARIANTS["llama, non-finite loss, rollback"]
    settings = variant.settings(tmp_path, "rolled")
    assert variant.poison is not None
    for target, name in ((Trainer, "_backward"), (Trainer, "_roll_back"), (CheckpointStore, "save")):
        monkeypatch.setattr(target, name, getattr(target, name))  # given back at the end
    variant.poison.apply(tmp_path / "decided")
    owner: Any = CheckpointStore if after == "delete" else RunFolder
    original, calls = getattr(owner, after), []

    def killed_after(self: Any, step: int) -> None:
        original(self, step)
        calls.append(step)
        if rolling_back:
            raise KilledError

    rolling_back = False
    roll_back = Trainer._roll_back

    def rolled_back(self: Trainer, *arguments: Any) -> None:
        nonlocal rolling_back
        rolling_back = True
        roll_back(self, *arguments)

    monkeypatch.setattr(Trainer, "_roll_back", rolled_back)
    monkeypatch.setattr(owner, after, killed_after)
    with pytest.raises(KilledError):
        train(settings)
    recorded = [step_of(line) for line in series(settings.run.path)]
    steps = CheckpointStore(settings.run.path / "checkpoints").steps()
    assert calls
    assert recorded == list(range(1, len(recorded) + 1))
    assert steps[-1] <= len(recorded)


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
