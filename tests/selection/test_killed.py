"""A selection that is killed anywhere, and started again until it is done, ends as one that was left alone."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from harness.config import dump_yaml
from harness.selection import SelectSettings, select
from harness.selection.job import Job
from harness.stop import EXIT_RESUME
from tests.selection.pools import (
    QUIET,
    code,
    draw_pool,
    draw_targets,
    files_below,
    line_of,
    result_of,
    settings_of,
    words,
    write_lines,
    write_texts,
)

pytestmark = pytest.mark.usefixtures("_every_file_is_a_shard")

TOUCHING = ("rename", "unlink", "mkdir", "rmdir")
"""Calls that change what a restart finds; everything is written under another name and then renamed."""


class Inputs:
    """Files of a small pool in three formats, and a selection of them that has rounds of every kind."""

    def __init__(self, folder: Path, documents: int) -> None:
        self.folder = folder
        self.seed = random.randrange(10**9)
        r = random.Random(self.seed)
        targets = draw_targets(r, 9)
        pool = draw_pool(r, targets, documents)
        lines = [line_of(r, document) for document in pool]
        names = ["in/a.jsonl", "in/b.jsonl.gz", "in/c.jsonl.zst"]
        self.files = [write_lines(folder / name, lines[start::3]) for start, name in enumerate(names)]
        self.targets = write_texts(folder / "targets.jsonl", targets)

    def __repr__(self) -> str:
        return f"Inputs(seed={self.seed})"

    def settings(self, **sections: Any) -> SelectSettings:
        """The output lies in the working directory, so that its name is always the same."""
        values: dict[str, Any] = {
            "budget": {"bytes": 20_000},
            "duplicates": {"remove": "near"},
            "racing": {"audited_documents": 64, "headroom": 1.0},
            "output": {"rejected": True},
        }
        return settings_of(self.files, self.targets, "out", **(values | sections))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("pool"), 150)


@pytest.fixture(autouse=True)
def _small_parts_all_of_which_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.selection.kept.KEPT_SHARE", 9.0)
    monkeypatch.setattr("harness.selection.kept.SMALL_SHARD_BYTES", 0)
    for module in ("pool", "work"):
        monkeypatch.setattr(f"harness.selection.{module}.PART_ROWS", 20)


def written(folder: Path) -> dict[str, bytes]:
    """All that must be as without a disturbance; nothing else but work and reports lies there."""
    out = folder / "out"
    names = {path.name for path in out.iterdir()}
    assert names - {"rejected"} == {".lock", "chosen", "selection.json", "report.json", "report.html", "work"}
    assert not [*out.glob("chosen/**/.*"), *out.glob("rejected/**/.*")]
    return result_of(out) | {f"rejected/{name}": data for name, data in files_below(out / "rejected").items()}


def counting(die_at: int | None) -> Iterator[int]:
    """Counts the calls that touch the disk; SIGKILL at one of them, before or after it is done."""
    count = 0

    def patched(call: Callable[..., Any]) -> Callable[..., Any]:
        def touch(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == die_at and random.random() < 0.5:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return call(*arguments, **options)
            finally:
                if count == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        return touch

    for name in TOUCHING:
        setattr(os, name, patched(getattr(os, name)))
    while True:
        yield count


def start(folder: Path, settings: SelectSettings, die_at: int | None) -> int | None:
    """The selection in a process of its own; the calls that it made, None where it was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _select_and_exit(folder, settings, die_at, writing)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    assert os.WEXITSTATUS(status) == 0, said
    return int(said)


def _select_and_exit(folder: Path, settings: SelectSettings, die_at: int | None, pipe: int) -> NoReturn:
    try:
        random.seed()
        os.chdir(folder)
        calls = counting(die_at)
        next(calls)
        select(settings, progress=QUIET)
        os.write(pipe, str(next(calls)).encode())
        os._exit(0)
    except BaseException:
        os.write(pipe, traceback.format_exc().encode())
        os._exit(1)


def test_killed_at_any_change_of_the_disk(inputs: Inputs, tmp_path: Path) -> None:
    torture(inputs.settings(), tmp_path, trials=2, lives=8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"budget": {"threshold": 0.05}},
        {"budget": {"share": 0.2}, "duplicates": {"remove": "none"}, "leaks": {"remove": False}},
        {"racing": {"exact": True}, "budget": {"documents": 40}},
    ],
)
def test_killed_at_many_changes_of_the_disk(inputs: Inputs, tmp_path: Path, sections: dict[str, Any]) -> None:
    settings = inputs.settings(**sections)
    calls = torture(settings, tmp_path, trials=3, lives=20)
    expected = written(tmp_path / "whole")
    for die_at in random.sample(range(1, calls + 1), min(calls, 40)):
        folder = tmp_path / f"at-{die_at}"
        folder.mkdir()
        assert start(folder, settings, die_at) is None
        start(folder, settings, None)
        assert written(folder) == expected


