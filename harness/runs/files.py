"""Whole files, and files of JSON lines that a kill leaves readable."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import RunError

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""JSON has no such numbers: they are written as these texts, which float() and JavaScript's Number() read too."""


def encode_line(record: dict[str, Any]) -> bytes:
    """One line of valid JSON. Scalars of numpy and torch become numbers. TypeError for what JSON does not know."""
    return json.dumps(_plain(record), allow_nan=False).encode() + b"\n"


def decode_line(line: bytes) -> dict[str, Any]:
    """The inverse of encode_line. ValueError for what is not a JSON object."""
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("not an object")
    return {key: _with_non_finite(value) for key, value in record.items()}


def read_lines(path: Path, key: str) -> list[tuple[bytes, dict[str, Any]]]:
    """Every line of a file with its record, which has `key`; none where there is no file.

    A last line that a kill or a writer at work has left unfinished is left out. Raises RunError for any other line
    that is not such a record, by its number.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = decode_line(line)
        except ValueError:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            record = {}
        if key not in record:
            raise RunError(f"{path}: line {number} is not a JSON object with a {key!r}: remove or restore the line")
        records.append((line if line.endswith(b"\n") else line + b"\n", record))
    return records


class JsonLinesFile:
    """A file that grows by whole lines, each written by one call and there at once for every reader."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._end_last_line()

    def append(self, record: dict[str, Any]) -> None:
        """Raises RunError where the line can't be written; nothing of it is left then."""
        line = encode_line(record)
        size = os.fstat(self._descriptor).st_size
        try:
            written = os.write(self._descriptor, line)
            if written < len(line):
                raise OSError(f"only {written} of {len(line)} bytes were written")
        except OSError as error:
            os.ftruncate(self._descriptor, size)
            raise RunError(f"{self.path}: cannot be written: {error}") from None

    def sync(self) -> None:
        """Flush to the disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)

    def _end_last_line(self) -> None:
        """A line that a kill has torn is cut off; one that lacks nothing but its end gets it."""
        content = self.path.read_bytes()
        last = content[content.rfind(b"\n") + 1 :]
        if not last:
            return
        try:
            decode_line(last)
        except ValueError:
            os.ftruncate(self._descriptor, len(content) - len(last))
        else:
            os.write(self._descriptor, b"\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, (str, int, float)) and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return next(text for text, number in NON_FINITE.items() if str(number) == str(float(value)))
    return value


def _with_non_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_non_finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_with_non_finite(item) for item in value]
    return NON_FINITE.get(value, value) if isinstance(value, str) else value
