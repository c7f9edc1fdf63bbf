"""`harness select`: measure, race, inspect, write. The plan is the same on one process and on many machines."""

from __future__ import annotations

import hashlib
import json
import logging
import resource
import shutil
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from harness.config import HarnessError
from harness.text import CHOSEN, SELECTION_RECORD, Progress, choose_workers

from .choice import Choice
from .config import SelectSettings
from .folders import held
from .job import Job
from .outputs import REJECTED
from .record import MACHINERY, describe, summarize
from .repeats import find_exact_repeats
from .report import write_report
from .work import MEASURE, WRITING, Arrays, read_json, save_arrays, views, write_json

logger = logging.getLogger("harness.selection")

WORTH_A_PROCESS = 200
"""Documents that one process is done with before others have started."""


class Executor(Protocol):
    """Where the passes run."""

    def workers(self, job: Job) -> int:
        """Processes that work at a time."""

    def run_pass(self, job: Job, name: str, task: str) -> None:
        """One pass over all shards; returns when every shard's results are in the working folder."""

    def write(self, job: Job) -> None:
        """`job.write_shard` for all shards."""


class LocalExecutor:
    """This machine: worker processes for the texts, this process for files."""

    def __init__(self, workers: int | None, progress: Progress) -> None:
        self._workers = workers
        self._progress = progress

    def workers(self, job: Job) -> int:
        """Processes that work on texts; 1: this one."""
        return choose_workers(self._workers, sum(file.estimated_text_bytes for file in job.pool.files))

    def run_pass(self, job: Job, name: str, task: str) -> None:
        workers = self.workers(job)
        if name != MEASURE and job.work.count_wanted(name, len(job.shards)) < WORTH_A_PROCESS:
            workers = 1
        job.run_pass(name, task, job.shards, workers, self._progress)

    def write(self, job: Job) -> None:
        for shard in job.shards:
            job.write_shard(shard)


def open_executor(settings: SelectSettings, progress: Progress) -> Executor:
    """What distributed.engine names."""
    if settings.distributed.engine == "none":
        return LocalExecutor(settings.workers, progress)
    from .distributed import DatatroveExecutor

    return DatatroveExecutor(settings.distributed, progress)


def select(settings: SelectSettings, *, progress: Progress | None = None) -> dict[str, Any]:
    """Choose documents of a pool and write them; returns what report.json holds.

    What an interrupted selection has done is kept and gone on from; the result is the same, byte for byte, as without
    an interruption, for any number of workers and any order of files. Raises HarnessError for what a user can put
    right: no or unreadable text, a budget larger than the pool, a folder with another selection, a full disk. Then
    nothing is left behind but scores that a further call can use.
    """
    started = time.perf_counter(), _cpu_seconds()
    progress = progress or Progress()
    executor = open_executor(settings, progress)
    folder = Path(settings.output.folder).expanduser()
    refuse_other(folder, settings)
    try:
        with held(settings):
            for left in folder.glob(f"{WRITING}*"):  # of selection.json or a report, by a process that was killed
                left.unlink(missing_ok=True)
            job = Job(settings)
            summary = _select(job, executor, progress)
            wall, cpu = time.perf_counter() - started[0], _cpu_seconds() - started[1]
            summary["time"] |= {"wall_seconds": wall, "cpu_seconds": cpu, "workers": executor.workers(job)}
            write_json(folder / "report.json", summary)
            write_report(folder, summary)
    except OSError as error:
        raise HarnessError(f"{error.filename or folder}: cannot be written: {error.strerror or error}") from error
    return summary


def _select(job: Job, executor: Executor, progress: Progress) -> dict[str, Any]:
    if job.pool.left_out:
        logger.info(job.pool.left_out)
    shards = len(job.shards)
    executor.run_pass(job, MEASURE, "measure")
    repeated = _repeats(job)
    while True:
        choice = Choice(job.settings, job.work, shards, repeated, job.worker.races)
        choice.check_pool()
        task, rows = choice.to_race()
        if not len(rows):
            task, rows = "inspect", choice.to_inspect()
        if not len(rows):
            break
        name = f"round-{len(job.work.rounds(shards)):03d}"
        task = job.work.plan_round(name, task, rows.by_shard(shards))
        executor.run_pass(job, name, task)
    choice.check_filled()
    _decide(job, choice)
    executor.write(job)
    _publish(job)
    write_json(job.folder / SELECTION_RECORD, describe(job, choice))
    summary = summarize(job, choice)
    if summary["pool"]["without_id"]:
        logger.warning(
            "%d of %d documents have no %r (pool.id_field), or null: they are called by their file and place",
            summary["pool"]["without_id"], summary["pool"]["documents"], job.settings.pool.id_field,
        )  # fmt: skip
    if not summary["chosen"]["documents"]:
        logger.warning(
            "nothing was chosen: the budget is less than the best document, or no score reaches the threshold"
        )
    progress.say(
        f"chose {summary['chosen']['documents']:,} of {summary['pool']['documents']:,} documents, "
        f"{summary['chosen']['bytes']:,} bytes, into {job.folder / CHOSEN}"
    )
    return summary


