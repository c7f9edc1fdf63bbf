"""A selection on its way: settings, pool, targets and working folder, as every process that takes part knows them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from harness.text import Progress

from .config import SelectSettings
from .passes import Pass
from .pool import Pool, Shard, read_targets
from .targets import Targets
from .tasks import Worker
from .work import WorkFolder
from .writer import Decision, write_shard

CHOSEN, REJECTED = "chosen", "rejected"


class Job:
    """A selection on its way: what every process that takes part knows. Pickles as its settings."""

    def __init__(self, settings: SelectSettings) -> None:
        self.settings = settings
        self.folder = Path(settings.output.folder).expanduser()
        self.pool = Pool(settings.pool)
        texts = [read_targets(target) for target in settings.targets]
        against = [text for source in settings.leaks.against for text in read_targets(source)]
        self.targets = [Targets(each) for each in texts]
        forbidden = [text for each in texts for text in each] + against
        self.worker = Worker(settings, self.targets, forbidden)
        place = settings.output.work
        self.work = WorkFolder(
            Path(place).expanduser() if place is not None else self.folder / "work", self._state(forbidden)
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _state(self, forbidden: list[bytes]) -> dict[str, Any]:
        """All that scores and inspections depend on."""
        settings = self.settings
        return {
            "format": 1,
            "pool": settings.pool.model_dump(mode="json", exclude={"source", "exclude", "suffixes"}),
            "files": [[self.pool.name(file), file.size, file.modified_ns] for file in self.pool.files],
            "targets": [digest_of(targets) for targets in self.targets],
            "score": settings.score.model_dump(mode="json"),
            "exact": settings.racing.exact,
            "duplicates": settings.duplicates.model_dump(mode="json"),
            "leaks": {"words": settings.leaks.words, "against": digest_of(forbidden)}
            if settings.leaks.remove
            else None,
            "tokenizer": settings.budget.tokenizer,
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
        with np.load(self.work.path / "final" / f"shard-{shard.number:05d}.npz", allow_pickle=False) as stored:
            chosen, scores, usable = stored["chosen"], stored["scores"], stored["usable"]
        names = np.array(["", *(target.name for target in self.settings.targets)])
        targets = names[chosen + 1] if len(self.settings.targets) > 1 else None
        output = self.settings.output
        facts = {}
        kinds = {CHOSEN: chosen >= 0, REJECTED: usable & (chosen < 0)}
        for kind, mask in kinds.items():
            if kind == CHOSEN or output.rejected:
                folder = self.folder / f".partial-{kind}"
                facts[kind] = write_shard(self.pool, shard, Decision(mask, scores, targets), folder, output)
        self.work.finish_shard("final", shard.number, facts)


def digest_of(texts: Iterable[bytes]) -> str:
    """sha256 of texts in order, each with its length."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()
