"""The working folder: what is known of every document so far, in files that a restart and another budget build on.

state.json                        what the scores depend on; other settings are refused
measure/shard-00000/              what ranks the documents of a shard
    part-0000.npz                 columns, a row a record, for PART_ROWS records
    done.json                     the shard is complete
duplicates.npz                    which records repeat another's text
round-000/plan.json               further passes over some records: `estimate`, `score` or `inspect`
round-000/wanted/shard-00000.npy  which
round-000/shard-00000/            what came out, as above, with the records' rows
round-000/kept/shard-00000/       the records themselves, by part, so that later rounds need not read the pool again;
                                  KEPT_SHARE of a shard's at most, and only where that pays (see kept.py)
final/shard-00000.npz             what to write

Every file is whole or not there, save those in kept/, which are checked as they are read. A round counts once all its
shards are done, so a restart decides what its predecessor decided.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from harness.config import HarnessError
from harness.disk import write_whole

from .pool import PART_ROWS

STATE = "state.json"
MEASURE = "measure"
STAGES = ("sketch", "features")
"""What estimates a score, the cheapest first (see methods.py); a race may begin with the second."""
OUTDATED = "outdated"
WRITING = ".writing-"
"""How the names of files begin that are being written, or were when their process was killed."""
HELD_BYTES = 128 << 20
"""Results that are kept in memory."""
Arrays = dict[str, np.ndarray]


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by a JSON file, whole."""
    # Half a surrogate pair, which an id or the name of a file may hold, becomes the escape that JSON has for it.
    replace(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))


def read_json(path: Path) -> dict[str, Any] | None:
    """What write_json wrote; nothing of it where the file is damaged, None where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def replace(path: Path, content: bytes) -> None:
    """`write_whole`, in a folder that may not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content, temporary_name())


def temporary_name() -> str:
    """What a file is called that this process writes: a task on a cluster outlives the command that asked for it, and
    the next command asks another one for the same file."""
    return f"{WRITING}{socket.gethostname()}-{os.getpid()}"


