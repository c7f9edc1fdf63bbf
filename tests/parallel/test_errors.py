"""What a job of two ranks says and how it ends when one of them has a reason to stop; started as torchrun would."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from harness import runs
from harness.config import dump_yaml
from tests.small_run import small_settings

HOST = socket.gethostname()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("errors")
    parallel = {"device": "cpu", "lost_after_seconds": 5, "timeout_seconds": 60}
    settings = small_settings(folder, train={"steps": 4}, parallel=parallel)
    file = folder / "small.yaml"
    file.write_text(dump_yaml(settings, comments=False))
    return file


def start(config: Path, *overrides: list[str]) -> list[tuple[int, list[str]]]:
    """Start one rank for each list of overrides; exit status and the harness's own lines of stderr of each."""
    with socket.create_server(("localhost", 0)) as listener:
        port = listener.getsockname()[1]
    processes = []
    for rank, values in enumerate(overrides):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(overrides)),
            "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, "-m", "harness", "train", str(config), *values]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    results = []
    for process in processes:
        try:
            _, errors = process.communicate(timeout=90)
        finally:
            process.kill()
        results.append((process.returncode, [line for line in errors.splitlines() if line.startswith("harness")]))
    return results


def test_a_mistake_of_all_is_said_once(config: Path) -> None:
    overrides = ["run.name=all", "optimizer.learning_rate=1e30", "optimizer.clip_norm=null", "schedule.warmup_steps=0"]
    results = start(config, overrides, overrides)
    assert sorted(status for status, _ in results) in ([1, 2], [2, 2]), "1: ended by the watch before its own word"
    lines = [line for _, said in results for line in said]
    assert len(lines) == 1, lines
    assert lines[0].startswith("harness train: error: rank ")
    assert f" on {HOST}: step " in lines[0]
    assert " is nan; stopped before the optimizer step" in lines[0]
    stopped = [event for event in runs.read(config.parent / "runs" / "all").events if event["event"] == "stopped"]
    assert len(stopped) == 1
    assert "FaultError" in stopped[0]["reason"]


def test_a_refusal_of_rank_0_is_said_by_rank_0(config: Path) -> None:
    results = start(config, *[["run.name=must", "train.resume=must"]] * 2)
    assert results[0][0] == 2
    assert results[1][0] in (1, 2), "ended by the watch, if that is faster than its own look at the store"
    assert results[1][1] == []
    assert [line.split(": ", 3)[2] for line in results[0][1]] == [f"rank 0 on {HOST}"]
    assert "no good checkpoint to resume from" in results[0][1][0]


def test_other_settings_on_one_rank_are_named(config: Path) -> None:
    first, second = start(config, ["run.name=other"], ["run.name=other", "model.hidden_size=64"])
    assert second[0] == 2
    assert second[1] == [
        f"harness train: error: rank 1 on {HOST}: other settings than rank 0's (model.hidden_size: there 32, here 64); "
        f"start every machine with the same configuration"
    ]
    assert first[0] not in (0, None)


def test_a_folder_that_one_rank_does_not_see(config: Path, tmp_path: Path) -> None:
    first, second = start(config, ["run.name=here"], ["run.name=here", f"run.folder={tmp_path}"])
    assert second[0] == 2
    assert f"rank 1 on {HOST}: {tmp_path}/here: made by rank 0 and not seen by rank 1 on {HOST}; " in second[1][0]
    assert first[0] not in (0, None)
    assert not (tmp_path / "here").exists()
