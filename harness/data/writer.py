"""Writing a corpus: .bin/.idx per split into a temporary folder that is renamed when it is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from harness.disk import sync

from .megatron import import_indexed_dataset
from .splits import SPLITS

PARTIAL = ".partial-"
"""Begins the name of a folder that is being written."""


class CorpusWriter:
    """Token arrays per split, counted; a split without documents leaves no file (an empty one cannot be mapped)."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._folder = folder
        self._module = import_indexed_dataset()
        self.dtype: Any = self._module.DType.optimal_dtype(vocab_size)
        self._builders: dict[str, Any] = {}
        self.counts = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in SPLITS}

    def add(self, split: str, ids: np.ndarray, size: int) -> None:
        """Append a document: its ids with end-of-text, and its length in bytes."""
        if split not in self._builders:
            path = self._folder / f"{split}.bin"
            self._builders[split] = self._module.IndexedDatasetBuilder(str(path), dtype=self.dtype)
        self._builders[split].add_document(ids, [len(ids)])
        counts = self.counts[split]
        counts["documents"] += 1
        counts["tokens"] += len(ids)
        counts["bytes"] += size

    def finish(self) -> None:
        """Write the indices and close the files."""
        for split, builder in self._builders.items():
            builder.finalize(str(self._folder / f"{split}.idx"))

    def close(self) -> None:
        """Close the files as they are, after an error."""
        for builder in self._builders.values():
            builder.data_file.close()


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name when the block ends well, and vanishes otherwise.

    The files are on disk before the rename, so a machine that stops never leaves a whole-looking part.
    """
    partial = folder.with_name(PARTIAL + folder.name)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.iterdir():
            sync(file)
        sync(partial)
        os.rename(partial, folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def remove_partial(folder: Path) -> None:
    """Delete what interrupted runs left in a prepared folder; only under its lock."""
    for partial in folder.glob(PARTIAL + "*"):
        shutil.rmtree(partial, ignore_errors=True)
