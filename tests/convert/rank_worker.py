"""Trains a list of settings in one group of processes, each saved before its first step; each rank counts what it reads
of a source of weights."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from harness.callbacks import Callback
from harness.config import validate
from harness.convert import ModelSource
from harness.parallel import ParallelLayout, ParallelSection
from harness.settings import Settings
from harness.train import Trainer, train


class SavedFirst(Callback):
    """Saves what the run begins with, as step 0."""

    name = "saved first"

    def before_training(self, trainer: Any) -> None:
        assert isinstance(trainer, Trainer)
        trainer.save()
        trainer.saving.settle(trainer.step)


class Counted:
    """Bytes that `source.read` takes from files."""

    def __init__(self) -> None:
        self.bytes = 0
        self._preadv = os.preadv

    def preadv(self, descriptor: int, buffers: Any, offset: int) -> int:
        count = self._preadv(descriptor, buffers, offset)
        self.bytes += count
        return count


def counted_read(source: ModelSource, fragments: Any, count: Counted, read: Any) -> None:
    os.preadv = count.preadv
    try:
        read(source, fragments)
    finally:
        os.preadv = count._preadv


def main() -> None:
    """`rank_worker.py JOBS`: a JSON list of {settings}."""
    torch.set_num_threads(1)
    from harness.convert import open_source

    with ParallelLayout(ParallelSection(device="cpu", timeout_seconds=120)) as layout:
        for job in json.loads(Path(sys.argv[1]).read_text()):
            settings = validate(Settings, job["settings"], "rank_worker")
            assert settings.train.init_from is not None
            source_class = type(open_source(Path(settings.train.init_from)))
            count, read = Counted(), source_class.read
            source_class.read = lambda self, parts, count=count, read=read: counted_read(self, parts, count, read)  # type: ignore[method-assign,misc,assignment]
            train(settings, [SavedFirst()])
            source_class.read = read  # type: ignore[method-assign]
            (settings.run.path / f"read-{layout.rank}").write_text(str(count.bytes))


if __name__ == "__main__":
    main()
