"""Records out of text, jsonl and parquet files; what cannot be read becomes a Problem with its place.

Reading is one thing and finding a record's text another, so that the second can be done in other processes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config import HarnessError

from .files import SourceFile
from .source import TextSource
from .streams import STREAM_ERRORS, open_stream

PARQUET_ROWS = 512
"""Rows that are read at once: so few, because one that is damaged takes the others with it."""

Content = bytes | str | dict[str, Any]
"""A line of jsonl, the text of a text file or of a part of one, a row of parquet."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a file, as it lies there."""

    number: int
    """From 1: the line, the row, the part of a text file. What cannot be read has a number too."""
    index: int
    """From 0: its place among the file's records."""
    content: Content


@dataclass(frozen=True)
class Problem:
    """A record, or the rest of a file, that cannot be read."""

    file: Path
    place: str
    """`line 12`, `row 3`, or nothing where it is the file as a whole."""
    reason: str

    def __str__(self) -> str:
        return ": ".join(part for part in (str(self.file), self.place, self.reason) if part)


@dataclass(frozen=True)
class Unusable:
    """Why a record has no text."""

    reason: str


def read_records(
    file: SourceFile,
    source: TextSource,
    advance: Callable[[int], None] = lambda count: None,
    *,
    columns: Sequence[str] = (),
    wanted: Sequence[bool] | None = None,
) -> Iterator[Record | Problem]:
    """The records of a file in order, with a Problem where one, or what follows, cannot be read.

    `advance` is told how many bytes were taken from disk. `columns` are read of parquet beside the text's own, where a
    file has them. `wanted`
    says of records by their index which to give; reading ends with the last of them.
    """
    if file.format == "text":
        records = _read_text(file, source, advance)
    elif file.format == "jsonl":
        return _read_jsonl(file, advance, wanted)
    else:
        records = _read_parquet(file, source, advance, columns)
    return records if wanted is None else _only(records, wanted)


def _only(records: Iterator[Record | Problem], wanted: Sequence[bool]) -> Iterator[Record | Problem]:
    left = sum(wanted)
    for record in records:
        if not left:
            return
        if isinstance(record, Problem):
            yield record
        elif record.index < len(wanted) and wanted[record.index]:
            yield record
            left -= 1


