"""TensorBoard's files, written as the view of metrics.jsonl that they are.

The usual SummaryWriter names its files by the clock and the process, and TensorBoard reads them in the order of their
names: a resume on a node whose clock is behind would be undone. It also keeps events in a queue, which a kill loses. So
the records (TensorBoard's own) are written here at once, into files numbered by start.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

SPEED = {
    "tokens_per_second",
    "step_seconds",
    "data_wait_seconds",
    "model_flops_per_second",
    "utilisation",
    "memory_bytes",
}


def tag_of(column: str) -> str:
    """A column's name in TensorBoard, which groups by what stands before the slash: speed/, train/, validation/,
    forecast/."""
    if column.startswith(("validation_", "forecast_")):
        return column.replace("_", "/", 1)
    if column in SPEED:
        return f"speed/{column}"
    return column if "/" in column else f"train/{column}"


class EventFileWriter:
    """A new event file in `folder`, after all that are there; what they say of steps from `first_step` on is void."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        numbers = [number_of(path) for path in existing_files(folder)]
        path = folder / f"events.out.tfevents.{max(numbers, default=-1) + 1:010d}.harness"
        self._event_type = event_pb2.Event
        self._file = path.open("xb", buffering=0)
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=first_step, session_log=start)

    def add_scalars(self, step: int, values: dict[str, float]) -> None:
        """One event with all values of a step, rounded to float32.

        Doubles can be stored as tensors, but EventAccumulator, by which scripts read these files, forgets to make
        tensors void.
        """
        from tensorboard.compat.proto import summary_pb2

        summary = summary_pb2.Summary()
        for name, value in values.items():
            summary.value.add(tag=tag_of(name), simple_value=value)
        self._write(step=step, summary=summary)

    def close(self) -> None:
        self._file.close()

    def _write(self, **fields: Any) -> None:
        self._records.write(self._event_type(wall_time=time.time(), **fields).SerializeToString())


def existing_files(folder: Path) -> list[Path]:
    """The event files of earlier starts, oldest first; files of other makers are not among them."""
    return sorted(path for path in folder.glob("events.out.tfevents.*.harness") if path.name.split(".")[3].isdecimal())


def number_of(path: Path) -> int:
    """Which start wrote an event file, counted from 0."""
    return int(path.name.split(".")[3])
