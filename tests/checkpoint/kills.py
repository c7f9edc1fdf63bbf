"""Traps: a forked process trains, and kills itself with SIGKILL when it comes to a planned point for the n-th time.

What it passes on its way are operations, "fsync", "optimizer step"; each belongs to the points of `POINTS` that it is a
part of where it happens: a rename is of "rename" where a checkpoint is committed, of "prune" where an old one goes.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import harness.train
from harness import stop
from harness.callbacks import validation
from harness.checkpoint import CheckpointStore, Pruner, manifest, shard_writer
from harness.parallel import Peak, Staging
from harness.parallel.torch_engine import TorchEngine
from harness.parallel.zero_engine import ZeroEngine
from harness.runs import RunFolder
from harness.runs.event_files import EventFileWriter
from harness.runs.files import JsonLinesFile
from harness.settings import Settings
from harness.train import Trainer

NAMED = ("step", "snapshot", "write", "flush", "rename", "prune", "evaluation")
"""A micro-batch's backward pass and the optimizer step; the copy of the state; the files of a checkpoint, made, filled
tensor by tensor, ended; their flushes, and those of folders; the renames of a commit; deletion of old checkpoints; a
batch of validation, and the whole of it."""
POINTS = (*NAMED, "record", "resume", "rollback", "stop")
"""Also: lines of metrics, events and TensorBoard; anything before the first step of a start that goes on from a
checkpoint; from a rollback until the next step; anything after the process was asked to stop, by SIGTERM."""
RANDOM = "random"
"""Not at a point: by another process, after so many seconds."""

_MEMORY_BYTES = 4096
_PIECES = 12  # of so many pieces of a file, a tensor each, one counts: else nearly all that is done would be those
_FILE_CALLS = {"fsync": "fsync", "rename": "rename", "unlink": "unlink", "rmdir": "rmdir", "mkdir": "mkdir"}


@dataclass(frozen=True)
class Plan:
    """When a process of a job is to be killed. JSON: the fields as an object."""

    point: str
    number: int = 1
    """At which arrival at the point."""
    after: bool = False
    """When what happens there has happened, instead of before it."""
    rank: int = 0
    both: bool = False
    """The other rank is killed as well, as soon as this one is gone."""
    signal_at: int = 0
    """Of "stop": at which operation the process asks itself to stop, of those of `signal_point`."""
    signal_point: str = "anywhere"
    seconds: float = 0.0
    """Of RANDOM: after the fork."""


class Memory:
    """What a process leaves to its parent, however it ends: a text in shared memory."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, _MEMORY_BYTES)

    def write(self, text: str) -> None:
        self._map[:] = text.encode()[:_MEMORY_BYTES].ljust(_MEMORY_BYTES, b"\0")

    def read(self) -> str:
        return self._map[:].rstrip(b"\0").decode()


@dataclass(frozen=True)
class Poison:
    """Samples of the stream with which a step goes wrong, until a rollback behind it is in a committed checkpoint: from
    then on it is what was decided that keeps a run from training on them, and nothing else."""

    samples: tuple[int, ...]
    loss: float
    """Added to the mean loss of a micro-batch."""

    def apply(self, decided: Path) -> None:
        """In this process, from now on. `decided` is a file in which processes of a run note such rollbacks."""
        over = {int(line) for line in decided.read_text().split()} if decided.exists() else set()
        bad = [sample for sample in self.samples if sample not in over]
        noticed: list[int] = []
        backward, roll_back, save = Trainer._backward, Trainer._roll_back, CheckpointStore.save

        def spoiled(trainer: Trainer, batch: Any, tokens: int, *, last: bool) -> Any:
            loss = backward(trainer, batch, tokens, last=last)
            return loss + self.loss * tokens if _taken(trainer, bad) else loss

        def noted(trainer: Trainer, *arguments: Any) -> None:
            noticed.extend(_taken(trainer, bad))  # no save is going on; the next one is that of the decision
            roll_back(trainer, *arguments)

        def saved(store: CheckpointStore, step: int, *arguments: Any) -> Path:
            folder, behind = save(store, step, *arguments), list(noticed)
            with decided.open("a") as file:
                file.write("".join(f"{sample}\n" for sample in behind))
            del noticed[: len(behind)]
            return folder

        Trainer._backward = spoiled  # type: ignore[method-assign, assignment]
        Trainer._roll_back = noted  # type: ignore[method-assign, assignment]
        CheckpointStore.save = saved  # type: ignore[method-assign, assignment]


def _taken(trainer: Trainer, samples: list[int]) -> list[int]:
    """Those of `samples` that the step which is going on trains on."""
    stream, first = trainer.stream.state_dict(), trainer._first_samples[trainer.step + 1]
    skipped = [sample for sample in samples for start, end in stream["skipped"] if start <= sample < end]
    return [sample for sample in samples if first <= sample < stream["consumed_samples"] and sample not in skipped]


