"""Files that are whole or not there, and locks that a kill releases."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.disk import write_whole


def write_json(path: Path, value: Any) -> None:
    """`value` as JSON, whole; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(value, allow_nan=False) + "\n").encode())


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock at `path`; waits for whoever holds it. A process that dies lets go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether the lock at `path` could be had at once; held within the block if so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
