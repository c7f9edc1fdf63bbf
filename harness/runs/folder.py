"""The folder of a run, written by rank 0; of the other ranks only a log.

config.yaml              the resolved configuration of the newest start
environment.json, .diff  what it ran on; what differed from the git commit
starts/0000/...          the same files of earlier starts, in order
metrics.jsonl            the record of steps: one line a step, each step once
metrics.discarded.jsonl  steps that a resume went back behind
events.jsonl             append-only: starts, saves, signals, with reasons
tensorboard/             a view of metrics.jsonl
train.log                lines for people
ranks/rank-00003.log     the same of the other ranks
ranks/rank-00003.stacks  where a rank's threads stood when the job was ended because it hung, or a rank was lost
slurm-starts.txt         launch/slurm/requeue.sbatch: each start of a job, and the checkpoint it began from
checkpoints/             see harness.checkpoint
"""

from __future__ import annotations

import json
import logging
import shutil
import socket
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from harness.disk import write_whole

from .environment import describe_environment
from .errors import RunError
from .event_files import EventFileWriter, existing_files
from .files import JsonLinesFile, read_lines
from .lock import FolderLock

logger = logging.getLogger(__name__)

CONFIG, ENVIRONMENT, DIFF = "config.yaml", "environment.json", "environment.diff"
METRICS, DISCARDED, EVENTS = "metrics.jsonl", "metrics.discarded.jsonl", "events.jsonl"


