"""A target folder that appears whole or not at all."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness import stop
from harness.checkpoint import make_folders, remove
from harness.config import HarnessError
from harness.disk import sync


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write into; renamed to it at the end, removed where an error comes.

    What a kill leaves is a hidden folder, `.tmp-` and the target's name, which the next conversion to it removes.
    Raises HarnessError where the target is there already, or is being written by another process.
    """
    target = Path(os.path.abspath(target))
    check_free(target)
    if target == Path.cwd():
        raise HarnessError(f"{target}: is the folder that this runs in, and a new one takes its place; name another")
    make_folders(target.parent)
    temporary = target.parent / f".tmp-{target.name}"
    temporary.mkdir(exist_ok=True)
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until this process ends, however it ends
        except BlockingIOError:
            raise HarnessError(f"{target}: another conversion is writing it; wait for it to end") from None
        for leftover in temporary.iterdir():
            remove(leftover)
        try:
            yield temporary
            _sync_all(temporary)
            check_free(target)
            if (signal := stop.requested()) is not None:  # one that came where nothing could be raised
                raise stop.StopRequested(signal)
            if target.exists():
                target.rmdir()  # empty, as check_free has seen
            temporary.rename(target)
            sync(target.parent)
        except BaseException:
            remove(temporary)
            raise
    finally:
        os.close(descriptor)


def check_free(target: Path) -> None:
    """Raises HarnessError where something is there already, but for an empty folder."""
    if "\0" in str(target):
        raise HarnessError(f"{str(target)!a}: cannot be a file's name")
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise HarnessError(f"{target}: is there already; choose another name, or move it away")


def _sync_all(folder: Path) -> None:
    for place, _, files in os.walk(folder):
        for name in files:
            sync(Path(place) / name)
        sync(Path(place))
