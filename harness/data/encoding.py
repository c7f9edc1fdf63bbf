"""Texts to token ids, in worker processes where there is enough to do; results come in the order of the input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.text import map_in_processes

from .documents import Document
from .tokenizer import Tokenizer, load_tokenizer

BATCH_BYTES = 1 << 20
PIECE_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class EncodedBatch:
    """Token ids of several documents, one after the other, each with its end-of-text token.

    ids: int32 [sum of lengths]; lengths: int64 [documents]; sizes: int64 [documents], the bytes that a document's
    tokens stand for.
    """

    ids: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray


def encode_all(
    batches: Iterator[list[Document]], tokenizer: Tokenizer, folder: Path, workers: int
) -> Iterator[tuple[list[Document], EncodedBatch]]:
    """Each batch with its tokens, in order. `folder` is where `tokenizer` is saved, for the worker processes."""
    if workers == 1:
        for batch in batches:
            yield batch, encode_texts(tokenizer, [document.text for document in batch])
    else:
        work = ((batch, [document.text for document in batch]) for batch in batches)
        yield from map_in_processes(
            work, _encode_in_worker, workers, _start_worker, (str(folder),), setting="data.workers"
        )


def batch_documents(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in groups of about BATCH_BYTES."""
    held: list[Document] = []
    size = 0
    for document in documents:
        held.append(document)
        size += document.size
        if size >= BATCH_BYTES:
            yield held
            held, size = [], 0
    if held:
        yield held


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> EncodedBatch:
    """Token ids of `texts`, each followed by end-of-text."""
    table = tokenizer.token_bytes()
    encoded = [_encode_long(tokenizer, text) if len(text) > PIECE_CHARACTERS else None for text in texts]
    short = iter(tokenizer.encode_batch([text for text, done in zip(texts, encoded, strict=True) if done is None]))
    arrays = []
    for done in encoded:
        ids = np.array(next(short) if done is None else done, dtype=np.int32)
        arrays.append(np.append(ids, np.int32(tokenizer.eod)))
    return EncodedBatch(
        ids=np.concatenate(arrays),
        lengths=np.array([len(ids) for ids in arrays], dtype=np.int64),
        sizes=np.array([table[ids].sum(dtype=np.int64) for ids in arrays], dtype=np.int64),
    )


def _encode_long(tokenizer: Tokenizer, text: str) -> list[int]:
    """A document of many megabytes in pieces that end with a line: tokenizers take more than linear memory."""
    ids: list[int] = []
    start = 0
    while start < len(text):
        end = start + PIECE_CHARACTERS
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        ids += tokenizer.encode(text[start:end])
        start = end
    return ids


_tokenizer: Tokenizer | None = None
"""A worker process's own; set once when it starts."""


def _start_worker(folder: str) -> None:
    global _tokenizer
    _tokenizer = load_tokenizer(Path(folder))


def _encode_in_worker(texts: list[str]) -> EncodedBatch:
    assert _tokenizer is not None
    return encode_texts(_tokenizer, texts)