class RunFolder:
    """Writes one run. Making one locks the folder and changes nothing in it; `begin` does.

    A rank other than 0 locks nothing, and what it is told to record is left to rank 0. Raises RunError where another
    process is writing into the folder, and where a rank does not see the folder that rank 0 made.
    """

    def __init__(self, path: Path | str, *, tensorboard: bool = True, rank: int = 0) -> None:
        self.path = Path(path)
        self.rank = rank
        self._with_tensorboard = tensorboard
        self._metrics: JsonLinesFile | None = None
        self._events: JsonLinesFile | None = None
        self._view: EventFileWriter | None = None
        self._last_step: int | None = None
        self._lock: FolderLock | None = None
        if rank > 0:
            if not self.path.is_dir():
                raise RunError(
                    f"{self.path}: made by rank 0 and not seen by rank {rank} on {socket.gethostname()}; run.folder "
                    f"must lie on a file system that all machines share"
                )
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.path)
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written: {error.strerror}; choose another run.folder") from None

    @property
    def log_file(self) -> Path:
        """train.log, or this rank's own, for configure_logging."""
        return self.path / ("train.log" if self.rank == 0 else f"ranks/rank-{self.rank:05d}.log")

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints, for CheckpointStore."""
        return self.path / "checkpoints"

    def existing(self) -> int | None:
        """The last step that is recorded here; None where no step is, so that a fresh start loses nothing."""
        lines = read_lines(self.path / METRICS, "step")
        return lines[-1][1]["step"] if lines else None

    def begin(self, config_text: str, *, resume_at: int | None = None, details: dict[str, Any] | None = None) -> None:
        """Write down what this start is, and open the records. `details` (JSON) join the environment's.

        `resume_at` is the step of the checkpoint that the run goes on from (see the method of that name); None is a
        fresh start, and RunError where the folder has steps already. What describes an earlier start is kept.
        """
        if self.rank > 0:
            return
        last = self.existing()
        if resume_at is None and last is not None:
            raise RunError(
                f"{self.path}: holds a run up to step {last}; resume it (train.resume=auto), or choose another run.name"
            )
        self._keep_earlier_start()
        environment, diff = describe_environment(Path.cwd())
        write_whole(self.path / CONFIG, config_text.encode())
        environment |= details or {}
        write_whole(self.path / ENVIRONMENT, json.dumps(environment, indent=2).encode() + b"\n")
        if diff:
            write_whole(self.path / DIFF, diff)
        else:
            (self.path / DIFF).unlink(missing_ok=True)
        self._events = JsonLinesFile(self.path / EVENTS)
        self.resume_at(resume_at if resume_at is not None else -1)

    def resume_at(self, step: int) -> None:
        """Make the records those of a run that has just done `step`: later steps go to metrics.discarded.jsonl.

        A kill at any point leaves the records as they were or as they should be. TensorBoard's files are left alone; a
        new one says from where on they are void.
        """
        if self.rank > 0:
            return
        self._close_records()
        lines = read_lines(self.path / METRICS, "step")
        kept = [(line, record) for line, record in lines if record["step"] <= step]
        discarded = b"".join(line for line, record in lines if record["step"] > step)
        if discarded:
            earlier = b"".join(line for line, _ in read_lines(self.path / DISCARDED, "step"))
            if not earlier.endswith(discarded):  # else a kill came between the two writes below
                write_whole(self.path / DISCARDED, earlier + discarded)
            write_whole(self.path / METRICS, b"".join(line for line, _ in kept))
        self._metrics = JsonLinesFile(self.path / METRICS)
        self._last_step = kept[-1][1]["step"] if kept else None
        if step > 0 and self._last_step != step:
            logger.warning(
                "%s ends at step %s and the run goes on from step %d: steps are missing",
                self.path / METRICS,
                self._last_step,
                step,
            )
        if self._with_tensorboard:
            folder = self.path / "tensorboard"
            complete = bool(existing_files(folder))
            self._view = EventFileWriter(folder, step + 1)
            for _, record in () if complete else kept:  # TensorBoard was off until now, or its folder removed
                self._view.add_scalars(record["step"], self._scalars(record))

    def log_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        """Record a step, once: numbers by name; numpy's and torch's scalars are taken, None is no value.

        Raises RunError where the step or a later one is recorded already, and for what is not a number.
        """
        if self.rank > 0:
            return
        if self._metrics is None:
            raise RunError(f"{self.path}: metrics before begin()")
        if self._last_step is not None and step <= self._last_step:
            raise RunError(
                f"{self.path / METRICS}: step {step} comes after step {self._last_step}: a step is recorded once"
            )
        line = {"step": step, **{name: value for name, value in metrics.items() if name != "step"}}
        scalars = self._scalars(line)
        self._metrics.append(line)
        self._last_step = step
        if self._view is not None:
            self._view.add_scalars(step, scalars)

    def log_event(self, event: str, step: int | None = None, **details: Any) -> None:
        """Append to events.jsonl: what happened, when (UTC), at which step, and details that JSON can hold."""
        if self.rank > 0:
            return
        if self._events is None:
            raise RunError(f"{self.path}: event before begin()")
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._events.append({"time": now, "event": event, **({} if step is None else {"step": step}), **details})

    def sync(self) -> None:
        """Flush the records to the disk: to be called before a checkpoint is committed that they lead up to."""
        for records in (self._metrics, self._events):
            if records is not None:
                records.sync()

    def close(self) -> None:
        """Close the records and release the folder; harmless when repeated."""
        self._close_records()
        if self._events is not None:
            self._events.close()
            self._events = None
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _close_records(self) -> None:
        for records in (self._metrics, self._view):
            if records is not None:
                records.close()
        self._metrics = self._view = None

    def _keep_earlier_start(self) -> None:
        described = [self.path / name for name in (CONFIG, ENVIRONMENT, DIFF) if (self.path / name).exists()]
        if not described:
            return
        starts = self.path / "starts"
        numbers = [int(place.name) for place in starts.glob("*") if place.name.isdigit()] if starts.is_dir() else []
        place = starts / f"{max(numbers, default=-1) + 1:04d}"
        place.mkdir(parents=True)
        for file in described:
            shutil.copy2(file, place / file.name)

    def _scalars(self, record: dict[str, Any]) -> dict[str, float]:
        scalars = {}
        for name, value in record.items():
            if name == "step" or value is None:
                continue
            if isinstance(value, str) or not hasattr(value, "__float__"):
                raise RunError(f"{self.path / METRICS}: {name} is {value!r}, which is not a number; log it as an event")
            scalars[name] = float(value.item() if hasattr(value, "item") else value)
        return scalars
