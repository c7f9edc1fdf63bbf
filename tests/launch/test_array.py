"""launch/slurm/array.sbatch under a real slurmctld: the tasks share a ladder's runs, and a second submission skips
them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.studies.ladder.grid import cells
from tests.launch import cluster as slurm
from tests.launch.jobs import ROOT, environment
from tests.studies.test_ladder import write

ARRAY = ROOT / "launch/slurm/array.sbatch"


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm.Cluster]:
    reason = slurm.why_not()
    if reason is not None:
        pytest.skip(reason)
    with slurm.Cluster() as cluster:
        yield cluster


def submit(cluster: slurm.Cluster, folder: Path, config: Path, attempt: int) -> str:
    """Runs it to its end; all that the tasks wrote."""
    command = ("sbatch", "--parsable", "--array=0-1", "--time=5", f"--output={folder}/{attempt}-%a.log")
    number = cluster.run(
        *command, str(ARRAY.relative_to(ROOT)), str(config), env=environment(OMP_NUM_THREADS="1"), cwd=ROOT
    ).strip()
    ends = [cluster.wait(f"{number}_{task}", 120) for task in range(2)]
    assert ends == [("COMPLETED", 0)] * 2
    return "".join(path.read_text() for path in sorted(folder.glob(f"{attempt}-*.log")))


def test_tasks_share_the_runs(cluster: slurm.Cluster, tmp_path: Path) -> None:
    path, config = write(tmp_path, seeds=1, tokens_per_parameter=[2])
    said = submit(cluster, tmp_path, path, 1)
    results = {file: file.stat().st_mtime_ns for file in (config.path / "results").glob("*.json")}
    assert sorted(file.stem for file in results) == sorted(cell.name for cell in cells(config)), said
    assert "2 of 2 runs are done (part 0)" in said
    assert "1 of 1 runs are done (part 1)" in said
    lost = cells(config)[1]
    (config.path / "results" / f"{lost.name}.json").unlink()
    said = submit(cluster, tmp_path, path, 2)
    again = {file: file.stat().st_mtime_ns for file in (config.path / "results").glob("*.json")}
    assert [file.stem for file in again if again[file] != results[file]] == [lost.name]
    assert json.loads((config.path / "results" / f"{lost.name}.json").read_text())["loss"] > 0


@pytest.mark.parametrize(
    ("variables", "arguments", "line"),
    [
        ({}, ["x.yaml"], "not a task of a SLURM array; submit it: sbatch --array=0-N"),
        ({"SLURM_ARRAY_TASK_ID": "0"}, [], "no configuration"),
        (
            {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MIN": "2", "SLURM_ARRAY_TASK_MAX": "3",
             "SLURM_ARRAY_TASK_COUNT": "2"},
            ["x.yaml"],
            "--array: should count from 0",
        ),
    ],
)  # fmt: skip
def test_refusals_are_one_line(variables: dict[str, str], arguments: list[str], line: str) -> None:
    env = {**environment(), "HARNESS_ROOT": str(ROOT), **variables}
    done = subprocess.run(["bash", ARRAY, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert line in done.stderr
