"""datatrove's tasks instead of one process: the same result, also after a task has failed."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from harness.config import HarnessError, dump_yaml
from harness.selection import SelectSettings, select
from harness.selection.job import Job
from harness.text import Progress
from tests.selection.pools import QUIET, result_of, write_lines
from tests.selection.starting import write_site
from tests.selection.test_killed import Inputs, command

pytest.importorskip("datatrove")

pytestmark = pytest.mark.usefixtures("_every_file_is_a_shard")

FAILING = """
def change(pool):
    '''One shard fails as long as a file is there.'''
    records = pool.records

    def failing(self, shard, *arguments, **options):
        for number, record in enumerate(records(self, shard, *arguments, **options)):
            if number == 20 and shard.number == {shard} and os.path.exists({flag!r}):
                while len(glob.glob({done!r})) < 2:  # datatrove ends the other tasks too
                    time.sleep(0.01)
                raise RuntimeError("the machine went away")
            yield record

    pool.records = failing
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("pool"), 150)


@pytest.fixture(scope="module")
def expected(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process chooses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        select(inputs.settings(), progress=QUIET)
        return result_of(Path("out"))


def settings(inputs: Inputs, **fields: Any) -> SelectSettings:
    return inputs.settings(distributed={"engine": "local"} | fields)


def measured(folder: Path) -> set[int]:
    """Shards whose measures are complete."""
    return {int(file.parent.name[-5:]) for file in folder.glob("out/work/measure/*/done.json")}


def test_a_failed_task_loses_its_shards_and_a_rerun_does_those(
    inputs: Inputs, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = random.randrange(3)
    flag = tmp_path / "broken"
    done = str(tmp_path / "out/work/measure/*/done.json")
    site = write_site(tmp_path / "site", FAILING.format(shard=shard, flag=str(flag), done=done))
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=":")
    monkeypatch.chdir(tmp_path)
    flag.touch()
    with pytest.raises(HarnessError) as caught:
        select(settings(inputs, tasks=3), progress=QUIET)
    said = str(caught.value)
    assert said.startswith("measure: a task failed (RuntimeError: the machine went away")
    assert said.endswith("; the same command goes on with what is missing")
    assert "\n" not in said
    assert measured(tmp_path) == {0, 1, 2} - {shard}
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.glob("out/work/measure/*/*")}
    flag.unlink()
    select(settings(inputs, tasks=2, workers=1), progress=QUIET)
    assert result_of(tmp_path / "out") == expected
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items()), "what was done is not done again"


def test_one_process_goes_on_with_what_tasks_began(
    inputs: Inputs, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = settings(inputs, tasks=50, workers=1)
    job = Job(first)
    for shard in job.shards[1:]:
        job.run_pass("measure", "measure", [shard], 1, QUIET)
    assert measured(tmp_path) == {1, 2}
    summary = select(first, progress=QUIET)
    assert summary["time"]["workers"] == 1
    assert result_of(tmp_path / "out") == expected
    select(inputs.settings(), progress=QUIET)
    assert result_of(tmp_path / "out") == expected


def test_tasks_end_with_the_command_that_was_killed(inputs: Inputs, expected: dict[str, bytes], tmp_path: Path) -> None:
    """Else they would hold the folder, and write beside those of the next."""
    file = tmp_path / "select.yaml"
    file.write_text(dump_yaml(settings(inputs, tasks=3, workers=2), comments=False))
    process = command(tmp_path, file, 1)
    while not list(tmp_path.glob("out/work/measure/*/done.json")):
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.communicate(timeout=60)  # ends when no process has its output open any more
    again = command(tmp_path, file, 1, "distributed.workers=1")
    _, said = again.communicate()
    assert again.returncode == 0, said
    assert result_of(tmp_path / "out") == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_the_terminal_is_ours_and_the_log_lies_in_its_folder(inputs: Inputs, tmp_path: Path, workers: int) -> None:
    file = tmp_path / "select.yaml"
    broken = write_lines(tmp_path / "broken.jsonl", [b"{\n"])
    chosen = settings(inputs, tasks=4, workers=workers)
    pool = chosen.pool.model_copy(update={"source": (*chosen.pool.source, str(broken)), "on_error": "skip"})
    file.write_text(dump_yaml(chosen.model_copy(update={"pool": pool}), comments=False))
    arguments = [sys.executable, "-m", "harness", "select", str(file)]
    done = subprocess.run(
        arguments, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    said = done.stdout
    assert done.returncode == 0, said
    ours = ("skipped ", "compressed sizes by ", "chose ")
    strange = [line for line in said.splitlines() if not any(start in line for start in ours)]
    assert strange == []
    assert len(re.findall(r"skipped .*broken\.jsonl", said)) == 1
    logs = list(tmp_path.glob("out/work/logs/measure-4/logs/task_*.log"))
    assert len(logs) == 4
    assert all("Processing done" in log.read_text() for log in logs)


def test_progress_is_by_shards_that_are_done(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("harness.selection.distributed.POLL_SECONDS", 0.01)
    shown: dict[str, list[int]] = {}

    class Seen(Progress):
        @contextmanager
        def work(self, title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
            counts = shown[title] = [total_bytes]
            yield lambda count: counts.append(-count)

    select(settings(inputs, tasks=2), progress=Seen(quiet=True))
    assert {"measuring all documents", "writing"} <= set(shown)
    assert all(total and sum([total, *done]) == 0 for total, *done in shown.values())
