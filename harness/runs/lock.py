"""One writer a run folder."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from pathlib import Path

from .errors import RunError

logger = logging.getLogger(__name__)

_held: set[Path] = set()
"""What this process holds: POSIX locks only tell processes apart, and closing a second descriptor would drop them."""


class FolderLock:
    """A lock on `folder` that the operating system releases when this process ends, however it ends.

    It belongs to the process, not to its children, so a data worker that outlives a killed trainer doesn't hold it.
    Raises RunError where another process, or this one, holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        path = folder / ".lock"
        if self._folder in _held:
            raise RunError(f"{folder}: this process is already writing into this run; close it first")
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = path.read_text(errors="replace").strip() or "unknown"
            if error.errno in (errno.EACCES, errno.EAGAIN):
                os.close(self._descriptor)
                raise RunError(
                    f"{folder}: another process is writing into this run ({holder}); "
                    "wait for it to end, or choose another run.name"
                ) from None
            logger.warning("%s: this file system has no locks (%s): start no second run in this folder", folder, error)
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        _held.add(self._folder)

    def release(self) -> None:
        if self._folder in _held:
            _held.remove(self._folder)
            os.close(self._descriptor)