def _repeats(job: Job) -> Arrays:
    """Which records repeat another's text; found once."""
    if job.settings.duplicates.remove == "none":
        return {}
    file = job.work.path / "duplicates.npz"
    if not file.exists():
        shards = len(job.shards)
        records = sum(len(view) for view in views(job.work, shards, {}))
        save_arrays(file, find_exact_repeats(lambda: views(job.work, shards, {}), records))
    return job.work.load(file)


def _decide(job: Job, choice: Choice) -> None:
    """Write down for each shard what is to be written; a decision that is another than an earlier one's replaces it."""
    final = job.work.path / "final"
    held: dict[int, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {shard.number: [] for shard in job.shards}
    for view in choice.parts():
        chosen = choice.chosen(view)
        known = np.where(np.isnan(view.scores), -np.inf, view.scores).max(axis=1)
        picked = view.scores[np.arange(len(view)), np.maximum(chosen, 0)]
        scores = np.where(chosen >= 0, picked, np.where(np.isinf(known), np.nan, known))
        held[view.shard].append((chosen, scores, view.measured["usable"]))
    nothing = (np.zeros(0, dtype=np.int64), np.zeros(0), np.zeros(0, dtype=bool))
    joined: dict[int, Arrays] = {}
    token = hashlib.sha256(repr((job.settings.output, job.settings.pool)).encode())
    for number, parts in held.items():
        columns = [np.concatenate(column) for column in zip(nothing, *parts, strict=True)]
        joined[number] = dict(zip(("chosen", "scores", "usable"), columns, strict=True))
        for column in columns:
            token.update(column.tobytes())
    plan = {"plan": token.hexdigest()}
    if read_json(final / "plan.json") == plan and all(map(job.is_written, job.shards)):
        return
    (final / "plan.json").unlink(missing_ok=True)  # first: without it the rest does not count
    shutil.rmtree(final, ignore_errors=True)
    for kind in (CHOSEN, REJECTED):
        shutil.rmtree(job.folder / f".partial-{kind}", ignore_errors=True)
    for kind in (CHOSEN, REJECTED) if job.settings.output.rejected else (CHOSEN,):
        (job.folder / f".partial-{kind}").mkdir(parents=True)  # where nothing is chosen, the folder is empty
    for number, arrays in joined.items():
        save_arrays(final / f"shard-{number:05d}.npz", arrays)
    write_json(final / "plan.json", plan)


def _publish(job: Job) -> None:
    """The finished folders take their names."""
    for kind in (CHOSEN, REJECTED):
        partial, final, old = (job.folder / f"{prefix}{kind}" for prefix in (".partial-", "", ".old-"))
        if partial.is_dir():
            for left in partial.rglob(f"{WRITING}*"):  # by a process that was killed
                left.unlink(missing_ok=True)
            shutil.rmtree(old, ignore_errors=True)
            if final.exists():
                final.rename(old)
            partial.rename(final)
        shutil.rmtree(old, ignore_errors=True)


def refuse_other(folder: Path, settings: SelectSettings) -> None:
    """HarnessError where the folder has a finished selection by other settings."""
    file = folder / SELECTION_RECORD
    if not file.exists():
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError):
        raise HarnessError(f"{file}: is damaged; choose another output.folder, or delete {folder}") from None
    now = json.loads(json.dumps(settings.model_dump(mode="json", exclude=MACHINERY)))
    difference = next((key for key in now if found.get(key) != now[key]), None)
    if difference is not None:
        raise HarnessError(
            f"{folder}: has a finished selection by other settings (they differ in {difference}); choose another "
            f"output.folder (with output.work={settings.output.work or folder / 'work'} its scores are used again)"
        )


def _cpu_seconds() -> float:
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )
