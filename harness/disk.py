"""What every room that writes files must get right alike: that they are on the disk, and what is in them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.config import HarnessError


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The digest of a file's bytes, in hexadecimal. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, content: bytes, temporary_name: str | None = None) -> None:
    """Replace `path`: whatever happens, it holds the old content or the new, flushed to the disk.

    `temporary_name` is what it is called until then, for files that several processes may write at once.
    """
    temporary = path.with_name(temporary_name or f".tmp-{path.name}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def locked(folder: Path, work: str, advice: str) -> Iterator[None]:
    """Hold a folder for this process; the lock ends with the process, however that ends.

    HarnessError where another one holds it: `work` says what it does there, `advice` what else to do.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise HarnessError(
                f"{folder}: process {file.read().strip() or '?'} is {work} here; wait for it, or {advice}"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
