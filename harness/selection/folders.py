"""The folders of a selection: held by one process, and not left behind by a command that was refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from harness.disk import locked

from .config import SelectSettings
from .job import work_folder
from .work import STATE

LOCK = ".lock"


@contextmanager
def held(settings: SelectSettings) -> Iterator[Path]:
    """Hold output.folder, which it yields, and the work folder: two selections may share their scores, one after the
    other. HarnessError where another process holds one.

    Where the block fails and nothing that a later command could go on from lies in them, what was made of them goes.
    """
    folder, work = Path(settings.output.folder).expanduser(), work_folder(settings)
    folders = [work, folder] if work.absolute() != folder.absolute() else [folder]
    before = {path for each in folders for path in (*_bare_files(each), each, *each.parents) if path.exists()}
    with ExitStack() as stack:
        stack.enter_context(locked(folder, "selecting", "choose another output.folder"))
        try:
            with ExitStack() as inner:
                if work in folders[:-1]:
                    inner.enter_context(locked(work, "selecting", "choose another output.work"))
                yield folder
        except BaseException:
            for each in folders:
                _remove_if_bare(each, before)
            raise


def _bare_files(folder: Path) -> list[Path]:
    """What is in a folder before the first score is."""
    return [folder / LOCK, folder / STATE]


def _remove_if_bare(folder: Path, before: set[Path]) -> None:
    """Remove a folder in which there is nothing else than these files, them, and the folders above that would be
    empty, unless they were there `before`."""
    if any(not path.is_dir() and path not in _bare_files(folder) for path in folder.rglob("*")):
        return
    for path in _bare_files(folder):
        if path not in before:
            path.unlink(missing_ok=True)
    inside = [] if folder in before else sorted(folder.rglob("*"), reverse=True)
    for path in [*inside, folder, *folder.parents]:
        if path in before or not path.is_dir():
            continue
        try:
            path.rmdir()
        except OSError:  # somebody else has a file there
            return
