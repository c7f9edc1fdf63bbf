"""Documents to tokenize, out of the records of a file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from harness.text import Problem, SourceFile, Unusable, place_of, read_records, text_of

from .config import CorpusSection


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


def read_documents(
    file: SourceFile, corpus: CorpusSection, advance: Callable[[int], None]
) -> Iterator[Document | Problem]:
    """The documents of a file in order, empty ones included, with a Problem for each record that has none.

    `advance` is told how many bytes were taken from disk. Reading goes on after a Problem where the format allows it:
    after a bad jsonl line or parquet row, not after a damaged archive.
    """
    for record in read_records(file, corpus, advance):
        if isinstance(record, Problem):
            yield record
            continue
        text = text_of(record.content, corpus)
        if isinstance(text, Unusable):
            yield Problem(file.path, place_of(file, record.number), text.reason)
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