class WorkFolder:
    """Files of a selection in progress, by pass, shard and part."""

    def __init__(self, path: Path, state: dict[str, Any], inspection: dict[str, Any]) -> None:
        """Makes the folder, or takes up one that was made for the same `state` (JSON). HarnessError for another's.

        `inspection` (JSON) is what inspections depend on besides: those of another one are left alone.
        """
        self.path = path
        self._inspection = json.loads(json.dumps(inspection))
        self._held: dict[Path, Arrays] = {}
        self._held_bytes = 0
        file = path / STATE
        wanted = json.loads(json.dumps(state))
        found = read_json(file)
        if found is not None:
            difference = next((key for key in wanted if found.get(key) != wanted[key]), None)
            if difference is not None and not any((path / MEASURE).glob("shard-*/*")):
                write_json(file, wanted)  # it ended before it had a score
            elif difference is not None:
                raise HarnessError(
                    f"{path}: holds the scores of another selection (it differs in {difference}); choose another "
                    "output.work, or delete the folder"
                )
        else:
            write_json(file, wanted)

    def columns(self, name: str, shard: int, part: int) -> Arrays | None:
        """What a pass left of a part; None where there is nothing."""
        file = self._part(name, shard, part)
        if file in self._held:
            return self._held[file]
        if not file.exists():
            return None
        columns = self.load(file)
        size = sum(values.nbytes for values in columns.values())
        if self._held_bytes + size <= HELD_BYTES:  # of a larger pool the rest is read anew each time
            self._held[file] = columns
            self._held_bytes += size
        return columns

    def load(self, file: Path) -> Arrays:
        """What save_arrays wrote below this folder; HarnessError where the file is damaged or gone."""
        try:
            with np.load(file, allow_pickle=False) as stored:
                return {key: stored[key] for key in stored.files}
        except (OSError, ValueError, EOFError, BadZipFile) as error:
            raise self._damage(file, error) from None

    def _damage(self, file: Path, error: object) -> HarnessError:
        return HarnessError(f"{file}: is damaged ({error}); delete {self.path} and start again")

    def save(self, name: str, shard: int, part: int, columns: Arrays) -> None:
        """Keep the columns of a part."""
        save_arrays(self._part(name, shard, part), columns)

    def parts(self, name: str, shard: int) -> set[int]:
        """The parts that a pass has left."""
        return {int(file.stem.removeprefix("part-")) for file in self._shard(name, shard).glob("part-*.npz")}

    def finish_shard(self, name: str, shard: int, facts: dict[str, Any]) -> None:
        """Mark a shard's pass as complete, with what is to be said of it (JSON)."""
        write_json(self._shard(name, shard) / "done.json", facts)

    def facts(self, name: str, shard: int) -> dict[str, Any] | None:
        """What `finish_shard` was told; None where the pass is not complete."""
        return self._read(self._shard(name, shard) / "done.json")

    def is_finished(self, name: str, shard: int) -> bool:
        """Whether `finish_shard` was told."""
        return (self._shard(name, shard) / "done.json").exists()

    def _read(self, file: Path) -> dict[str, Any] | None:
        found = read_json(file)
        if found == {}:
            raise self._damage(file, "no JSON object")
        return found

    def rounds(self, shards: int) -> list[tuple[str, str]]:
        """Name and task of every complete round, in order; OUTDATED for an inspection by other settings."""
        found = []
        for number in range(len(list(self.path.glob("round-*/plan.json")))):
            name = f"round-{number:03d}"
            plan = self._read(self.path / name / "plan.json")
            if plan is None or any(self.facts(name, shard) is None for shard in range(shards)):
                break
            found.append((name, plan["task"] if self._is_current(plan) else OUTDATED))
        return found

    def _is_current(self, plan: dict[str, Any]) -> bool:
        return plan["task"] != "inspect" or plan["inspection"] == self._inspection

    def plan_round(self, name: str, task: str, wanted: dict[int, np.ndarray]) -> str:
        """Write down which records a round is about: bool [records] of each shard; returns its task.

        What an earlier start has planned is kept and done first, even if it had another budget.
        """
        file = self.path / name / "plan.json"
        plan = self._read(file)
        if plan is not None and self._is_current(plan):
            return str(plan["task"])
        file.unlink(missing_ok=True)  # first: without it the rest does not count
        shutil.rmtree(self.path / name, ignore_errors=True)
        for shard, rows in wanted.items():
            save_array(self.path / name / "wanted" / f"shard-{shard:05d}.npy", rows)
        write_json(file, {"task": task, "inspection": self._inspection})
        return task

    def wanted(self, name: str, shard: int) -> np.ndarray | None:
        """The records of a shard that a pass is about: bool [records]; None for all."""
        return None if name == MEASURE else self._wanted_of_round(name, shard)

    def _wanted_of_round(self, name: str, shard: int) -> np.ndarray:
        file = self.path / name / "wanted" / f"shard-{shard:05d}.npy"
        try:
            rows: np.ndarray = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise self._damage(file, error) from None
        return rows

    def kept_file(self, name: str, shard: int, part: int) -> Path:
        """Where a round keeps the records of a part."""
        return self.path / name / "kept" / f"shard-{shard:05d}" / f"part-{part:04d}.zst"

    def kept(self, shard: int) -> list[KeptFile]:
        """What rounds have kept of a shard, by part."""
        found = []
        for plan in self.path.glob("round-*/plan.json"):
            for file in (plan.parent / "kept" / f"shard-{shard:05d}").glob("part-*.zst"):
                part = int(file.stem.removeprefix("part-"))
                place = slice(part * PART_ROWS, (part + 1) * PART_ROWS)
                found.append(KeptFile(file, part, place, self._wanted_of_round(plan.parent.name, shard)[place]))
        return sorted(found, key=lambda file: (file.part, file.path))

    def count_wanted(self, name: str, shards: int) -> int:
        """How many records a round is about."""
        return sum(int(rows.sum()) for shard in range(shards) if (rows := self.wanted(name, shard)) is not None)

    def _shard(self, name: str, shard: int) -> Path:
        return self.path / name / f"shard-{shard:05d}"

    def _part(self, name: str, shard: int, part: int) -> Path:
        return self._shard(name, shard) / f"part-{part:04d}.npz"