def torture(settings: SelectSettings, folder: Path, trials: int, lives: int) -> int:
    """The calls of an undisturbed run, after `trials` others were killed up to `lives` times each."""
    (folder / "whole").mkdir()
    calls = start(folder / "whole", settings, None)
    assert calls is not None
    expected = written(folder / "whole")
    for trial in range(trials):
        place = folder / f"trial-{trial}"
        place.mkdir()
        for _ in range(lives):
            if start(place, settings, random.randint(1, calls // 3)) is not None:
                break
        else:
            start(place, settings, None)
        assert written(place) == expected
        start(place, settings, None)
        assert written(place) == expected, "once more changes nothing"
    return calls


def test_another_budget_after_a_kill(inputs: Inputs, tmp_path: Path) -> None:
    """What was planned for the first is finished first, and changes nothing of the second."""
    output = {"rejected": False}  # more of whose scores are known then
    second = inputs.settings(budget={"documents": 12}, output=output)
    (tmp_path / "whole").mkdir()
    start(tmp_path / "whole", second, None)
    expected = written(tmp_path / "whole")
    calls = start(tmp_path, inputs.settings(), None)
    assert calls is not None
    for die_at in random.sample(range(calls // 3, calls), 3):
        folder = tmp_path / f"{die_at}"
        folder.mkdir()
        start(folder, inputs.settings(), die_at)
        (folder / "out" / "selection.json").unlink(missing_ok=True)
        shutil.rmtree(folder / "out" / "rejected", ignore_errors=True)
        start(folder, second, None)
        assert written(folder) == expected


@pytest.mark.parametrize(("first", "task", "second"), [(5, "inspect", 60), (60, "score", 5), (20, "inspect", 30)])
def test_a_round_that_was_planned_for_another_budget_is_finished_as_planned(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, task: str, second: int
) -> None:
    (tmp_path / "whole").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    wanted = inputs.settings(budget={"documents": second}, output={"rejected": False})
    select(wanted, progress=QUIET)
    monkeypatch.chdir(tmp_path)
    run = Job.run_pass

    def stopping(job: Job, name: str, asked: str, *arguments: Any) -> None:
        if asked == task:
            raise KeyboardInterrupt
        run(job, name, asked, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Job, "run_pass", stopping)
        with pytest.raises(KeyboardInterrupt):
            select(inputs.settings(budget={"documents": first}), progress=QUIET)
    select(wanted, progress=QUIET)
    assert written(tmp_path) == written(tmp_path / "whole")


def test_what_was_deleted_is_written_again(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores lie elsewhere, and say that all is done."""
    monkeypatch.chdir(tmp_path)
    settings = inputs.settings(output={"work": "scores"})
    select(settings, progress=QUIET)
    before = result_of(tmp_path / "out")
    for name in ("out", "out/chosen", "out/chosen/a.jsonl"):
        path = tmp_path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        select(settings, progress=QUIET)
        assert result_of(tmp_path / "out") == before


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A configuration file of some seconds of work, and what comes of it undisturbed."""
    folder = tmp_path_factory.mktemp("larger")
    r = random.Random()
    targets = write_texts(folder / "targets.jsonl", [code(r, 500) for _ in range(40)])
    files = []
    for number in range(6):
        texts = [code(r, r.randint(100, 1500)) if r.random() < 0.5 else words(r, 90) for _ in range(250)]
        lines = [json.dumps({"id": f"{number}-{n}", "text": text}).encode() + b"\n" for n, text in enumerate(texts)]
        files.append(write_lines(folder / f"in/{number}.jsonl.zst", lines))
    near, racing = {"remove": "near"}, {"exact": True}
    settings = settings_of(files, targets, "out", duplicates=near, racing=racing, output={"rejected": True})
    (folder / "select.yaml").write_text(dump_yaml(settings, comments=False))
    (folder / "whole").mkdir()
    assert command(folder / "whole", folder / "select.yaml", 1).wait() == 0
    return folder / "select.yaml", written(folder / "whole")


def command(folder: Path, file: Path, workers: int, *overrides: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-m", "harness", "select", str(file), f"workers={workers}", *overrides]
    return subprocess.Popen(arguments, cwd=folder, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_asked_to_stop(larger: tuple[Path, dict[str, bytes]], tmp_path: Path, workers: int) -> None:
    file, expected = larger
    process = command(tmp_path, file, workers)
    while not list(tmp_path.glob("out/work/measure/*/done.json")):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == EXIT_RESUME
    assert said.splitlines()[-1] == "harness select: stopped by SIGTERM; the same command goes on"
    assert "Traceback" not in said
    assert not (tmp_path / "out" / "chosen").exists()
    assert command(tmp_path, file, workers).wait() == 0
    assert written(tmp_path) == expected


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), ("distributed.engine=local", "distributed.tasks=3")])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_killed_at_any_time(
    larger: tuple[Path, dict[str, bytes]], tmp_path: Path, workers: int, overrides: tuple[str, ...]
) -> None:
    file, expected = larger
    begun = time.monotonic()
    (tmp_path / "whole").mkdir()
    assert command(tmp_path / "whole", file, workers, *overrides).wait() == 0
    took = time.monotonic() - begun
    for trial in range(2):
        folder = tmp_path / f"{trial}"
        folder.mkdir()
        for life in range(40):
            process = command(folder, file, workers, *overrides)
            try:
                process.wait(random.uniform(0.2, 0.8) * took * (1 + life / 5))  # beginning alone may take that long
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            else:
                break
        assert process.returncode == 0
        assert written(folder) == expected
