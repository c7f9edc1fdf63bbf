"""Documents out of text, jsonl and parquet files; what cannot be read becomes a Problem with its place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config import HarnessError

from .config import CorpusSection
from .sources import SourceFile
from .streams import STREAM_ERRORS, open_stream

PARQUET_ROWS = 512


@dataclass(frozen=True)
class Document:
    """One document. `size` is its length in UTF-8 bytes, `digest` a hash of them."""

    text: str
    size: int
    digest: bytes

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing but white space to train on."""
        return not self.text or self.text.isspace()


@dataclass(frozen=True)
class _Bad:
    """A record without a text, before its place is known."""

    reason: str


@dataclass(frozen=True)
class Problem:
    """A record, or the rest of a file, that cannot be read."""

    file: Path
    place: str
    """`line 12`, `row 3`, or nothing where it is the file as a whole."""
    reason: str

    def __str__(self) -> str:
        return ": ".join(part for part in (str(self.file), self.place, self.reason) if part)


def read_documents(
    file: SourceFile, corpus: CorpusSection, advance: Callable[[int], None]
) -> Iterator[Document | Problem]:
    """The documents of a file in order, empty ones included, with a Problem for each record that has none.

    `advance` is told how many bytes were taken from disk. Reading goes on after a Problem where the format allows it:
    after a bad jsonl line or parquet row, not after a damaged archive.
    """
    read = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}[file.format]
    for text in read(file, corpus, advance):
        if isinstance(text, Problem):
            yield text
        elif corpus.max_document_bytes is None or len(text) * 4 <= corpus.max_document_bytes:
            yield _document(text)
        else:
            yield from map(_document, _cut(text, corpus.max_document_bytes))


def _document(text: str) -> Document:
    data = text.encode()
    return Document(text, len(data), hashlib.blake2b(data, digest_size=16).digest())


def _cut(text: str, max_bytes: int) -> Iterator[str]:
    """Parts of at most `max_bytes`, cut after a line's end where there is one, otherwise between characters."""
    data = text.encode()
    start = 0
    while len(data) - start > max_bytes:
        end = data.rfind(b"\n", start, start + max_bytes) + 1
        if end == 0:
            end = start + max_bytes
            while data[end] & 0xC0 == 0x80:  # inside a character
                end -= 1
        yield data[start:end].decode()
        start = end
    yield data[start:].decode()


def _read_text(file: SourceFile, corpus: CorpusSection, advance: Callable[[int], None]) -> Iterator[str | Problem]:
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
    if corpus.separator is None:
        yield text
    else:
        yield from (part for part in text.split(corpus.separator) if part)


def _read_jsonl(file: SourceFile, corpus: CorpusSection, advance: Callable[[int], None]) -> Iterator[str | Problem]:
    number = 0
    try:
        with open_stream(file, advance) as stream:
            for number, line in enumerate(stream, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    text = _text_of_line(line, corpus.text_field)
                    yield text if isinstance(text, str) else Problem(file.path, f"line {number}", text.reason)
    except STREAM_ERRORS as error:
        yield Problem(file.path, f"line {number + 1}", _stream_reason(file, error))
        return
    if number == 0:
        yield Problem(file.path, "", "is empty: expected a JSON object a line")


def _text_of_line(line: bytes, field: str) -> str | _Bad:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return _Bad(_undecodable(line, error))
    except json.JSONDecodeError as error:
        return _Bad(f"not valid JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:
        return _Bad(f"not valid JSON ({error})")
    if not isinstance(record, dict):
        return _Bad(f"expected a JSON object with the key {field!r}, found {_kind(record)}")
    if field not in record:
        return _Bad(
            f"has no key {field!r} (text_field); its keys are {', '.join(map(repr, list(record)[:10])) or 'none'}"
        )
    text = record[field]
    if not isinstance(text, str):
        return _Bad(f"{field!r} should be text, found {_kind(text)}")
    return _encodable(text)


def _encodable(text: str) -> str | _Bad:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return _Bad(f"the text holds half a surrogate pair, \\u{ord(text[error.start]):04x}, which is no character")
    return text


def _read_parquet(file: SourceFile, corpus: CorpusSection, advance: Callable[[int], None]) -> Iterator[str | Problem]:
    parquet = import_parquet()
    import pyarrow

    row = 0
    try:
        with parquet.ParquetFile(file.path) as table:
            kind = {field.name: str(field.type) for field in table.schema_arrow}
            if corpus.text_field not in kind:
                names = ", ".join(map(repr, list(kind)[:10])) or "none"
                yield Problem(
                    file.path, "", f"has no column {corpus.text_field!r} (text_field); its columns are {names}"
                )
            elif kind[corpus.text_field] not in ("string", "large_string", "string_view"):
                found = kind[corpus.text_field]
                yield Problem(file.path, "", f"column {corpus.text_field!r} should hold text, it holds {found}")
            elif table.metadata.num_rows == 0:
                yield Problem(file.path, "", "is empty: it has no rows")
            else:
                for batch in table.iter_batches(PARQUET_ROWS, columns=[corpus.text_field]):
                    for value in batch.column(0):
                        row += 1
                        yield _text_of_row(file.path, row, corpus.text_field, value)
                    rows = table.metadata.num_rows
                    advance(file.size * row // rows - file.size * (row - len(batch)) // rows)
    except (pyarrow.ArrowException, OSError) as error:
        place = f"row {row + 1}" if row else ""
        yield Problem(file.path, place, f"cannot be read as parquet ({' '.join(str(error).split())[:200]})")


def _text_of_row(file: Path, row: int, field: str, value: Any) -> str | Problem:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        return Problem(file, f"row {row}", f"{field!r} is not UTF-8 ({error.reason} at byte {error.start})")
    return text if isinstance(text, str) else Problem(file, f"row {row}", f"{field!r} should be text, found null")


def import_parquet() -> Any:
    """pyarrow.parquet; HarnessError where it is not installed."""
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise HarnessError("reading .parquet needs pyarrow: pip install harness[parquet]") from None
    return pyarrow.parquet


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
