"""The chosen documents, and on request the others, in the formats that they came in, with their scores."""

from __future__ import annotations

import gzip
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from harness.config import HarnessError
from harness.disk import sync
from harness.text import PARQUET_ROWS, SourceFile, Unusable, fields_of_line, import_parquet

from .config import OutputSection
from .pool import Pool, PoolRecord, Shard
from .work import temporary_name


@dataclass(frozen=True)
class Decision:
    """What is written of a shard: each array has a row a record."""

    written: np.ndarray
    """bool."""
    scores: np.ndarray
    """float64; NaN is written as null."""
    targets: np.ndarray | None
    """str: the targets that a document was chosen for; None where there is one set, and no such field."""


def write_shard(
    pool: Pool, shard: Shard, records: Iterable[PoolRecord], decision: Decision, folder: Path, output: OutputSection
) -> list[dict[str, Any]]:
    """Write one shard's documents, whose `records` are given, below `folder`; each file's name, documents and bytes. No
    file without documents.

    HarnessError where a document has the score's field already.
    """
    write = {"jsonl": _write_jsonl, "parquet": _write_parquet, "text": _write_text}[shard.format]
    if not decision.written.any():
        return []
    return write(pool, shard, records, decision, folder, output)


def _extra(decision: Decision, output: OutputSection, row: int) -> dict[str, Any]:
    score = float(decision.scores[row])
    fields: dict[str, Any] = {output.score_field: None if math.isnan(score) else score}
    if decision.targets is not None:
        fields[output.target_field] = str(decision.targets[row]) or None
    return fields


def _write_jsonl(
    pool: Pool, shard: Shard, records: Iterable[PoolRecord], decision: Decision, folder: Path, output: OutputSection
) -> list[dict[str, Any]]:
    written = []
    for file, of_file in groupby(records, key=lambda record: record.file):
        count = 0
        path = folder / pool.name(file)
        with writing(path, file.compression) as stream:
            for record in of_file:
                # The line stays as it is, to the last digit and space, and grows by what is added.
                assert isinstance(record.content, bytes)
                line = record.content.rstrip()
                fields = _extra(decision, output, record.row)
                _refuse_taken(fields, line, pool, record, output)
                stream.write(line[:-1].rstrip() + b", " + json.dumps(fields, ensure_ascii=False)[1:].encode() + b"\n")
                count += 1
        written.append(_described(folder, path, count))
    return written


def _refuse_taken(fields: dict[str, Any], line: bytes, pool: Pool, record: PoolRecord, output: OutputSection) -> None:
    """HarnessError where a document has one of the keys that are to be added."""
    taken = fields_of_line(line, pool.section)
    if isinstance(taken, Unusable):
        raise HarnessError(f"{record.file.path}: line {record.number}: was scored, and now {taken.reason}")
    for name in fields:
        if name in taken:
            raise HarnessError(
                f"{record.file.path}: line {record.number}: has a key {name!r} already; choose another "
                f"output.{'score_field' if name == output.score_field else 'target_field'}"
            )


def _write_parquet(
    pool: Pool, shard: Shard, records: Iterable[PoolRecord], decision: Decision, folder: Path, output: OutputSection
) -> list[dict[str, Any]]:
    return [
        _write_table(pool, file, {record.number - 1: record.row for record in of_file}, decision, folder, output)
        for file, of_file in groupby(records, key=lambda record: record.file)
    ]


def _write_table(
    pool: Pool, file: SourceFile, places: dict[int, int], decision: Decision, folder: Path, output: OutputSection
) -> dict[str, Any]:
    """`places`: rows of the file that are written, and which of the shard they are."""
    parquet = import_parquet()
    import pyarrow

    path = folder / pool.name(file)
    with writing(path, "none") as stream, parquet.ParquetFile(file.path) as table:
        schema = table.schema_arrow
        for name in _extra(decision, output, 0):
            if name in schema.names:
                raise HarnessError(f"{file.path}: has a column {name!r} already; choose another output.score_field")
            kind = pyarrow.float64() if name == output.score_field else pyarrow.string()
            schema = schema.append(pyarrow.field(name, kind))
        with parquet.ParquetWriter(stream, schema) as writer:
            first, last = 0, max(places)
            for batch in _batches(table, file):
                mine = [index for index in range(len(batch)) if first + index in places]
                if mine:
                    kept = pyarrow.Table.from_batches([batch]).take(pyarrow.array(mine, pyarrow.int64()))
                    rows = [_extra(decision, output, places[first + index]) for index in mine]
                    for name in rows[0]:
                        values = pyarrow.array([row[name] for row in rows], schema.field(name).type)
                        kept = kept.append_column(schema.field(name), values)
                    writer.write_table(kept)
                first += len(batch)
                if first > last:  # what follows may be damaged
                    break
    return _described(folder, path, len(places))


def _batches(table: Any, file: SourceFile) -> Iterator[Any]:
    """Rows with all their columns, as many at once as when they were scored: what follows in the file may be damaged.
    HarnessError where a column cannot be read."""
    import pyarrow

    try:
        yield from table.iter_batches(PARQUET_ROWS)
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())[:200]
        raise HarnessError(f"{file.path}: a column of the chosen rows cannot be read ({reason})") from None


def _write_text(
    pool: Pool, shard: Shard, records: Iterable[PoolRecord], decision: Decision, folder: Path, output: OutputSection
) -> list[dict[str, Any]]:
    """Each file with its chosen parts, and scores-00000.jsonl with a line a document."""
    separator = pool.section.separator or ""
    held: dict[str, tuple[SourceFile, list[str]]] = {}
    lines = []
    for record in records:
        assert isinstance(record.content, str)
        name = pool.name(record.file)
        held.setdefault(name, (record.file, []))[1].append(record.content)
        place = {} if pool.section.separator is None else {"part": record.number}
        lines.append({"file": name, **place, **_extra(decision, output, record.row)})
    written = []
    for name, (file, parts) in held.items():
        with writing(folder / name, file.compression) as stream:
            stream.write(separator.join(parts).encode())
        written.append(_described(folder, folder / name, len(parts)))
    with writing(folder / f"scores-{shard.number:05d}.jsonl", "none") as stream:
        for line in lines:
            # As in work.write_json: the name of a file may be no UTF-8.
            stream.write(json.dumps(line, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
    return written


def _described(folder: Path, path: Path, documents: int) -> dict[str, Any]:
    return {"file": path.relative_to(folder).as_posix(), "documents": documents, "bytes": path.stat().st_size}


@contextmanager
def writing(path: Path, compression: str) -> Iterator[BinaryIO]:
    """A file to write that takes its name when it is whole and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(temporary_name())
    try:
        with temporary.open("wb") as raw:
            if compression == "gzip":
                with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed:  # no name and time: the same each time
                    yield cast(BinaryIO, packed)
            elif compression == "zstd":
                import zstandard

                with zstandard.ZstdCompressor().stream_writer(raw, closefd=False) as packed:
                    yield cast(BinaryIO, packed)
            else:
                yield raw
        sync(temporary)
        os.rename(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise HarnessError(f"{path}: cannot be written: {error.strerror or error}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
