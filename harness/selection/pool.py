"""The pool as shards of records: what is scored and written together, and where each record stands."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.config import HarnessError
from harness.text import Content, Problem, SourceFile, TextSource, Unusable, find_files, place_of, read_records, text_of

from .config import PoolSection
from .documents import Unit
from .outputs import Outputs

FILES_A_SHARD = 2000
"""Files that are scored together, at most."""
SHARD_BYTES = 1 << 24
"""On disk: what jsonl or parquet files that are scored together have, at most; a larger one is a shard of its own. A
shard costs some fifty small files in the working folder, each flushed to the disk."""
PART_ROWS = 1 << 16
"""Rows whose results lie in one file: what a restart may have to do again."""
BATCH_BYTES = 1 << 18
"""Of records that go to a worker process at once."""


@dataclass(frozen=True)
class Shard:
    """One large jsonl or parquet file, or a number of small ones, or of text files."""

    number: int
    files: tuple[SourceFile, ...]

    @property
    def format(self) -> str:
        """text, jsonl or parquet."""
        return self.files[0].format

    @property
    def bytes_on_disk(self) -> int:
        return sum(file.size for file in self.files)


@dataclass(frozen=True, slots=True)
class PoolRecord:
    """A record and its row: its number in the shard, from 0, in the order of the files."""

    row: int
    file: SourceFile
    number: int
    """In the file, from 1: its line, row or part."""
    content: Content


@dataclass(frozen=True)
class Batch:
    """Records of one part of a shard, for one call of a worker."""

    part: int
    records: list[PoolRecord]

    @property
    def rows(self) -> np.ndarray:
        """int64 [records]."""
        return np.array([record.row for record in self.records], dtype=np.int64)


class Pool:
    """The files of a pool, in the order of their paths."""

    def __init__(self, section: PoolSection, without: Sequence[Path] = ()) -> None:
        """Without what lies in the folders `without`, the selection's own, or in another's that `source` does not ask
        for: see outputs.py. HarnessError where that is all."""
        self.section = section
        self.left_out = ""
        """What was left out and why, in a line; empty where nothing was."""
        outputs = Outputs(section, without)
        found = {_absolute(file): file for file in find_files(section)}.values()  # once, however often it is named
        others = [file for file in found if not outputs.is_own(file)]
        folders = {file.path: outputs.selection_of(file) for file in others}
        files = [file for file in others if folders[file.path] is None]
        parts = []
        if len(others) < len(found):
            parts.append(f"{len(found) - len(others):,} in this selection's own folders")
        if len(files) < len(others):
            first, *more = sorted({folder for folder in folders.values() if folder is not None})
            which = f"{first} and {len(more):,} more" if more else first
            parts.append(
                f"{len(others) - len(files):,} written by other selections ({which}; name its chosen/ to have it)"
            )
        if parts:
            self.left_out = f"{section.label}: left out of {len(found):,} files: {', '.join(parts)}"
        if not files:
            raise HarnessError(f"{self.left_out}; that is all, so choose another pool.source or output.folder")
        self.root = Path(os.path.commonpath([_absolute(file).parent for file in files]))
        """The folder that names are relative to."""
        self._names: dict[Path, str] = {}
        self.shards = [Shard(number, tuple(group)) for number, group in enumerate(_grouped(files))]

    @property
    def files(self) -> list[SourceFile]:
        return [file for shard in self.shards for file in shard.files]

    def name(self, file: SourceFile) -> str:
        """A file's path below `root`."""
        if file.path not in self._names:  # asked for every record
            self._names[file.path] = _absolute(file).relative_to(self.root).as_posix()
        return self._names[file.path]

    def id_of(self, file: SourceFile, number: int) -> str:
        """What a record is called that has no id of its own: `a/b.jsonl:12`."""
        whole = file.format == "text" and self.section.separator is None
        return self.name(file) if whole else f"{self.name(file)}:{number}"

    def group_of(self, file: SourceFile) -> str:
        """What a file's documents are counted under where there is no group_field: its first folder, or itself."""
        return self.name(file).split("/")[0]

    def records(
        self,
        shard: Shard,
        wanted: np.ndarray | None = None,
        *,
        advance: Callable[[int], None] = lambda count: None,
        note: Callable[[Problem], None] = lambda problem: None,
    ) -> Iterator[PoolRecord]:
        """The records of a shard: all, or the rows `wanted` (bool [rows]).

        `advance` is told how many bytes were taken from disk, `note` what is unreadable.
        """
        if wanted is not None and not wanted.any():
            return
        last = None if wanted is None else int(np.flatnonzero(wanted)[-1])
        extra = [name for name in (self.section.id_field, self.section.group_field) if name is not None]
        rows = None if wanted is None else wanted.tolist()
        first = 0
        for file in shard.files:
            if last is not None and first > last:
                return
            of_file = rows if len(shard.files) == 1 else None  # else where a file's rows begin shows as they are read
            count = 0
            for record in read_records(file, self.section, advance, columns=extra, wanted=of_file):
                if isinstance(record, Problem):
                    note(record)
                    continue
                count = record.index + 1
                row = first + record.index
                if rows is None or (row < len(rows) and rows[row]):
                    yield PoolRecord(row, file, record.number, record.content)
            first += count

    def unit_of(self, record: PoolRecord) -> Unit:
        """What is needed of a record to read the document in it."""
        return Unit(record.content, self.id_of(record.file, record.number), self.group_of(record.file))

    def refuse_changed(self, shard: Shard) -> None:
        """HarnessError where a file of the shard is not what it was when the selection began."""
        for file in shard.files:
            try:
                status = file.path.stat()
            except OSError as error:
                raise HarnessError(f"{self.section.label}: {file.path}: is gone ({error.strerror})") from None
            if (status.st_size, status.st_mtime_ns) != (file.size, file.modified_ns):
                raise HarnessError(
                    f"{self.section.label}: {file.path}: was changed while it was read; select again, into another "
                    "output.work"
                )


