"""Texts to token ids, in worker processes where there is enough to do; results come in the order of the input."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.config import HarnessError

from .readers import Document
from .tokenizer import Tokenizer, load_tokenizer

BATCH_BYTES = 1 << 20
BYTES_PER_WORKER = 32 << 20
"""Text that keeps a process busy for longer than it takes to start."""
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


def choose_workers(asked: int | None, total_bytes: int) -> int:
    """Number of processes for `total_bytes` of text; 1 means no extra process."""
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, total_bytes // BYTES_PER_WORKER))


def encode_all(
    batches: Iterator[list[Document]], tokenizer: Tokenizer, folder: Path, workers: int
) -> Iterator[tuple[list[Document], EncodedBatch]]:
    """Each batch with its tokens, in order. `folder` is where `tokenizer` is saved, for the worker processes."""
    if workers == 1:
        for batch in batches:
            yield batch, encode_texts(tokenizer, [document.text for document in batch])
        return
    waiting: deque[tuple[list[Document], Future[EncodedBatch]]] = deque()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (str(folder),))
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(_encode_in_worker, [document.text for document in batch])))
            if len(waiting) > 3 * workers:  # bounds the memory
                yield _finish(waiting)
        while waiting:
            yield _finish(waiting)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _finish(waiting: deque[tuple[list[Document], Future[EncodedBatch]]]) -> tuple[list[Document], EncodedBatch]:
    batch, future = waiting.popleft()
    try:
        return batch, future.result()
    except BrokenProcessPool:
        raise HarnessError(
            "a tokenizing process ended early (out of memory, or started from a script without "
            "`if __name__ == '__main__':`); set data.workers lower, 1 for none"
        ) from None


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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _tokenizer = load_tokenizer(Path(folder))


def _die_with_parent() -> None:
    """A killed parent closes no pool, and its workers would wait for work for ever."""
    parent: Any = multiprocessing.parent_process()
    parent.join()
    os._exit(1)


def _encode_in_worker(texts: list[str]) -> EncodedBatch:
    assert _tokenizer is not None
    return encode_texts(_tokenizer, texts)
