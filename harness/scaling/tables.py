"""The data of a fit: csv files, jsonl files and run folders, as columns of numbers."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.config import HarnessError
from harness.runs import Run, read

from .formula import evaluate

LAST_SHARE = 0.05
"""Of a run's steps: what its training loss is the mean of, where it has no validation loss."""
COUNTS = {
    "non-embedding": "blocks and norms, without embeddings and head (Kaplan et al.)",
    "all": "all parameters, a tied head once",
    "without-head": "all parameters but an untied head's",
}
"""Conventions of counting a run folder's parameters."""
RUN_COLUMNS = ("parameters", "tokens", "flops", "loss")


@dataclass(frozen=True)
class Table:
    """Rows of data; numbers are float64, what is no number is nan."""

    columns: dict[str, np.ndarray]
    places: list[str]
    """Where each row is, for messages: `file: row 7`."""
    texts: dict[str, list[Any]]
    """The values as they were read, for groups."""
    notes: tuple[str, ...] = ()
    """What a reader of the fit must know of the data."""

    def __len__(self) -> int:
        return len(self.places)

    def taken(self, rows: np.ndarray) -> Table:
        """Some rows, by their numbers."""
        return Table(
            {name: values[rows] for name, values in self.columns.items()},
            [self.places[row] for row in rows],
            {name: [values[row] for row in rows] for name, values in self.texts.items()},
            self.notes,
        )

    def choose(self, wanted: Mapping[str, str], required: Sequence[str]) -> dict[str, np.ndarray]:
        """The columns of a law: `wanted` has formulas for those that are called otherwise. HarnessError, one line that
        names the place, for what is missing or no finite number."""
        found = {}
        for name in required:
            if name not in wanted and name not in self.columns:
                raise HarnessError(
                    f"{self._files()}: has no column {name!r}; columns: {', '.join(self.columns) or 'none'}. Say which "
                    f"one it is, or how it is computed: --column '{name}=...'"
                )
            values = np.broadcast_to(evaluate(wanted.get(name, name), self.columns), len(self))
            bad = np.flatnonzero(~np.isfinite(values))
            if len(bad):
                row = int(bad[0])
                said = self.texts[name][row] if name in self.texts else values[row]
                raise HarnessError(f"{self.places[row]}: {name} is {said!r}, should be a finite number")
            found[name] = values
        return found

    def _files(self) -> str:
        return ", ".join(dict.fromkeys(place.rpartition(": ")[0] or place for place in self.places))


def read_tables(paths: Sequence[Path], count: str = "non-embedding") -> Table:
    """All rows of csv and jsonl files, or a row for each run folder. HarnessError where a file cannot be read, has no
    rows, or is given twice, and where files and run folders are mixed."""
    resolved = [path.resolve() for path in paths]
    for place, path in enumerate(resolved):
        if path in resolved[:place]:
            raise HarnessError(f"{paths[place]}: is given twice")
    folders = [path.is_dir() for path in paths]
    if any(folders) and not all(folders):
        raise HarnessError(f"{paths[folders.index(False)]}: is no run folder like {paths[folders.index(True)]}")
    if folders and all(folders):
        return _of_rows(*_read_runs(paths, count))
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    for path in paths:
        found = _read_file(path)
        if not found:
            raise HarnessError(f"{path}: has no rows")
        rows += found
        places += [f"{path}: row {number}" for number in range(1, len(found) + 1)]
    return _of_rows(rows, places, ())


def check_repeated(table: Table, columns: Mapping[str, np.ndarray]) -> None:
    """HarnessError where two rows say the very same: a run that is counted twice makes intervals too narrow."""
    seen: dict[tuple[float, ...], str] = {}
    for row, place in enumerate(table.places):
        key = tuple(float(values[row]) for values in columns.values())
        if key in seen:
            raise HarnessError(f"{place}: is the same as {seen[key]} in {', '.join(columns)}; a run is counted twice")
        seen[key] = place


def _read_file(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise HarnessError(f"{path}: {reason}; should be a csv or jsonl file, or a run folder") from None
    if path.suffix == ".jsonl":
        return [_parse_line(path, number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if path.suffix != ".csv":
        raise HarnessError(f"{path}: should end in .csv or .jsonl, or be a run folder")
    reader = csv.DictReader(text.splitlines())
    heads = reader.fieldnames or []
    if len(set(heads)) < len(heads):
        raise HarnessError(f"{path}: has two columns of one name: {', '.join(heads)}")
    rows = []
    for number, row in enumerate(reader, 1):
        if None in row or None in row.values():
            raise HarnessError(f"{path}: row {number}: has not as many values as there are columns ({len(heads)})")
        rows.append(dict(row))
    return rows


def _parse_line(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise HarnessError(f"{path}: line {number}: is no JSON object")
    return value


def _of_rows(rows: list[dict[str, Any]], places: list[str], notes: tuple[str, ...]) -> Table:
    names = dict.fromkeys(name for row in rows for name in row)
    texts = {name: [row.get(name) for row in rows] for name in names}
    columns = {name: np.array([_number(value) for value in values]) for name, values in texts.items()}
    return Table(columns, places, texts, notes)


def _number(value: Any) -> float:
    if isinstance(value, bool) or value is None:
        return float("nan")
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def _read_runs(paths: Sequence[Path], count: str) -> tuple[list[dict[str, Any]], list[str], tuple[str, ...]]:
    rows, training = [], []
    for path in paths:
        log = read(path)
        if not log.metrics:
            raise HarnessError(f"{path}: no step is recorded yet")
        row, validated = _run_row(log, count)
        rows.append(row)
        if not validated:
            training.append(path)
    if training and len(training) < len(paths):
        raise HarnessError(f"{training[0]}: has no validation loss and others have; their losses do not compare")
    notes = (
        f"parameters: {count}, {COUNTS[count]}",
        f"loss: mean training loss of the last {LAST_SHARE:.0%} of the steps" if training else "loss: last validation",
    )
    return rows, [str(path) for path in paths], notes


def _run_row(log: Run, count: str) -> tuple[dict[str, Any], bool]:
    counts = log.environment.get("parameters", {})
    validated = [record for record in log.metrics if "validation_loss" in record]
    last = validated[-1] if validated else log.metrics[-1]  # of a run still going, the tokens are the loss's own
    try:
        tied = bool(log.config["model"]["tied_head"])
        parameters = {
            "all": counts["total"],
            "non-embedding": counts["blocks"],
            "without-head": counts["total"] - (0 if tied else counts["head"]),
        }
        tokens = last["tokens_seen"]
        flops = log.environment["model_flops_per_token"] * tokens
    except KeyError as error:
        raise HarnessError(f"{log.path}: does not say its {error.args[0]}; was it made by `harness train`?") from None
    losses = log.column("loss")
    mean = float(losses[-max(1, round(LAST_SHARE * len(losses))) :].mean())
    loss = last["validation_loss"] if validated else mean
    row = {"run": log.path.name, "parameters": parameters[count], "tokens": tokens, "flops": flops, "loss": loss}
    return row, bool(validated)
