"""The run folder: each step once, through kills and resumes; one writer; what a start leaves behind."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.config import HarnessError
from harness.runs import Run, RunError, RunFolder, read

CONFIG = "model:\n  layers: 2\n"


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The file as another reader of JSON sees it, which knows no NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def plain(value: Any) -> float:
    return float(value.item() if hasattr(value, "item") else value)


def log_steps(run: RunFolder, first: int, last: int, offset: float = 0.0) -> None:
    for step in range(first, last + 1):
        run.log_metrics(step, {"loss": step / 7 + offset, "tokens": 1000 * step})


def test_a_fresh_run(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "first"
    with RunFolder(path) as run:
        assert run.existing() is None
        run.begin(CONFIG)
        log_steps(run, 1, 5)
        run.log_event("save", step=5, folder=path / "x", seconds=0.5)
        run.log_event("start")
        # Written at once: a reader beside the running writer has it all.
        live = read(path)
    assert live.steps.tolist() == [1, 2, 3, 4, 5]
    run_read = read(str(path))
    assert isinstance(run_read, Run)
    assert run_read.config == {"model": {"layers": 2}}
    assert (path / "config.yaml").read_text() == CONFIG
    assert run_read.environment["versions"]["torch"] == live.environment["versions"]["torch"]
    np.testing.assert_array_equal(run_read.column("loss"), np.arange(1, 6) / 7)
    assert [event["event"] for event in run_read.events] == ["save", "start"]
    assert run_read.events[0]["step"] == 5
    assert run_read.events[0]["folder"] == str(path / "x")
    assert "step" not in run_read.events[1]
    assert run_read.events[0]["time"].endswith("+00:00")
    run.close()


def test_a_step_is_recorded_once_and_in_order(tmp_path: Path) -> None:
    with RunFolder(tmp_path, tensorboard=False) as run:
        with pytest.raises(RunError, match="before begin"):
            run.log_metrics(1, {})
        run.begin(CONFIG)
        log_steps(run, 1, 3)
        for step in (3, 1):
            with pytest.raises(RunError, match=f"step {step} comes after step 3: a step is recorded once"):
                run.log_metrics(step, {"loss": 1.0})
        with pytest.raises(RunError, match="name is 'x', which is not a number"):
            run.log_metrics(4, {"name": "x"})
        run.log_metrics(9, {"step": 5, "loss": 2.0})
    assert read(tmp_path).steps.tolist() == [1, 2, 3, 9]
    assert not (tmp_path / "tensorboard").exists()


def test_numbers_of_every_kind(tmp_path: Path) -> None:
    values = {
        "nan": math.nan,
        "inf": math.inf,
        "minus": -math.inf,
        "torch": torch.tensor(0.1, dtype=torch.float64),
        "half": torch.tensor(1.5, dtype=torch.bfloat16),
        "parameter": torch.nn.Parameter(torch.tensor(2.0)),
        "numpy": np.float32(0.1),
        "numpy_nan": np.float64("nan"),
        "integer": np.int64(2**40),
        "tiny": 5e-324,
        "flag": True,
        "none": None,
    }
    with RunFolder(tmp_path) as run:
        run.begin(CONFIG)
        run.log_metrics(1, values)
        run.log_metrics(2, {"late": 3})
        run.log_event("stop", step=2, value=math.nan, nested={"losses": [math.inf, 1.0]})
    assert lines_of(tmp_path / "metrics.jsonl")[0]["nan"] == "NaN"
    result = read(tmp_path)
    for name, value in values.items():
        np.testing.assert_array_equal(result.column(name), [math.nan if value is None else plain(value), math.nan])
    np.testing.assert_array_equal(result.column("late"), [math.nan, 3])
    assert math.isnan(result.events[0]["value"])
    assert result.events[0]["nested"]["losses"] == [math.inf, 1.0]


def test_resume_moves_later_steps_aside(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as run:
        run.begin(CONFIG)
        log_steps(run, 1, 10)
        run.log_event("first")
    with RunFolder(tmp_path) as run:
        assert run.existing() == 10
        with pytest.raises(
            HarnessError, match=r"holds a run up to step 10; resume it \(train.resume=auto\), or choose"
        ):
            run.begin("other: 1\n")
        assert (tmp_path / "config.yaml").read_text() == CONFIG, "a refused start changed the folder"
        run.begin("other: 1\n", resume_at=6)
        assert run.existing() == 6
        log_steps(run, 7, 8, offset=0.5)
        run.log_event("second")
        run.resume_at(7)  # a rollback in mid-run
        log_steps(run, 8, 9, offset=0.75)
    result = read(tmp_path)
    assert result.steps.tolist() == list(range(1, 10))
    np.testing.assert_array_equal(result.column("loss"), np.arange(1, 10) / 7 + np.array([0] * 6 + [0.5] + [0.75] * 2))
    discarded = lines_of(tmp_path / "metrics.discarded.jsonl")
    assert [line["step"] for line in discarded] == [7, 8, 9, 10, 8]
    assert [line["loss"] for line in discarded] == [7 / 7, 8 / 7, 9 / 7, 10 / 7, 8 / 7 + 0.5]
    assert [event["event"] for event in result.events] == ["first", "second"]
    assert result.config == {"other": 1}
    assert (tmp_path / "starts" / "0000" / "config.yaml").read_text() == CONFIG
    assert "versions" in json.loads((tmp_path / "starts" / "0000" / "environment.json").read_text())
    assert not list(tmp_path.glob(".tmp*"))


@pytest.mark.parametrize(
    "tail", [b"", b'{"step": 4, "lo', b'{"step"', b"{", b"\x00\x00\x00", b'{"step": 4, "loss": 0.5}']
)
def test_torn_last_lines(tmp_path: Path, tail: bytes) -> None:
    with RunFolder(tmp_path) as run:
        run.begin(CONFIG)
        log_steps(run, 1, 3)
        run.log_event("first")
    for name in ("metrics.jsonl", "events.jsonl"):
        with (tmp_path / name).open("ab") as file:
            file.write(tail.replace(b'"step"', b'"event"') if name == "events.jsonl" else tail)
    whole = tail.endswith(b"}")
    assert read(tmp_path).steps.tolist() == [1, 2, 3, 4][: 4 if whole else 3]
    for resume in (3, 2):
        with RunFolder(tmp_path) as run:
            run.begin(CONFIG, resume_at=resume)
            run.log_metrics(resume + 1, {"loss": 9.0})
            run.log_event("again")
        result = read(tmp_path)
        assert result.steps.tolist() == list(range(1, resume + 2))
        assert result.column("loss")[-1] == 9.0
    assert [event["event"] for event in lines_of(tmp_path / "events.jsonl") if event["event"] != 4] == [
        "first",
        "again",
        "again",
    ]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as run:
        run.begin(CONFIG)
        log_steps(run, 1, 3)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for damaged in (b"garbage\n", b"[1]\n", b'{"loss": 1}\n', b"\xff\xfe\n"):
        path.write_bytes(lines[0] + damaged + lines[2])
        with pytest.raises(RunError, match=r"metrics.jsonl: line 2 is not a JSON object with a 'step'"):
            read(tmp_path)


@pytest.mark.parametrize("point", range(1, 9))
def test_killed_while_resuming(tmp_path: Path, point: int) -> None:
    """Each call that changes the disk is the last one once; the next resume finds nothing lost and nothing twice."""
    with RunFolder(tmp_path, tensorboard=False) as run:
        run.begin(CONFIG)
        log_steps(run, 1, 6)
    child = os.fork()
    if child == 0:
        calls = 0

        def killing(function: Any) -> Any:
            def wrapped(*arguments: Any, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == point:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return wrapped

        for name in ("fsync", "rename"):
            setattr(os, name, killing(getattr(os, name)))
        run = RunFolder(tmp_path, tensorboard=False)
        try:
            run.resume_at(4)
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status == (signal.SIGKILL if point <= 6 else 0)
    assert read(tmp_path).steps.tolist() in ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4])
    with RunFolder(tmp_path, tensorboard=False) as run:
        run.begin(CONFIG, resume_at=4)
        log_steps(run, 5, 6, offset=1.0)
    assert read(tmp_path).steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines_of(tmp_path / "metrics.discarded.jsonl")] == [5, 6]


def test_a_full_disk_leaves_no_torn_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def write_half(descriptor: int, content: bytes) -> int:
        return write(descriptor, content[: len(content) // 2])

    with RunFolder(tmp_path) as run:
        run.begin(CONFIG)
        log_steps(run, 1, 2)
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write_half)
            with pytest.raises(RunError, match=r"metrics.jsonl: cannot be written: only \d+ of \d+ bytes"):
                run.log_metrics(3, {"loss": 1.0})
        log_steps(run, 3, 4)
    assert read(tmp_path).steps.tolist() == [1, 2, 3, 4]


def test_missing_steps_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with RunFolder(tmp_path) as run:
        run.begin(CONFIG)
        log_steps(run, 1, 3)
    with RunFolder(tmp_path) as run, caplog.at_level(logging.WARNING):
        run.begin(CONFIG, resume_at=3)
        assert not caplog.text
        run.resume_at(5)
    assert "metrics.jsonl ends at step 3 and the run goes on from step 5" in caplog.text


HOLDER = """
import sys, time
from harness.runs import RunFolder
run = RunFolder(sys.argv[1])
run.begin("a: 1")
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_process_is_refused_and_a_dead_one_forgotten(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError) as caught:
            RunFolder(tmp_path)
        assert f"another process is writing into this run (process {holder.pid} on " in str(caught.value)
        assert "\n" not in str(caught.value)
        assert read(tmp_path).config == {"a": 1}, "reading needs no lock"
    finally:
        holder.kill()
        holder.wait()
    with RunFolder(tmp_path) as run:
        with pytest.raises(RunError, match="this process is already writing"):
            RunFolder(tmp_path / ".." / tmp_path.name)
        child = os.fork()  # a data worker, which may outlive the trainer
        if child == 0:
            time.sleep(600)
            os._exit(0)
        run.close()
    try:
        program = "import sys; from harness.runs import RunFolder; RunFolder(sys.argv[1])"
        subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunError, match=r"cannot be written: .*; choose another run.folder"):
            RunFolder(path)