def save_array(path: Path, values: np.ndarray) -> None:
    """A .npy file, whole."""
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    replace(path, buffer.getvalue())


def save_arrays(path: Path, columns: Arrays) -> None:
    """A .npz file, whole."""
    buffer = io.BytesIO()
    np.savez(buffer, **columns)  # type: ignore[arg-type]
    replace(path, buffer.getvalue())


@dataclass(frozen=True)
class KeptFile:
    """Where a round has kept the records of a part that it was about."""

    path: Path
    part: int
    place: slice
    """Of the part in its shard."""
    rows: np.ndarray
    """bool [records of the part]: which."""


@dataclass
class View:
    """Everything known of the records of one part: each array has a row a record."""

    shard: int
    part: int
    measured: Arrays
    later: list[tuple[str, Arrays]] = field(default_factory=list)
    """Of every round that was about some of them: its task and columns, of which `rows` says where they belong."""
    repeated: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.measured["bytes"])

    @property
    def first_row(self) -> int:
        """Of the shard."""
        return self.part * PART_ROWS

    @cached_property
    def eligible(self) -> np.ndarray:
        """bool: has text that no other record said before it."""
        usable = self.measured["usable"]
        return usable if self.repeated is None else usable & ~self.repeated

    @cached_property
    def scores(self) -> np.ndarray:
        """float64 [records, sets of targets]: exact ones, NaN where unknown."""
        if "scores" in self.measured:
            return self.measured["scores"]
        full = np.full((len(self), sum(name.startswith(STAGES) for name in self.measured)), np.nan)
        for columns in self._of("score"):
            full[columns["rows"] - self.first_row] = columns["scores"]
        return full

    def predictors(self, stage: str, target: int) -> np.ndarray:
        """float32 [records, columns]: what a stage of the race knows of the scores for one set of targets; NaN where
        nothing yet, no columns where nothing of any."""
        name = f"{stage}-{target}"
        if name in self.measured:
            return self.measured[name]
        found = [columns for _, columns in self.later if name in columns]
        full = np.full((len(self), found[0][name].shape[1] if found else 0), np.nan, dtype=np.float32)
        for columns in found:
            full[columns["rows"] - self.first_row] = columns[name]
        return full

    @cached_property
    def inspected(self) -> np.ndarray:
        """bool."""
        full = np.zeros(len(self), dtype=bool)
        for columns in self._of("inspect"):
            full[columns["rows"] - self.first_row] = True
        return full

    def inspection(self, column: str) -> np.ndarray:
        """tokens, leak or signature of every record; zeros where it was not inspected."""
        found = list(self._of("inspect"))
        if not found:
            return np.zeros(len(self))
        full = np.zeros((len(self), *found[0][column].shape[1:]), dtype=found[0][column].dtype)
        for columns in found:
            full[columns["rows"] - self.first_row] = columns[column]
        return full

    def _of(self, task: str) -> Iterator[Arrays]:
        return (columns for done, columns in self.later if done == task)


def views(work: WorkFolder, shards: int, repeated: Arrays) -> Iterator[View]:
    """Every part of every shard with what complete rounds found; `repeated` by f"{shard}-{part}"."""
    rounds = work.rounds(shards)
    for shard in range(shards):
        part = 0
        while (measured := work.columns(MEASURE, shard, part)) is not None:
            found = [(task, work.columns(name, shard, part)) for name, task in rounds]
            later = [(task, columns) for task, columns in found if columns is not None]
            yield View(shard, part, measured, later, repeated.get(f"{shard}-{part}"))
            part += 1
