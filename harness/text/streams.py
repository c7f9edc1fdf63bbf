"""Bytes out of plain, gzip and zstd files, with truncation noticed."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from .files import SourceFile

STREAM_ERRORS = (OSError, EOFError, zlib.error)
"""What reading a damaged or unreadable file raises here."""

CHUNK_BYTES = 1 << 17


@contextmanager
def open_stream(file: SourceFile, advance: Callable[[int], None]) -> Iterator[BinaryIO]:
    """The uncompressed bytes of `file`; `advance` is told how many bytes were taken from disk.

    Raises one of STREAM_ERRORS, on opening or while reading, where the file is damaged.
    """
    with _CountedFile(file.path, advance) as raw:
        if file.compression == "gzip":
            yield cast(BinaryIO, gzip.GzipFile(fileobj=io.BufferedReader(raw, CHUNK_BYTES), mode="rb"))
        elif file.compression == "zstd":
            yield io.BufferedReader(_ZstdFile(io.BufferedReader(raw, CHUNK_BYTES)), CHUNK_BYTES)
        else:
            yield io.BufferedReader(raw, CHUNK_BYTES)


class _CountedFile(io.FileIO):
    """A file that tells how far it was read."""

    def __init__(self, path: Path, advance: Callable[[int], None]) -> None:
        super().__init__(path)
        self._advance = advance

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer) or 0
        self._advance(count)
        return count

    def readall(self) -> bytes:
        data = super().readall() or b""
        self._advance(len(data))
        return data


class _ZstdFile(io.RawIOBase):
    """The frames of a zstd file, one after the other.

    zstandard's own stream reader ends quietly where a file is cut off, so frames are counted here.
    """

    def __init__(self, packed: io.BufferedReader) -> None:
        import zstandard

        self._error: type[Exception] = zstandard.ZstdError
        self._make: Callable[[], Any] = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._source = packed
        self._frame: Any = None
        self._packed = b""
        self._held = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._held:
            if not self._packed:
                self._packed = self._source.read1(CHUNK_BYTES)
                if not self._packed:
                    if self._frame is not None:
                        raise EOFError("zstd file ends in the middle of a frame")
                    return 0
            self._unpack()
        count = min(len(buffer), len(self._held))
        buffer[:count] = self._held[:count]
        self._held = self._held[count:]
        return count

    def _unpack(self) -> None:
        """Turn the packed bytes at hand into held ones, up to the end of a frame."""
        if self._frame is None:
            self._frame = self._make()
        try:
            self._held = memoryview(self._frame.decompress(self._packed))
        except self._error as error:
            raise OSError(str(error)) from None
        self._packed = b""
        if self._frame.eof:
            self._packed = self._frame.unused_data
            self._frame = None
