"""Records that a round has read, kept for those after it: they want few of the pool's, and mostly the same again.

A file has the records of one part that a round was about, in blocks of a batch each: the size and the CRC-32 of a
zstandard frame, then the frame; in that the number of records, of each its row, file, number and size (int64), and what
they hold. All of it only saves time: what is missing or damaged is read from the pool.
"""

from __future__ import annotations

import heapq
import json
import logging
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np

from harness.text import Content, SourceFile

from .pool import Batch, Pool, PoolRecord, Shard
from .work import WRITING, KeptFile, WorkFolder, temporary_name

logger = logging.getLogger("harness.selection")

KEPT_SHARE = 0.25
"""Of a shard's records at most so many are kept: a round that is about more gains little by it."""
SMALL_SHARD_BYTES = 1 << 20
"""On disk; what is smaller is read from the pool as fast."""
LEVEL = 1
"""zstandard's; 300 MB a second."""
HEAD = struct.Struct("<QI")
WIDTH = np.dtype("<i8").itemsize


class DamagedError(Exception):
    """A file has not, or no longer, what was kept there."""

    def __init__(self, file: KeptFile, reason: str) -> None:
        super().__init__(f"{file.path}: is damaged ({reason}); the pool is read instead")
        self.path = file.path


class KeptRecords:
    """What rounds have kept of a shard."""

    def __init__(self, pool: Pool, work: WorkFolder, shard: Shard) -> None:
        self._pool = pool
        self._shard = shard
        self._files = work.kept(shard.number)

    def cover(self, wanted: np.ndarray) -> bool:
        """Whether all rows `wanted` (bool [records]) are among them."""
        left = wanted.copy()
        for file in self._files:
            left[file.place] &= ~file.rows
        return not left.any()

    def should_grow(self, wanted: np.ndarray) -> bool:
        """Whether what is now read from the pool, because they do not cover it, should be kept as well."""
        count = int(wanted.sum()) + sum(int(file.rows.sum()) for file in self._files)
        return (
            not self.cover(wanted)
            and self._shard.bytes_on_disk >= SMALL_SHARD_BYTES
            and count <= KEPT_SHARE * len(wanted)
        )

    def read(self, wanted: np.ndarray, *, advance: Callable[[int], None] = lambda count: None) -> Iterator[PoolRecord]:
        """The rows `wanted`, in order: those kept where they cover them all, else the pool's, which are the same."""
        last = -1
        if self.cover(wanted):
            try:
                for record in self._merged(wanted):
                    yield record
                    last = record.row
                advance(self._shard.bytes_on_disk)
                return
            except DamagedError as damage:
                logger.warning("%s", damage)
                damage.path.unlink(missing_ok=True)
        left = wanted.copy()
        left[: last + 1] = False
        yield from self._pool.records(self._shard, left, advance=advance)

    def _merged(self, wanted: np.ndarray) -> Iterator[PoolRecord]:
        last = -1
        for _, files in groupby(self._files, key=lambda file: file.part):
            streams = [self._stream(file, wanted) for file in files]
            for record in heapq.merge(*streams, key=lambda record: record.row):
                if record.row != last:  # else another round has kept it too
                    yield record
                    last = record.row

    def _stream(self, file: KeptFile, wanted: np.ndarray) -> Iterator[PoolRecord]:
        """Those of one file, once it is known of each block that it has what it should."""
        mine = np.flatnonzero(file.rows & wanted[file.place]) + file.place.start
        for table, contents in _blocks(file) if len(mine) else ():
            asked = np.isin(table[:, 0], mine)
            if not np.array_equal(table[asked, 0], mine[: asked.sum()]):
                raise DamagedError(file, "other records than were kept")
            mine = mine[asked.sum() :]
            for index in np.flatnonzero(asked).tolist():
                row, place, number, _ = table[index].tolist()
                content = _unpacked(contents[index], self._shard.format)
                yield PoolRecord(row, self._shard.files[place], number, content)
            if not len(mine):
                return
        if len(mine):
            raise DamagedError(file, "ends early")


