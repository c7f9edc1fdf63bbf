"""Saving beside the loop: while a checkpoint is written, when the disk refuses it, and what is kept."""

from __future__ import annotations

import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import runs
from harness.callbacks import Callback, TrainerView
from harness.checkpoint import CannotWriteError, CheckpointError, CheckpointStore, Saver, shard_writer, store
from harness.config import HarnessError
from harness.parallel import Fragment, Staging
from harness.settings import Settings
from harness.train import Trainer, train
from tests.parallel.jobs import wait_until
from tests.small_run import small_settings
from tests.test_train import series


def settings(folder: Path, name: str, **sections: Any) -> Settings:
    checkpoint = {"every_steps": 2, "retry_steps": 3, **sections.pop("checkpoint", {})}
    return small_settings(
        folder,
        run={"name": name},
        schedule={"kind": "constant"},
        checkpoint=checkpoint,
        train={"steps": 12},
        **sections,
    )


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in runs.read(folder).events if event["event"] == kind]


class Disk:
    """Replaces the writing of tensor files: counts, waits, fails."""

    def __init__(self, patch: pytest.MonkeyPatch, failing: set[int] | None = None, seconds: float = 0.0) -> None:
        self.calls = 0
        self.at_once = 0
        self.failing, self.seconds = failing or set(), seconds
        self._busy = threading.Lock()
        self._plain = shard_writer.write_tensor_file
        patch.setattr(shard_writer, "write_tensor_file", self)

    def __call__(self, *arguments: Any) -> Any:
        if not self._busy.acquire(blocking=False):
            self.at_once += 1
        self.calls += 1
        number = self.calls
        time.sleep(self.seconds)
        try:
            if number in self.failing:
                raise OSError(28, "No space left on device")
            return self._plain(*arguments)
        finally:
            self._busy.release()


