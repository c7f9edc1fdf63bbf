"""What selections have written is not what they choose from: which files of a pool are such."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from harness.text import CHOSEN, SELECTION_RECORD, SourceFile, TextSource, expand

REJECTED = "rejected"
"""The folder of a selection with the documents that were not chosen."""


class Outputs:
    """Sorts the files of a pool into its own and what selections wrote."""

    def __init__(self, source: TextSource, own: Sequence[Path]) -> None:
        """`own`: the folders of the selection that chooses from `source`; nothing below them is the pool's."""
        self._own = [os.path.realpath(folder) for folder in own]
        entries = [expand(entry, source.label) for entry in source.source]
        self._starts = [os.path.realpath(_start(entry)) for entry in entries]
        self._real = cache(_real_folder)  # asked for every file; a selection may appear, so not for ever
        self._above = cache(_selection_above)
        self._said = {CHOSEN, REJECTED} & {part for entry in entries for part in Path(entry).parts}

    def is_own(self, file: SourceFile) -> bool:
        """Whether this selection writes there, by whatever links the file was found."""
        folder = self._real(file.path.parent)
        return any(_is_below(folder, own) for own in self._own)

    def selection_of(self, file: SourceFile) -> str | None:
        """The folder of the finished selection that the file belongs to, by its real path; None where it belongs to
        none, or `source` asks for it: by an entry that begins in that folder, or that says `chosen` or `rejected`."""
        folder = self._real(file.path.parent)
        found = self._above(folder)
        if found is None or any(_is_below(start, found) for start in self._starts):
            return None
        kind = os.path.relpath(folder, found).split(os.sep)[0]
        return None if kind in self._said else found


def _start(entry: str) -> str:
    """Where an entry's files begin: what stands before the first sign of a glob."""
    while glob.has_magic(entry) and not os.path.exists(entry):
        entry = os.path.dirname(entry)
    return entry


def _is_below(path: str, folder: str) -> bool:
    """Whether a path is a folder or lies in it."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _real_folder(folder: Path) -> str:
    return os.path.realpath(folder)


def _selection_above(folder: str) -> str | None:
    """The nearest folder, this or one above, with a finished selection."""
    if os.path.isfile(os.path.join(folder, SELECTION_RECORD)) and os.path.isdir(os.path.join(folder, CHOSEN)):
        return folder
    above = os.path.dirname(folder)
    return None if above == folder else _selection_above(above)
