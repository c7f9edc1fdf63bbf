"""One pass over shards: read, work on batches, keep the results by part."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from harness.config import HarnessError
from harness.text import Problem, Progress, map_in_processes, place_of

from .documents import Unit
from .kept import KeptRecords, keep
from .pool import Batch, Pool, Shard, batches
from .tasks import Outcome, Worker, run_in_worker, start_worker
from .work import MEASURE, Arrays, WorkFolder

logger = logging.getLogger("harness.selection")

TITLES = {
    "measure": "measuring all documents",
    "estimate": "looking closer at those in the race",
    "score": "scoring the best",
    "inspect": "inspecting the chosen",
}
Item = tuple[Shard, Batch | None]
"""A batch of a shard; None behind the last one."""
Argument = tuple[str, list[Unit]]
"""What a worker is asked: the task, and the records of a batch."""


class Pass:
    """One pass over some shards, in this process or with others; what an earlier start finished is left alone."""

    def __init__(self, pool: Pool, work: WorkFolder, worker: Worker, name: str, task: str) -> None:
        self._pool = pool
        self._work = work
        self._worker = worker
        self._name = name
        self._task = task
        self._unread: dict[int, list[str]] = {}

    def run(self, shards: Iterable[Shard], workers: int, progress: Progress) -> None:
        """Raises HarnessError at the first unreadable record where pool.on_error is stop."""
        shards = [shard for shard in shards if self._work.facts(self._name, shard.number) is None]
        title = TITLES[self._task]
        with progress.work(title, sum(shard.bytes_on_disk for shard in shards)) as advance:
            items = self._items(shards, advance)
            if workers == 1:
                results: Iterable[tuple[Item, Outcome | None]] = (
                    (item, None if argument is None else self._worker.run(*argument)) for item, argument in items
                )
            else:
                results = map_in_processes(
                    items, run_in_worker, workers, start_worker, (self._worker.settings,), setting="workers"
                )
            self._keep(results)

    def _items(self, shards: list[Shard], advance: Callable[[int], None]) -> Iterator[tuple[Item, Argument | None]]:
        for shard in shards:
            self._unread[shard.number] = []
            wanted = self._work.wanted(self._name, shard.number)
            if wanted is None or wanted.any():
                for batch in self._batches(shard, wanted, advance):
                    yield (shard, batch), (self._task, [self._pool.unit_of(record) for record in batch.records])
                self._pool.refuse_changed(shard)
            yield (shard, None), None

    def _batches(self, shard: Shard, wanted: np.ndarray | None, advance: Callable[[int], None]) -> Iterator[Batch]:
        """What is not done yet: of all records, or of those that a round wants."""
        done = self._work.parts(self._name, shard.number)
        if wanted is None:
            note = functools.partial(self._note, shard.number)
            return batches(self._pool.records(shard, advance=advance, note=note), done)
        kept = KeptRecords(self._pool, self._work, shard)
        found = batches(kept.read(wanted, advance=advance), done)
        return keep(found, shard, self._work, self._name) if kept.should_grow(wanted) else found

    def _keep(self, results: Iterable[tuple[Item, Outcome | None]]) -> None:
        """Join batches into parts, and write each when it is complete."""
        held: list[tuple[Batch, Arrays]] = []
        for (shard, batch), outcome in results:
            if held and (batch is None or batch.part != held[0][0].part):
                self._save(shard, held)
                held = []
            if batch is None:
                self._work.finish_shard(self._name, shard.number, {"unreadable": self._unread[shard.number]})
            else:
                assert outcome is not None
                if self._task == MEASURE:
                    self._add_reasons(batch, outcome)
                held.append((batch, outcome.columns))

    def _add_reasons(self, batch: Batch, outcome: Outcome) -> None:
        """Of the records without a text: which, and why. Raises where that stops the pass."""
        unusable = np.zeros(len(batch.records), dtype=bool)
        reasons = []
        for index, reason in outcome.unusable:
            record = batch.records[index]
            problem = Problem(record.file.path, place_of(record.file, record.number), reason)
            self._refuse(problem)
            unusable[index] = True
            reasons.append(str(problem))
        outcome.columns["unusable"] = unusable
        outcome.columns["reasons"] = np.array(reasons, dtype=np.str_)

    def _save(self, shard: Shard, held: list[tuple[Batch, Arrays]]) -> None:
        columns = {key: np.concatenate([arrays[key] for _, arrays in held]) for key in held[0][1]}
        if "group" in columns:  # texts as numbers
            columns["groups"], columns["group"] = np.unique(columns["group"], return_inverse=True)
        if self._task != MEASURE:
            columns["rows"] = np.concatenate([batch.rows for batch, _ in held])
        self._work.save(self._name, shard.number, held[0][0].part, columns)

    def _note(self, shard: int, problem: Problem) -> None:
        """What reading says of a file, or of what is left of one."""
        self._refuse(problem)
        self._unread[shard].append(str(problem))

    def _refuse(self, problem: Problem) -> None:
        if self._pool.section.on_error == "stop":
            raise HarnessError(
                f"{self._pool.section.label}: {problem}; mend or exclude it, or set pool.on_error=skip to leave such "
                "records out"
            )
        logger.warning("skipped %s", problem)