def text_of(content: Content, source: TextSource) -> str | Unusable:
    """The text of a record that `source` was read for."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        return _joined(content, source)
    fields = fields_of_line(content, source)
    return fields if isinstance(fields, Unusable) else _joined(fields, source)


def fields_of_line(line: bytes, source: TextSource) -> dict[str, Any] | Unusable:
    """The object in a line of jsonl that `source` was read for."""
    try:
        fields = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Unusable(_undecodable(line, error))
    except json.JSONDecodeError as error:
        return Unusable(f"not valid JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:
        return Unusable(f"not valid JSON ({error})")
    if not isinstance(fields, dict):
        wanted = " and ".join(map(repr, source.text_fields))
        return Unusable(f"expected a JSON object with the key {wanted}, found {_kind(fields)}")
    return fields


def place_of(file: SourceFile, number: int) -> str:
    """Where a record stands, for messages."""
    return {"jsonl": f"line {number}", "parquet": f"row {number}"}.get(file.format, f"part {number}")


def import_parquet() -> Any:
    """pyarrow.parquet; HarnessError where it is not installed."""
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise HarnessError("reading .parquet needs pyarrow: pip install harness[parquet]") from None
    return pyarrow.parquet


def _joined(fields: dict[str, Any], source: TextSource) -> str | Unusable:
    texts = []
    for name in source.text_fields:
        if name not in fields:
            names = ", ".join(map(repr, list(fields)[:10])) or "none"
            return Unusable(f"has no key {name!r} (text_field); its keys are {names}")
        if not isinstance(fields[name], str):
            return Unusable(f"{name!r} should be text, found {_kind(fields[name])}")
        texts.append(fields[name])
    text: str = source.joined_by.join(texts)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"\\u{ord(text[error.start]):04x}"
        return Unusable(f"the text holds half a surrogate pair, {found}, which is no character")
    return text


def _read_text(file: SourceFile, source: TextSource, advance: Callable[[int], None]) -> Iterator[Record | Problem]:
    try:
        with open_stream(file, advance) as stream:
            data = stream.read()
    except STREAM_ERRORS as error:
        yield Problem(file.path, "", _stream_reason(file, error))
        return
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        yield Problem(file.path, f"line {line}", _undecodable(data, error))
        return
    if source.separator is None:
        yield Record(1, 0, text)
    else:
        parts = (part for part in text.split(source.separator) if part)
        yield from (Record(index + 1, index, part) for index, part in enumerate(parts))


def _read_jsonl(
    file: SourceFile, advance: Callable[[int], None], wanted: Sequence[bool] | None
) -> Iterator[Record | Problem]:
    number, index = 0, -1
    end = None if wanted is None else max((place for place, want in enumerate(wanted) if want), default=-1)
    try:
        with open_stream(file, advance) as stream:
            for number, line in enumerate(stream, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.isspace() or not line:
                    continue
                index += 1
                if wanted is None or end is None:
                    yield Record(number, index, line)
                elif index > end:
                    return
                elif wanted[index]:
                    yield Record(number, index, line)
    except STREAM_ERRORS as error:
        yield Problem(file.path, f"line {number + 1}", _stream_reason(file, error))
        return
    if number == 0:
        yield Problem(file.path, "", "is empty: expected a JSON object a line")


def _read_parquet(
    file: SourceFile, source: TextSource, advance: Callable[[int], None], columns: Sequence[str]
) -> Iterator[Record | Problem]:
    parquet = import_parquet()
    import pyarrow

    row, index = 0, -1
    try:
        with parquet.ParquetFile(file.path) as table:
            wrong = _wrong_columns(table, source)
            if wrong is not None:
                yield Problem(file.path, "", wrong)
                return
            extra = [name for name in columns if name in table.schema_arrow.names]
            names = list(dict.fromkeys([*source.text_fields, *extra]))
            for batch in table.iter_batches(PARQUET_ROWS, columns=names):
                held = [batch.column(name) for name in names]  # `columns` may come in the file's own order
                for offset in range(len(batch)):
                    row += 1
                    fields = _fields_of_row(file, row, names, [column[offset] for column in held])
                    index += not isinstance(fields, Problem)
                    yield fields if isinstance(fields, Problem) else Record(row, index, fields)
                rows = table.metadata.num_rows
                advance(file.size * row // rows - file.size * (row - len(batch)) // rows)
    except (pyarrow.ArrowException, OSError) as error:
        place = f"row {row + 1}" if row else ""
        yield Problem(file.path, place, f"cannot be read as parquet ({' '.join(str(error).split())[:200]})")


def _wrong_columns(table: Any, source: TextSource) -> str | None:
    kinds = {field.name: str(field.type) for field in table.schema_arrow}
    for name in source.text_fields:
        if name not in kinds:
            found = ", ".join(map(repr, list(kinds)[:10])) or "none"
            return f"has no column {name!r} (text_field); its columns are {found}"
        if kinds[name] not in ("string", "large_string", "string_view"):
            return f"column {name!r} should hold text, it holds {kinds[name]}"
    return "is empty: it has no rows" if table.metadata.num_rows == 0 else None


def _fields_of_row(file: SourceFile, number: int, names: list[str], values: list[Any]) -> dict[str, Any] | Problem:
    fields = {}
    for name, value in zip(names, values, strict=True):
        try:
            fields[name] = value.as_py()
        except UnicodeDecodeError as error:
            return Problem(file.path, f"row {number}", f"{name!r} is not UTF-8 ({error.reason} at byte {error.start})")
    return fields


def _stream_reason(file: SourceFile, error: Exception) -> str:
    """Why reading stopped: a truncated or corrupt archive, or the system's own reason."""
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    if file.compression == "none":
        return f"cannot be read ({error})"
    what = "is truncated" if isinstance(error, EOFError) else "is corrupt"
    return f"the {file.compression} stream {what} here, what follows is lost ({' '.join(str(error).split())})"


def _undecodable(data: bytes, error: UnicodeDecodeError) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "is UTF-16, not UTF-8; convert it"
    return f"not UTF-8: byte 0x{data[error.start]:02x} ({error.reason})"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