def keep(batches: Iterable[Batch], shard: Shard, work: WorkFolder, name: str) -> Iterator[Batch]:
    """Hands on the batches of a round, and keeps their records part by part. A disk that is full stops only that."""
    places = {file: place for place, file in enumerate(shard.files)}
    for part, of_part in groupby(batches, key=lambda batch: batch.part):
        with _NewFile(work.kept_file(name, shard.number, part)) as file:
            for batch in of_part:
                file.write(_block(batch, places))
                yield batch


class _NewFile:
    """A file that takes its name once it is whole. It is not flushed to the disk: what a power cut leaves is checked
    when it is read. Where it cannot be written there is none, and a warning."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(temporary_name())
        self._stream: BinaryIO | None = None

    def __enter__(self) -> _NewFile:
        with self._giving_up():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            for left in self._path.parent.glob(f"{WRITING}*"):  # by a process that was killed
                left.unlink(missing_ok=True)
            self._stream = self._temporary.open("wb")
        return self

    def write(self, data: bytes) -> None:
        if self._stream is not None:
            with self._giving_up():
                self._stream.write(data)

    def __exit__(self, kind: type[BaseException] | None, *others: object) -> None:
        if self._stream is not None:
            with self._giving_up():
                self._stream.close()
                if kind is None:
                    self._temporary.rename(self._path)
                else:
                    self._temporary.unlink(missing_ok=True)

    @contextmanager
    def _giving_up(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            logger.warning("%s: is not kept (%s); later rounds read the pool", self._path, error.strerror or error)
            if self._stream is not None:
                with suppress(OSError):  # what is left in its buffer does not fit either
                    self._stream.close()
                self._stream = None
                self._temporary.unlink(missing_ok=True)


def _block(batch: Batch, places: dict[SourceFile, int]) -> bytes:
    import zstandard

    contents = [_packed(record.content) for record in batch.records]
    table = [
        (record.row, places[record.file], record.number, len(content))
        for record, content in zip(batch.records, contents, strict=True)
    ]
    numbers = np.array([len(table), *chain.from_iterable(table)], dtype="<i8")
    frame = zstandard.ZstdCompressor(level=LEVEL).compress(b"".join([numbers.tobytes(), *contents]))
    return HEAD.pack(len(frame), zlib.crc32(frame)) + frame


def _blocks(file: KeptFile) -> Iterator[tuple[np.ndarray, list[bytes]]]:
    """Of each block what `_block` was given: int64 [records, 4] (row, file, number, size), and the records."""
    import zstandard

    try:
        with file.path.open("rb") as stream:
            total = os.fstat(stream.fileno()).st_size
            while head := stream.read(HEAD.size):
                size, checksum = HEAD.unpack(head)
                frame = stream.read(min(size, total))
                if len(frame) != size or zlib.crc32(frame) != checksum:
                    raise DamagedError(file, "a checksum differs")
                data = zstandard.ZstdDecompressor().decompress(frame)
                count = int.from_bytes(data[:WIDTH], "little")
                table = np.frombuffer(data, "<i8", 4 * count, WIDTH).reshape(count, 4)
                ends = (WIDTH + table.nbytes + np.cumsum(table[:, 3])).tolist()
                yield table, [data[end - size : end] for end, size in zip(ends, table[:, 3].tolist(), strict=True)]
    except (OSError, struct.error) as error:
        raise DamagedError(file, str(error)) from None


def _packed(content: Content) -> bytes:
    """A line of jsonl as it is, text in UTF-8, a row of parquet as JSON with all that is no text, or null, as it is
    shown."""
    if isinstance(content, dict):
        shown = {
            key: value if value is None or isinstance(value, str) else str(value) for key, value in content.items()
        }
        content = json.dumps(shown)
    return content.encode() if isinstance(content, str) else content


def _unpacked(data: bytes, kind: str) -> Content:
    if kind == "jsonl":
        return data
    text = data.decode()
    fields: Content = json.loads(text) if kind == "parquet" else text
    return fields
