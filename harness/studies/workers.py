"""Several processes that share a study's work. Each takes the next cell that nobody has, until none is left."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.config import HarnessError

RunCells = Callable[[Any, int | None], int]
"""Does the cells of a configuration that nobody has, and says how many; with the number of a process, ends when that
is no longer its parent."""


def run_workers(run_cells: RunCells, config: Any, folder: Path, workers: int) -> None:
    """Do all cells that are missing with so many processes, whose output goes into folder/logs. HarnessError where one
    of them failed. `run_cells` must be a function of a module."""
    import multiprocessing

    # Forking a process that has run torch would copy its threads' locks but not its threads.
    context = multiprocessing.get_context("spawn")
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    processes = []
    for number in range(workers):
        log_file = logs / f"worker-{os.getpid()}-{number}.log"
        process = context.Process(target=_worker, args=(run_cells, config, log_file, os.getpid()), daemon=True)
        process.start()
        processes.append((process, log_file))
    for process, _ in processes:
        process.join()
    failed = [str(log) for process, log in processes if process.exitcode]
    if failed:
        raise HarnessError(f"a worker of the study failed; {failed[0]} says why. The same command goes on")


def _worker(run_cells: RunCells, config: Any, log_file: Path, parent: int) -> None:
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    run_cells(config, parent)
