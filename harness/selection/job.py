"""A selection on its way: settings, pool, targets and working folder, as every process that takes part knows them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from harness.text import CHOSEN, Progress

from .config import SelectSettings
from .kept import KeptRecords
from .outputs import REJECTED
from .passes import Pass
from .pool import Pool, Shard
from .tasks import Worker
from .tokens import stamp_of
from .work import WorkFolder
from .writer import Decision, write_shard


def work_folder(settings: SelectSettings) -> Path:
    """Where the scores lie."""
    output = settings.output
    return Path(output.folder).expanduser() / "work" if output.work is None else Path(output.work).expanduser()


class Job:
    """A selection on its way: what every process that takes part knows. Pickles as its settings."""

    def __init__(self, settings: SelectSettings) -> None:
        self.settings = settings
        self.folder = Path(settings.output.folder).expanduser()
        self.pool = Pool(settings.pool, [work_folder(settings), self.folder])
        self.worker = Worker(settings)
        self.targets = self.worker.targets
        self.work = WorkFolder(work_folder(settings), self._state(), self._inspection(self.worker.forbidden))

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _state(self) -> dict[str, Any]:
        """All that scores depend on."""
        settings = self.settings
        return {
            "format": 3,
            "pool": settings.pool.model_dump(mode="json", exclude={"source", "exclude", "suffixes"}),
            "files": [[self.pool.name(file), file.size, file.modified_ns] for file in self.pool.files],
            "targets": [digest_of(targets) for targets in self.targets],
            "score": settings.score.model_dump(mode="json"),
            "exact": settings.racing.exact,
            "duplicates": settings.duplicates.remove != "none",
        }

    def _inspection(self, forbidden: list[bytes]) -> dict[str, Any]:
        """What inspections depend on besides."""
        duplicates, leaks, tokenizer = self.settings.duplicates, self.settings.leaks, self.settings.budget.tokenizer
        return {
            "signatures": [duplicates.shingle_words, duplicates.permutations] if duplicates.remove == "near" else None,
            "leaks": [leaks.words, digest_of(forbidden)] if leaks.remove else None,
            "tokenizer": None if tokenizer is None else stamp_of(tokenizer),
        }

    @property
    def shards(self) -> list[Shard]:
        return self.pool.shards

    def run_pass(self, name: str, task: str, shards: Iterable[Shard], workers: int, progress: Progress) -> None:
        """One pass over some shards; those that are finished are skipped."""
        Pass(self.pool, self.work, self.worker, name, task).run(shards, workers, progress)

    def write_shard(self, shard: Shard) -> None:
        """Write a shard's chosen (and rejected) documents, unless that is done."""
        if self.work.facts("final", shard.number) is not None:
            return
        stored = self.work.load(self.work.path / "final" / f"shard-{shard.number:05d}.npz")
        chosen, scores, usable = stored["chosen"], stored["scores"], stored["usable"]
        names = np.array(["", *(target.name for target in self.settings.targets)])
        targets = names[chosen + 1] if len(self.settings.targets) > 1 else None
        output = self.settings.output
        kept = KeptRecords(self.pool, self.work, shard)
        facts = {}
        kinds = {CHOSEN: chosen >= 0, REJECTED: usable & (chosen < 0)}
        for kind, mask in kinds.items():
            if kind == CHOSEN or output.rejected:
                folder = self.folder / f".partial-{kind}"
                decision = Decision(mask, scores, targets)
                facts[kind] = write_shard(self.pool, shard, kept.read(mask), decision, folder, output)
        self.pool.refuse_changed(shard)
        self.work.finish_shard("final", shard.number, facts)

    def is_written(self, shard: Shard) -> bool:
        """Whether what `write_shard` has noted of a shard, if anything, still lies where it was written to."""
        facts = self.work.facts("final", shard.number) or {}
        return all(
            any(_has_size(self.folder / place / entry["file"], entry["bytes"]) for place in (f".partial-{kind}", kind))
            for kind, entries in facts.items()
            for entry in entries
        )


def _has_size(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def digest_of(texts: Iterable[bytes]) -> str:
    """sha256 of texts in order, each with its length."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()
