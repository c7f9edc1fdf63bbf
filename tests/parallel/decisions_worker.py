"""What goes wrong on one rank of four, and what all of them make of it; started from test_decisions.py."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from harness import stop
from harness.callbacks import Callback, FaultJudge, TrainerView
from harness.checkpoint import shard_writer
from harness.data import TokenStream
from harness.parallel import ParallelLayout, ParallelSection
from harness.settings import Settings
from harness.train import Trainer, train
from tests.small_run import small_settings

BAD_SAMPLE = 32
"""Of the ninth step, at first: steps have 4 samples."""


class Killed(BaseException):
    """On all ranks at the same step."""


class KillAfter(Callback):
    """Ends the run after the n-th step that is done, when its checkpoints are written."""

    name = "kill"

    def __init__(self, steps: int) -> None:
        self.left = steps

    def after_record(self, trainer: TrainerView, record: dict[str, Any]) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed


class Ask(Callback):
    """A signal to one rank alone, after a step."""

    name = "ask"

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def after_step(self, trainer: TrainerView, record: dict[str, Any]) -> None:
        if (trainer.step, trainer.layout.rank) == (self.step, self.rank):
            os.kill(os.getpid(), signal.SIGTERM)


def settings_of(folder: Path, name: str, layout: dict[str, Any], **faults: Any) -> Settings:
    return small_settings(
        folder,
        run={"name": name},
        parallel={"device": "cpu", "zero": {"keep_whole_below": 0}, **layout},
        schedule={"kind": "constant"},
        train={"steps": 14, "micro_batch_size": 1},
        validation={"every_steps": 5, "samples": 8, "batch_size": 1},
        checkpoint={"every_steps": 2, "keep_last": None, "retry_steps": 1},
        faults={"window_steps": 6, "rollback_steps": 3, **faults},
    )


def bad_sample_on(rank: int) -> Any:
    """A step that reads BAD_SAMPLE has, on this rank alone, a loss that is no number."""
    plain_read, plain_backward = TokenStream.read, Trainer._backward

    def read(self: Any, *arguments: Any) -> Any:
        first = self.consumed_samples
        batches = plain_read(self, *arguments)
        skipped = any(start <= BAD_SAMPLE < end for start, end in self.state_dict()["skipped"])
        self.bad = first <= BAD_SAMPLE < self.consumed_samples and not skipped
        return batches

    def backward(self: Trainer, batch: Any, tokens: int, *, last: bool) -> Any:
        loss = plain_backward(self, batch, tokens, last=last)
        return loss * math.nan if self.stream.bad and self.layout.rank == rank else loss  # type: ignore[attr-defined]

    return mock.patch.multiple(TokenStream, read=read), mock.patch.multiple(Trainer, _backward=backward)


def spike_on(rank: int, step: int) -> Any:
    plain = Trainer._backward
    done: list[int] = []

    def backward(self: Trainer, batch: Any, tokens: int, *, last: bool) -> Any:
        loss = plain(self, batch, tokens, last=last)
        if (self.layout.rank, self.step + 1) == (rank, step) and not done:
            done.append(step)
            return loss * 30
        return loss

    return mock.patch.multiple(Trainer, _backward=backward)


def full_disk_on(rank: int, me: int, calls: set[int]) -> Any:
    plain, count = shard_writer.write_tensor_file, [0]

    def write(*arguments: Any) -> Any:
        count[0] += 1
        if me == rank and count[0] in calls:
            raise OSError(28, "No space left on device")
        return plain(*arguments)

    return mock.patch.object(shard_writer, "write_tensor_file", write)


def main() -> None:
    """`decisions_worker.py FOLDER LAYOUT`: each rank's view of every job as FOLDER/RANK.json."""
    torch.set_num_threads(1)
    folder, axes = Path(sys.argv[1]), json.loads(sys.argv[2])
    stop.install()
    seen: dict[str, Any] = {}
    with ParallelLayout(ParallelSection(device="cpu", timeout_seconds=120, **axes)) as layout:
        layout.first_decides(lambda: small_settings(folder) and None)  # the text, once

        def run(name: str, callbacks: Any = (), **faults: Any) -> None:
            decided: list[Any] = []
            plain = FaultJudge.decide

            def decide(self: FaultJudge, fault: Any) -> Any:
                policy = plain(self, fault)
                decided.append([fault.kind, policy])
                return policy

            with mock.patch.object(FaultJudge, "decide", decide):
                try:
                    result = train(settings_of(folder, name, axes, **faults), callbacks)
                    outcome: Any = [result.step, result.stopped_by]
                except Killed:
                    outcome = "killed"
                except Exception as error:
                    outcome = f"{type(error).__name__}: {error}"
            seen.setdefault(name, []).append([outcome, decided])
            stop._requested = None

        run("whole")
        poisons = bad_sample_on(2)
        with poisons[0], poisons[1]:
            run("nan-stop", non_finite="stop")
            run("nan-skip", non_finite="skip")
            run("nan-rollback", non_finite="rollback")
            for name, steps in (("nan-killed", 10), ("nan-killed-later", 13)):
                run(name, [KillAfter(steps)], non_finite="rollback")
                run(name, non_finite="rollback")
        with spike_on(1, 8):
            run("spike-skip", spike="skip")
        with spike_on(3, 8):
            run("spike-rollback", spike="rollback")
        run("asked", [Ask(4, rank=2)])
        run("asked")
        with full_disk_on(3, layout.rank, {2, 3}):
            run("full")
    (folder / f"{layout.rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