class Trap:
    """Counts arrivals at every point in this process, and kills it where `plan` says."""

    def __init__(self, plan: Plan | None, memory: Memory) -> None:
        self.counts: Counter[str] = Counter()
        self._plan, self._memory = plan, memory
        self._starting, self._stopping, self._rolled_back = True, False, False
        self._scopes = threading.local()
        self._lock = threading.Lock()

    def lay(self) -> None:
        """Wrap what a run calls."""
        for name, operation in _FILE_CALLS.items():
            self._watch(os, name, operation)
        self._watch(os, "write", "line", only_in="append")
        self._watch(Trainer, "_backward", "backward")
        for engine in (TorchEngine, ZeroEngine):
            self._watch(engine, "step", "optimizer step")
        self._watch(Staging, "copy", "snapshot")
        self._watch(manifest, "write_synced", "manifest file")
        self._watch(Trainer, "check_in", "validation batch")
        self._watch(validation, "score", "validation")
        self._watch(EventFileWriter, "add_scalars", "TensorBoard event")
        self._watch(CheckpointStore, "verify", "verification")
        self._watch(CheckpointStore, "load", "loading")
        self._watch_tensor_files()
        self._name_scope(JsonLinesFile, "append", "append")
        self._name_scope(CheckpointStore, "save", "save")
        self._name_scope(Pruner, "delete", "prune")
        self._name_scope(Pruner, "prune", "prune")
        self._name_scope(RunFolder, "resume_at", "records")
        self._notice(Trainer, "_roll_back", self._note_rollback)
        self._notice(Trainer, "_train_step", self._note_step)

    def points(self, operation: str) -> set[str]:
        """The points that an operation, here and now, is a part of."""
        scopes = self._open_scopes()
        points = {"anywhere"}
        if operation in ("backward", "optimizer step"):
            points.add("step")
        elif operation == "snapshot":
            points.add("snapshot")
        elif operation in ("validation batch", "validation"):
            points.add("evaluation")
        elif operation in ("line", "TensorBoard event") or "records" in scopes:
            points.add("record")
        elif "prune" in scopes:
            points.add("prune")
        elif "save" in scopes:
            points.add({"fsync": "flush", "rename": "rename"}.get(operation, "write"))
        flags = {"resume": self._starting, "stop": self._stopping, "rollback": self._rolled_back}
        return points | {point for point, on in flags.items() if on}

    @contextmanager
    def at(self, operation: str) -> Iterator[None]:
        """The block is an operation."""
        plan, fatal = self._plan, False
        with self._lock:
            self._memory.write(f"at {operation}")
            points = self.points(operation)
            self.counts.update(points)
            if plan is not None:
                fatal = plan.point in points and self.counts[plan.point] == plan.number
                if plan.signal_point in points and self.counts[plan.signal_point] == plan.signal_at:
                    self._stopping = True
                    os.kill(os.getpid(), signal.SIGTERM)
            if fatal and plan is not None and not plan.after:
                self._die(operation)
        try:
            yield
        finally:
            if fatal:
                self._die(operation)

    def _die(self, operation: str) -> NoReturn:
        assert self._plan is not None
        self._memory.write(f"hit {'after' if self._plan.after else 'before'} {operation}")
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("still alive")

    def _open_scopes(self) -> list[str]:
        if not hasattr(self._scopes, "names"):
            self._scopes.names = []
        return self._scopes.names

    def _watch(self, owner: Any, name: str, operation: str, *, only_in: str | None = None) -> None:
        original = getattr(owner, name)

        @wraps(original)
        def watched(*arguments: Any, **options: Any) -> Any:
            if only_in is not None and only_in not in self._open_scopes():
                return original(*arguments, **options)
            with self.at(operation):
                return original(*arguments, **options)

        setattr(owner, name, watched)

    def _watch_tensor_files(self) -> None:
        original = shard_writer.write_tensor_file

        def watched(path: Path, tensors: Any, on_written: Callable[[int], None], fetch: Any) -> Any:
            pieces = 0

            def on_piece(size: int) -> None:
                nonlocal pieces
                pieces += 1
                if pieces % _PIECES != 1:
                    return on_written(size)
                with self.at("piece of a tensor file"):
                    return on_written(size)

            with self.at("tensor file"):
                return original(path, tensors, on_piece, fetch)

        shard_writer.write_tensor_file = watched  # type: ignore[assignment]

    def _name_scope(self, owner: Any, name: str, scope: str) -> None:
        original = getattr(owner, name)

        @wraps(original)
        def scoped(*arguments: Any, **options: Any) -> Any:
            self._open_scopes().append(scope)
            try:
                return original(*arguments, **options)
            finally:
                self._open_scopes().pop()

        setattr(owner, name, scoped)

    def _notice(self, owner: Any, name: str, note: Callable[[], None]) -> None:
        original = getattr(owner, name)

        @wraps(original)
        def noticed(*arguments: Any, **options: Any) -> Any:
            note()
            return original(*arguments, **options)

        setattr(owner, name, noticed)

    def _note_rollback(self) -> None:
        self._rolled_back = True

    def _note_step(self) -> None:
        self._starting = self._rolled_back = False


def train_in_child(
    settings: Settings, plan: Plan | None, poison: Poison | None, memory: Memory, log: Path, variables: dict[str, str]
) -> int:
    """Fork a process that trains, with the trap of `plan` set in it; its id.

    It ends as `harness train` would, and leaves {"counts": of arrivals at every point} in `memory` where nothing stops
    it. What it says goes to the end of `log`.
    """
    child = os.fork()
    if child != 0:
        return child
    status = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(variables)
        stop.install()
        trap = Trap(plan, memory)
        trap.lay()
        if poison is not None:
            poison.apply(log.with_suffix(".decided"))
        harness.train.peak_flops = lambda device, dtype: Peak(1e12, "not measured")
        result = harness.train.train(settings)
        status = 0 if result.stopped_by is None else stop.EXIT_RESUME
        if status == 0:
            memory.write(json.dumps({"counts": trap.counts}))
    except stop.StopRequested:
        status = stop.EXIT_RESUME
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)