class Steps(Callback):
    """Notes when steps end."""

    name = "steps"

    def __init__(self) -> None:
        self.times: dict[int, float] = {}

    def after_step(self, trainer: TrainerView, record: dict[str, Any]) -> None:
        self.times[trainer.step] = time.monotonic()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved is the state of its step, though the weights move on under the writer; no two saves overlap."""
    whole = train(settings(tmp_path, "at-once", checkpoint={"asynchronous": False, "keep_last": None})).folder
    disk, steps = Disk(monkeypatch, seconds=0.4), Steps()
    folder = train(settings(tmp_path, "beside", checkpoint={"keep_last": None}), [steps]).folder
    assert disk.at_once == 0
    assert disk.calls == 6
    saved = events(folder, "saved")
    assert [event["step"] for event in saved] == [2, 4, 6, 8, 10, 12]
    assert all(event["seconds"] >= 0.4 > event["stall_seconds"] for event in saved)
    assert steps.times[3] - steps.times[2] < 0.4, "step 3 did not wait for the checkpoint of step 2"
    ours, theirs = (CheckpointStore(each / "checkpoints") for each in (folder, whole))
    for step in ours.steps():
        assert ours.verify(step) == []
        digests = [{name: file.sha256 for name, file in each.manifest(step).files.items()} for each in (ours, theirs)]
        assert digests[0] == digests[1], step


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("harness.callbacks.saving.LAST_RETRY_SECONDS", 0.01)
    whole = series(train(settings(tmp_path, "whole")).folder)
    Disk(monkeypatch, failing={2, 3, 7, 8})
    chosen = settings(tmp_path, "full", checkpoint={"asynchronous": asynchronous, "keep_last": None, "every_steps": 4})
    folder = train(chosen).folder
    assert series(folder) == whole
    failed = events(folder, "save_failed")
    assert failed
    assert "No space left on device; earlier steps are untouched" in failed[0]["reason"]
    assert "the run goes on, and tries again at step" in caplog.text
    kept = CheckpointStore(folder / "checkpoints")
    assert kept.steps()[-1] == 12, "the last one is tried again until it is there"
    assert 8 not in kept.steps()
    assert all(kept.verify(step) == [] for step in kept.steps())


def test_a_disk_that_stays_full_ends_the_last_save_in_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.callbacks.saving.LAST_RETRY_SECONDS", 0.01)
    Disk(monkeypatch, failing=set(range(3, 1000)))
    with pytest.raises(CannotWriteError, match=r"the checkpoint of step 12 could not be written for 0\.1 s"):
        train(settings(tmp_path, "full", checkpoint={"retry_seconds": 0.1}))
    assert CheckpointStore(tmp_path / "runs" / "full" / "checkpoints").latest_good(verify=True) == 4


def test_room_is_looked_for_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.callbacks.saving.LAST_RETRY_SECONDS", 0.01)
    usage, looks = store.shutil.disk_usage, [0]

    def almost_full(path: Any) -> Any:
        looks[0] += 1
        return usage(path)._replace(free=1000) if looks[0] in (2, 3) else usage(path)

    monkeypatch.setattr(store.shutil, "disk_usage", almost_full)
    disk = Disk(monkeypatch)
    folder = train(settings(tmp_path, "full", checkpoint={"keep_last": None})).folder
    assert [event["step"] for event in events(folder, "save_failed")] == [4, 6]
    assert "MB are needed and 0.0 MB are free" in events(folder, "save_failed")[0]["reason"]
    assert disk.calls == 4
    assert CheckpointStore(folder / "checkpoints").steps() == [2, 8, 10, 12]


def test_another_failure_of_the_writer_reaches_the_loop_at_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise ZeroDivisionError("a mistake in the writer")

    monkeypatch.setattr(shard_writer, "write_tensor_file", fail)

    agree = Trainer._agree

    def agree_late(trainer: Trainer, step: int, loss: float, norm: float) -> Any:
        """Step 2 began the save; however slow the machine is, it has failed when step 3 is decided on."""
        if step == 3:
            wait_until(trainer.saving.has_failed)
        return agree(trainer, step, loss, norm)

    monkeypatch.setattr(Trainer, "_agree", agree_late)
    with pytest.raises(ZeroDivisionError, match="a mistake in the writer"):
        train(settings(tmp_path, "broken"))
    run = runs.read(tmp_path / "runs" / "broken")
    assert run.events[-1]["event"] == "stopped"
    assert [record["step"] for record in run.metrics] == [1, 2], "the third was not taken"


def test_what_is_kept(tmp_path: Path) -> None:
    chosen = settings(
        tmp_path,
        "kept",
        validation={"every_steps": 2, "samples": 4, "batch_size": 4},
        checkpoint={"every_steps": 1, "keep_last": 2, "keep_every_steps": 5, "keep_best": 1},
        optimizer={"learning_rate": 0.3},
    )
    folder = train(chosen).folder
    validated = {
        record["step"]: record["validation_loss"] for record in runs.read(folder).metrics if "validation_loss" in record
    }
    best = min(validated, key=lambda step: (validated[step], -step))
    assert CheckpointStore(folder / "checkpoints").steps() == sorted({best, 5, 10, 11, 12})


def test_strict_does_not_fall_back(tmp_path: Path) -> None:
    folder = train(settings(tmp_path, "damaged")).folder
    shard = folder / "checkpoints" / "step-00000012" / "tensors-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0\0")
    with pytest.raises(CheckpointError, match=r"step-00000012/tensors-00000\.safetensors: .*checkpoint\.strict"):
        train(settings(tmp_path, "damaged", checkpoint={"strict": True}))
    assert train(settings(tmp_path, "damaged")).step == 12


def test_init_from_is_not_a_resume(tmp_path: Path) -> None:
    """Weights of another run, and nothing else of it: what AdamW does then is what it does on those weights afresh."""
    first = train(settings(tmp_path, "first")).folder
    source = CheckpointStore(first / "checkpoints")

    class Look(Callback):
        name = "look"

        def before_training(self, trainer: TrainerView) -> None:
            self.parts = {part.key: part.tensor.clone() for part in trainer.engine.fragments()}

    look = Look()
    chosen = settings(tmp_path, "second", optimizer={"learning_rate": 1e-4})
    chosen = chosen.model_copy(update={"train": chosen.train.model_copy(update={"init_from": str(first)})})
    result = train(chosen, [look])
    assert [record["step"] for record in runs.read(result.folder).metrics] == list(range(1, 13))
    assert runs.read(result.folder).events[0]["init_from"].endswith("step-00000012")
    stored = {key: torch.empty(entry.shape) for key, entry in source.manifest(12).tensors.items()}
    source.load(12, [Fragment.whole(key.partition("/")[2], key.partition("/")[0], t) for key, t in stored.items()])
    for key, value in look.parts.items():
        if key.startswith("master/"):
            assert torch.equal(value, stored[key]), key
        else:
            assert not value.any(), key
    losses = [runs.read(folder).column("loss")[0] for folder in (first, result.folder)]
    assert losses[1] < losses[0] - 0.5
    train(chosen.model_copy(update={"train": chosen.train.model_copy(update={"steps": 14})}), [look])
    assert look.parts["step/head.weight"] == 12, "its own checkpoint goes before init_from"

    other = settings(tmp_path, "third", model={"layers": 3})
    wrong = other.model_copy(update={"train": other.train.model_copy(update={"init_from": str(first)})})
    with pytest.raises(
        HarnessError, match=r"train\.init_from: .*first: its weights do not fit \(model\.layers: 2 there"
    ):
        train(wrong)
    nowhere = other.model_copy(update={"train": other.train.model_copy(update={"init_from": "no/where"})})
    with pytest.raises(HarnessError, match=r"train\.init_from: no/where: no such folder"):
        train(nowhere)


def test_a_copy_is_taken_and_its_memory_is_used_again() -> None:
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    tensors = [
        torch.randn(7, 5, generator=generator),
        torch.randn(9, 8, generator=generator)[::2, 1:],  # not contiguous
        torch.randn(3, generator=generator).to(torch.bfloat16),
        torch.tensor(4.0),
        torch.zeros(0, 4),
        torch.arange(3, dtype=torch.int64),
    ]
    fragments = [Fragment.whole(str(number), "master", tensor) for number, tensor in enumerate(tensors)]
    staging = Staging()
    first = staging.copy(fragments)
    kept = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor += 1
    for copied, before in zip(first, kept, strict=True):
        assert torch.equal(copied.tensor, before)
        assert copied.tensor.dtype == before.dtype
        assert copied.tensor.is_contiguous()
    again = staging.copy(fragments)
    assert [part.tensor.data_ptr() for part in again] == [part.tensor.data_ptr() for part in first]
    assert all(torch.equal(part.tensor, tensor) for part, tensor in zip(again, tensors, strict=True))
    starts = sorted((part.tensor.data_ptr(), part.tensor.nbytes) for part in again if part.tensor.numel())
    assert all(start + size <= other for (start, size), (other, _) in pairwise(starts))


def test_two_saves_may_not_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Disk(monkeypatch, seconds=0.2)
    saver = Saver(CheckpointStore(tmp_path))
    fragments = [Fragment.whole("w", "master", torch.ones(3))]
    saver.start(1, fragments, {})
    with pytest.raises(AssertionError, match="overlap"):
        saver.start(2, fragments, {})
    saver.close()  # waits
    assert CheckpointStore(tmp_path).latest_good(verify=True) == 1
