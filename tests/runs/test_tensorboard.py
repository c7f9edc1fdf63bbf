"""TensorBoard's own reader gives back what metrics.jsonl holds, through kills and resumes."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest

from harness.runs import RunFolder, read
from harness.runs.event_files import existing_files, tag_of


def assert_view_equals_record(path: Path) -> None:
    """By the reader that scripts use, and by the one that TensorBoard's server uses."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as ServerAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    run = read(path)
    scripts = EventAccumulator(str(path / "tensorboard"), size_guidance={"scalars": 0})
    server = ServerAccumulator(str(path / "tensorboard"), size_guidance={"tensors": 0})
    scripts.Reload()
    server.Reload()
    tags = {tag_of(name): name for name in run.columns if name != "step"}
    assert sorted(scripts.Tags()["scalars"]) == sorted(server.Tags()["tensors"]) == sorted(tags)
    for tag, column in tags.items():
        record = {line["step"]: line[column] for line in run.metrics if column in line}
        rounded = np.array([*record.values()], dtype=np.float64).astype(np.float32)
        events = scripts.Scalars(tag)
        assert [event.step for event in events] == list(record)
        np.testing.assert_array_equal([event.value for event in events], rounded)
        events = server.Tensors(tag)
        assert [event.step for event in events] == list(record)
        np.testing.assert_array_equal([make_ndarray(event.tensor_proto).item() for event in events], rounded)


def log_steps(run: RunFolder, first: int, last: int) -> None:
    rng = np.random.default_rng()
    for step in range(first, last + 1):
        record = {"loss": float(rng.normal()), "tokens": 2**50 + step}
        if step % 5 == 0:
            record["validation_loss"] = math.nan if step == 5 else float(rng.normal())
        run.log_metrics(step, record)


def test_view_after_interruptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**9, 0, -1))  # every start on a host whose clock is behind that of the last
    monkeypatch.setattr("harness.runs.event_files.time.time", lambda: float(next(clock)))
    with RunFolder(tmp_path) as run:
        run.begin("a: 1")
        log_steps(run, 1, 12)
    assert_view_equals_record(tmp_path)
    with RunFolder(tmp_path) as run:
        run.begin("a: 1", resume_at=8)
        assert_view_equals_record(tmp_path)
        log_steps(run, 9, 15)
        run.resume_at(10)
        run.resume_at(4)
        log_steps(run, 5, 20)
    assert_view_equals_record(tmp_path)
    assert len(existing_files(tmp_path / "tensorboard")) == 4
    # A kill has torn the last event, and metrics.jsonl has a step that TensorBoard never got.
    last = existing_files(tmp_path / "tensorboard")[-1]
    os.truncate(last, last.stat().st_size - 5)
    with RunFolder(tmp_path) as run:
        run.begin("a: 1", resume_at=19)
        log_steps(run, 20, 22)
    assert_view_equals_record(tmp_path)
    assert read(tmp_path).steps.tolist() == list(range(1, 23))


def test_view_that_begins_late_has_the_whole_record(tmp_path: Path) -> None:
    with RunFolder(tmp_path, tensorboard=False) as run:
        run.begin("a: 1")
        log_steps(run, 1, 7)
    with RunFolder(tmp_path) as run:
        run.begin("a: 1", resume_at=6)
        log_steps(run, 7, 8)
    assert_view_equals_record(tmp_path)


def test_columns_are_grouped() -> None:
    names = {
        "loss": "train/loss",
        "tokens_per_second": "speed/tokens_per_second",
        "validation_loss": "validation/loss",
        "validation_loss/books": "validation/loss/books",
        "mine/column": "mine/column",
    }
    assert {name: tag_of(name) for name in names} == names