def _grouped(files: list[SourceFile]) -> list[list[SourceFile]]:
    """The files of each shard, in order: such as are read alike, text files last."""
    groups: list[list[SourceFile]] = []
    size = 0
    for file in sorted(files, key=lambda file: file.format == "text"):
        size += file.size
        if (
            not groups
            or groups[-1][0].format != file.format
            or len(groups[-1]) == FILES_A_SHARD
            or (size > SHARD_BYTES and file.format != "text")
        ):
            groups.append([])
            size = file.size
        groups[-1].append(file)
    return groups


def _absolute(file: SourceFile) -> Path:
    """Without `..`, which would lead out of the folder that is written to; links stay."""
    return Path(os.path.abspath(file.path))


def batches(records: Iterator[PoolRecord], skipped_parts: set[int]) -> Iterator[Batch]:
    """Records in batches that end where a part ends, without those of parts that are to be skipped."""
    held: list[PoolRecord] = []
    size = 0
    for record in records:
        part = record.row // PART_ROWS
        if held and (size >= BATCH_BYTES or part != held[0].row // PART_ROWS):
            yield Batch(held[0].row // PART_ROWS, held)
            held, size = [], 0
        if part not in skipped_parts:
            held.append(record)
            size += _size(record.content)
    if held:
        yield Batch(held[0].row // PART_ROWS, held)


def _size(content: Content) -> int:
    return sum(len(str(value)) for value in content.values()) if isinstance(content, dict) else len(content)


def read_texts(source: TextSource, documents: tuple[int, int] | None = None) -> list[bytes]:
    """The texts of a source in the order of its files, or those in the range [first, end) `documents`, without blank
    ones. HarnessError for any that cannot be read, for a range that ends beyond them, and for none."""
    files = find_files(source)
    texts: list[bytes] = []
    for file in files:
        for record in read_records(file, source):
            if isinstance(record, Problem):
                raise HarnessError(f"{source.label}: {record}")
            text = text_of(record.content, source)
            if isinstance(text, Unusable):
                raise HarnessError(f"{source.label}: {file.path}: {place_of(file, record.number)}: {text.reason}")
            texts.append(text.encode())
    if documents is not None:
        first, end = documents
        if end > len(texts):
            raise HarnessError(f"{source.label}: documents {[first, end]}: there are only {len(texts)} in its files")
        texts = texts[first:end]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise HarnessError(f"{source.label}: no text in {len(files)} files, the first is {files[0].path}")
    return texts
