"""What a run has recorded, beside what it should have: metrics.jsonl, and TensorBoard as its own reader sees it."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from harness.runs.event_files import SPEED, tag_of
from harness.runs.files import encode_line, read_lines


class BrokenRunError(Exception):
    """Of a run: what must never be, is."""


def series(folder: Path) -> list[str]:
    """The recorded steps as text, all digits of them, without what depends on the clock."""
    lines = read_lines(folder / "metrics.jsonl", "step")
    return [
        encode_line({key: value for key, value in record.items() if key not in SPEED}).decode() for _, record in lines
    ]


def step_of(line: str) -> int:
    return json.loads(line)["step"]


def difference(found: list[str], expected: list[str]) -> str:
    """The first step that is not as it should be."""
    for mine, theirs in zip(found, expected, strict=False):
        if mine != theirs:
            return f"metrics.jsonl: {mine.strip()} instead of {theirs.strip()}"
    return f"metrics.jsonl: {len(found)} lines, where {len(expected)} are right"


def check_tensorboard(folder: Path) -> None:
    """Each step once, with the values of metrics.jsonl, as TensorBoard's own reader sees it. Raises BrokenRunError."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    expected: dict[str, list[tuple[int, bytes]]] = {}
    for _, record in read_lines(folder / "metrics.jsonl", "step"):
        for column, value in record.items():
            if column != "step" and value is not None:
                expected.setdefault(tag_of(column), []).append((record["step"], struct.pack("f", value)))
    tags = reader.Tags()["scalars"]
    if set(tags) != set(expected):
        raise BrokenRunError(f"TensorBoard has {sorted(tags)}, metrics.jsonl {sorted(expected)}")
    for tag in tags:
        found = [(event.step, struct.pack("f", event.value)) for event in reader.Scalars(tag)]
        if found != expected[tag]:
            steps = [step for step, _ in found]
            raise BrokenRunError(f"TensorBoard, {tag}: steps {steps}, or their values, are not those of metrics.jsonl")
