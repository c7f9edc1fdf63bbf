"""Asked to stop by a signal: at a step's end, in the middle of a validation, before the first step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from harness import runs, stop
from harness.callbacks import Callback, TrainerView
from harness.checkpoint import CheckpointStore
from harness.config import dump_yaml
from harness.data import EvaluationWindows
from harness.settings import Settings
from harness.train import train
from tests.small_run import small_settings
from tests.test_train import series


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process takes SIGTERM and SIGUSR1 for requests, until the test is over."""
    before = {number: signal.getsignal(number) for number in stop.SIGNALS}
    monkeypatch.setattr(stop, "_requested", None)
    stop.install()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    stop._requested = None


class Ask(Callback):
    """Sends this process a signal after a step."""

    name = "ask"

    def __init__(self, step: int, number: signal.Signals = signal.SIGUSR1) -> None:
        self.step, self.number = step, number

    def after_step(self, trainer: TrainerView, record: dict[str, Any]) -> None:
        if trainer.step == self.step:
            os.kill(os.getpid(), self.number)


def settings(folder: Path, name: str, **sections: Any) -> Settings:
    return small_settings(
        folder,
        run={"name": name},
        **{
            "validation": {"every_steps": 3, "samples": 8, "batch_size": 2},
            "checkpoint": {"every_steps": 50},
            "train": {"steps": 9},
            **sections,
        },
    )


def forget() -> None:
    stop._requested = None


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_it_saves_and_the_series_goes_on_as_if_nothing_had_been(
    tmp_path: Path, number: signal.Signals, asynchronous: bool
) -> None:
    whole = series(train(settings(tmp_path, "whole")).folder)
    checkpoint = {"every_steps": 50, "asynchronous": asynchronous}
    result = train(settings(tmp_path, "asked", checkpoint=checkpoint), [Ask(4, number)])
    assert result.stopped_by == number.name
    assert result.step == 5, "a signal that comes when a step is agreed on waits for the next one"
    store = CheckpointStore(result.folder / "checkpoints")
    assert store.steps() == [5]
    assert store.verify(5) == []
    last = runs.read(result.folder).events[-1]
    assert (last["event"], last["step"], last["reason"]) == ("stopped", 5, f"asked to by {number.name}")
    assert series(result.folder) == whole[:5]
    forget()
    again = train(settings(tmp_path, "asked"))
    assert again.stopped_by is None
    assert series(again.folder) == whole


def ask_in_batch(monkeypatch: pytest.MonkeyPatch, validation: int, batch: int) -> None:
    """A signal while a batch of the n-th validation is read."""
    plain, counts = EvaluationWindows.__iter__, [0]

    def asking(self: EvaluationWindows) -> Iterator[Any]:
        counts[0] += 1
        for number, item in enumerate(plain(self), 1):
            if (counts[0], number) == (validation, batch):
                os.kill(os.getpid(), signal.SIGTERM)
            yield item

    monkeypatch.setattr(EvaluationWindows, "__iter__", asking)


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize(("validation", "step"), [(1, 3), (3, 9)])
def test_in_the_middle_of_a_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, validation: int, step: int
) -> None:
    """The step is done, its record is not: the checkpoint has it, and the next start validates again."""
    whole = series(train(settings(tmp_path, "whole")).folder)
    with monkeypatch.context() as patch:
        ask_in_batch(patch, validation, 2)
        result = train(settings(tmp_path, "asked"))
    assert result.stopped_by == "SIGTERM"
    assert series(result.folder) == whole[: step - 1]
    assert CheckpointStore(result.folder / "checkpoints").steps() == [step]
    forget()
    with monkeypatch.context() as patch:  # and once more at the same place
        ask_in_batch(patch, 1, 2)
        assert train(settings(tmp_path, "asked")).stopped_by == "SIGTERM"
    forget()
    result = train(settings(tmp_path, "asked"))
    assert series(result.folder) == whole
    assert not (result.folder / "metrics.discarded.jsonl").exists()


@pytest.mark.usefixtures("signals")
def test_before_the_first_step_it_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    with monkeypatch.context() as patch:
        patch.setattr("harness.start.prepare_for_training", build)
        with pytest.raises(stop.StopRequested, match="SIGTERM"):
            train(settings(tmp_path, "asked"))
    with pytest.raises(stop.StopRequested), stop.raising():  # the request stands
        pass
    forget()
    assert train(settings(tmp_path, "asked")).step == 9


@pytest.mark.usefixtures("signals")
def test_one_request_is_raised_once_and_not_outside(tmp_path: Path) -> None:
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.requested() == "SIGUSR1"
    forget()
    cleaned = []

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            cleaned.append(True)

    with pytest.raises(stop.StopRequested), stop.raising():
        work()
    assert cleaned


@pytest.mark.usefixtures("signals")
def test_a_request_while_the_block_is_entered_is_not_lost() -> None:
    """Whatever line of `raising` a signal finds it at."""
    code = stop.raising.__wrapped__.__code__  # type: ignore[attr-defined]
    for wanted in range(1, 50):
        forget()
        passed = 0

        def watch(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal passed
            if frame.f_code is not code:
                return None
            passed += event == "line"
            if event == "line" and passed == wanted:  # noqa: B023
                os.kill(os.getpid(), signal.SIGTERM)
            return watch

        entered = False
        try:
            sys.settrace(watch)
            with stop.raising():
                sys.settrace(None)
                entered = passed < wanted
                if not entered:
                    raise AssertionError(f"lost at line {wanted} of raising()")
        except stop.StopRequested:
            pass
        finally:
            sys.settrace(None)
        if entered:
            assert wanted > 2, "no line was seen"
            return
    raise AssertionError("raising() has no end")


@pytest.mark.usefixtures("signals")
def test_forked_children_are_killed_as_ever() -> None:
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    os.kill(child, signal.SIGUSR1)  # the parent's to answer
    os.kill(child, signal.SIGTERM)
    assert os.waitpid(child, 0)[1] == signal.SIGTERM


def test_the_command_line_exits_with_75(tmp_path: Path) -> None:
    """In the loop, and while it is still importing."""
    file = tmp_path / "run.yaml"
    # No validation: a step that is stopped in its validation is saved before it is recorded.
    file.write_text(dump_yaml(settings(tmp_path, "asked", train={"steps": 100_000}, validation={"every_steps": None})))
    command = [sys.executable, "-m", "harness", "train", str(file)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "runs" / "asked" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size > 0):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == stop.EXIT_RESUME, errors
    assert "stopped by SIGTERM after step" in output
    assert "Traceback" not in errors
    recorded = [record["step"] for record in runs.read(metrics.parent).metrics]
    assert CheckpointStore(metrics.parent / "checkpoints").latest_good(verify=True) == recorded[-1]

    code = "import os, signal; from harness import cli, stop; stop.install(); os.kill(os.getpid(), signal.SIGTERM)\n"
    code += f"import sys; sys.exit(cli.main(['train', {str(file)!r}]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == stop.EXIT_RESUME
    assert done.stderr == "harness train: stopped by SIGTERM; the same command goes on\n"
