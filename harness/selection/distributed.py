"""The passes of a selection as datatrove pipelines: tasks on this machine, a SLURM array, or Ray.

Each task takes every n-th shard. What it finishes lies in the working folder, shard by shard, so the results are those
of one process, a rerun does what is missing, and the number of tasks may change in between.
"""

from __future__ import annotations

import functools
import logging
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.config import HarnessError
from harness.text import Progress

from .config import DistributedSection, SelectSettings
from .job import Job
from .passes import TITLES

logger = logging.getLogger("harness.selection")

POLL_SECONDS = 2.0
WATCH_SECONDS = 0.2
GRACE_SECONDS = 60.0
"""How long files may take to be seen by this machine after a job has left the queue."""
WRITE = "write"


def run_task(settings: SelectSettings, name: str, task: str, rank: int, world_size: int) -> None:
    """One task of one pass: every `world_size`-th shard, from `rank` on."""
    job = Job(settings)
    shards = job.shards[rank::world_size]
    if task == WRITE:
        for shard in shards:
            job.write_shard(shard)
    else:
        job.run_pass(name, task, shards, 1, Progress(quiet=True))


class DatatroveExecutor:
    """Runs the passes on what `section.engine` names; needs the package datatrove."""

    def __init__(self, section: DistributedSection, progress: Progress) -> None:
        try:
            import datatrove  # noqa: F401
        except ModuleNotFoundError:
            raise HarnessError(
                f"distributed.engine={section.engine} needs datatrove: pip install harness[distributed]"
            ) from None
        self._section = section
        self._progress = progress

    def workers(self, job: Job) -> int:
        """Tasks at a time."""
        tasks = min(self._section.tasks, len(job.shards))
        return min(self._section.workers or tasks, tasks)

    def run_pass(self, job: Job, name: str, task: str) -> None:
        """One pass over all shards. HarnessError where a task failed; what others finished is kept."""
        self._run(job, name, task, lambda: self._missing(job, name))

    def write(self, job: Job) -> None:
        """Write all shards."""
        self._run(job, "final", WRITE, lambda: self._missing(job, "final"))

    @staticmethod
    def _missing(job: Job, name: str) -> int:
        return sum(job.work.facts(name, shard.number) is None for shard in job.shards)

    def _run(self, job: Job, name: str, task: str, missing: Callable[[], int]) -> None:
        if not missing():
            return
        tasks = min(self._section.tasks, len(job.shards))
        # skip_completed stays off: a task that is marked as done knows nothing of another number of tasks, or of
        # another budget's choice; shards that are done are skipped by the task itself.
        common: dict[str, Any] = {
            "pipeline": [_Step(job.settings, name, task)],
            "tasks": tasks,
            "logging_dir": str((job.work.path / "logs" / f"{name}-{tasks}").absolute()),
            "skip_completed": False,
        }
        try:
            executor = self._open(common, self.workers(job))
            with self._shown(job, name, task), _ending_with_this_process():
                executor.run()
                if self._section.engine == "slurm":
                    _wait(executor.job_id, missing)
        except HarnessError:
            raise
        except Exception as error:  # whatever a task raised, datatrove hands on as it is, from another process
            raise HarnessError(
                f"{name}: a task failed ({type(error).__name__}: {' '.join(str(error).split())[:300]}); logs in "
                f"{common['logging_dir']}; the same command goes on with what is missing"
            ) from error
        if left := missing():
            raise HarnessError(
                f"{name}: {left} of {len(job.shards)} shards are missing after all tasks; logs in "
                f"{common['logging_dir']}; the same command goes on with what is missing"
            )

    @contextmanager
    def _shown(self, job: Job, name: str, task: str) -> Iterator[None]:
        """How far the pass is, by the shards that are done."""
        ended = threading.Event()
        left = {shard.number: shard.bytes_on_disk for shard in job.shards if job.work.facts(name, shard.number) is None}
        with self._progress.work(TITLES.get(task, "writing"), sum(left.values())) as advance:

            def look() -> None:
                for number in [each for each in left if job.work.is_finished(name, each)]:
                    advance(left.pop(number))

            def watch() -> None:
                while not ended.wait(POLL_SECONDS):
                    look()

            watcher = threading.Thread(target=watch, daemon=True)
            watcher.start()
            try:
                yield
            finally:
                ended.set()
                watcher.join()
                look()

    def _open(self, common: dict[str, Any], at_once: int) -> Any:
        section = self._section
        options: dict[str, Any] = dict(section.options)
        if section.engine == "local":
            from .local_tasks import LocalTasks

            return LocalTasks(**common, workers=at_once, start_method="spawn", **options)
        if section.engine == "ray":
            from datatrove.executor import RayPipelineExecutor

            return RayPipelineExecutor(**common, workers=at_once, **options)
        from datatrove.executor import SlurmPipelineExecutor

        if not {"env_command", "venv_path", "condaenv"} & options.keys():  # the environment that this process runs in
            options["env_command"] = f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
        options = {"qos": "", **options}  # the cluster's default, rather than one called normal
        return SlurmPipelineExecutor(
            **common, workers=at_once, time=section.time, partition=section.partition, **options
        )


class _Step:
    """What datatrove calls in each task."""

    def __init__(self, settings: SelectSettings, name: str, task: str) -> None:
        self._arguments = (settings, name, task)

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        if self._arguments[0].distributed.engine == "local":
            _end_with_starter()
        run_task(*self._arguments, rank, world_size)
        return iter(())


# datatrove's processes on this machine would go on, or wait for ever, were this one killed: those of its pool, which
# begin as new interpreters, and that of its manager, which is forked.

_starting: int | None = None
"""While datatrove runs: this process, for those that it forks."""


@contextmanager
def _ending_with_this_process() -> Iterator[None]:
    global _starting
    _register_once()
    _starting = os.getpid()
    try:
        yield
    finally:
        _starting = None


@functools.cache
def _register_once() -> None:
    os.register_at_fork(after_in_child=lambda: None if _starting is None else _end_with(_starting))


@functools.cache
def _end_with_starter() -> None:
    """In a process of datatrove's pool; a single worker is this process itself, and nobody's child."""
    import multiprocess

    starter = multiprocess.parent_process()
    if starter is not None:
        _end_with(starter.pid)


def _end_with(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _wait(job_id: Any, missing: Callable[[], int]) -> None:
    """Until every shard is done, or the SLURM array that should do them has left the queue."""
    gone_since = None
    while missing():
        time.sleep(POLL_SECONDS)
        queued = subprocess.run(["squeue", "-h", "-j", str(job_id)], capture_output=True, text=True, check=False)
        if queued.stdout.strip():
            gone_since = None
        else:
            gone_since = gone_since or time.monotonic()
            if time.monotonic() - gone_since > GRACE_SECONDS:
                return
