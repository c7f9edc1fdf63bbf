"""Files that are on the disk when a function returns."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from harness.disk import sync


def write_synced(path: Path, content: bytes) -> None:
    """A new file with `content`, flushed to the disk."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def make_folders(folder: Path) -> None:
    """`folder` and what is missing above it, each flushed into its parent."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    for place in reversed(missing):
        place.mkdir(exist_ok=True)
        sync(place.parent)


def remove(path: Path) -> None:
    """A folder with all that is in it; of a link the link alone. Nothing there is nothing to do."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def plain_file_problem(path: Path, size: int | None = None) -> str | None:
    """Why `path` is not a plain file (of `size` bytes, where given); None where it is.

    A link is refused: it would let a checkpoint reach out of its folder.
    """
    try:
        status = path.lstat()
    except OSError as error:
        return f"cannot be read ({error.strerror}): the checkpoint is damaged"
    if not stat.S_ISREG(status.st_mode):
        return "is not a plain file (a link, a folder or a device): a checkpoint holds its own files"
    if size is not None and status.st_size != size:
        return f"has {status.st_size} bytes and the manifest says {size}: the file is damaged"
    return None
