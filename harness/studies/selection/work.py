"""The processes that do the study's cells. Each takes the next cell that nobody has, until none is left."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from harness.config import HarnessError, plain

from .arms import Chooser
from .config import SelectionStudySection
from .files import claimed, locked, write_json
from .grid import cells
from .pool import Pool, open_pool

logger = logging.getLogger("harness.studies")


def run_cells(config: SelectionStudySection, parent: int | None = None) -> int:
    """Do cells one after the other; how many were done here.

    A cell is claimed by a lock that dies with its process, so any number of processes, started at any time, share the
    work, and a killed one loses only the cell that it was at. With `parent`, ends when that process is gone.
    """
    from .training import train_cell

    pool = open_pool(config)
    done = 0
    for cell in cells(config):
        if parent is not None and os.getppid() != parent:
            break
        file = cell.result_file(config)
        if file.exists():
            continue
        with claimed(config.path / "locks" / cell.name) as mine:
            if mine and not file.exists():
                train_cell(config, pool, cell)
                done += 1
    return done


def worker(config: SelectionStudySection, log_file: Path, parent: int) -> None:
    """One of several processes; what its runs print goes to a file."""
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    run_cells(config, parent)


def run_workers(config: SelectionStudySection) -> None:
    """Do all cells that are missing with `config.workers` processes. HarnessError where one of them failed."""
    import multiprocessing

    # Forking a process that has run torch would copy its threads' locks but not its threads.
    context = multiprocessing.get_context("spawn")
    logs = config.path / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    processes = []
    for number in range(config.workers):
        log_file = logs / f"worker-{os.getpid()}-{number}.log"
        process = context.Process(target=worker, args=(config, log_file, os.getpid()), daemon=True)
        process.start()
        processes.append((process, log_file))
    for process, _ in processes:
        process.join()
    failed = [str(log) for process, log in processes if process.exitcode]
    if failed:
        raise HarnessError(f"a worker of the study failed; {failed[0]} says why. The same command goes on")


def check_settings(config: SelectionStudySection) -> None:
    """HarnessError where the results in the work folder were made with other settings than these.

    More arms, targets, draws or seeds are no other settings; what a finished run came out of is.
    """
    file = config.path / "settings.json"
    now = _settings(config)
    with locked(config.path / "settings.lock"):
        then: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        changed = [name for name, value in then.items() if name in now and now[name] != value]
        if changed:
            raise HarnessError(
                f"{config.folder}: its results were made with another {changed[0]}; choose another folder, or put "
                f"{changed[0]} back"
            )
        write_json(file, then | now)


def _settings(config: SelectionStudySection) -> dict[str, Any]:
    """What the result of a cell depends on; a key for each arm and target, since others do not concern it."""
    names = ("seed", "budget_tokens", "tokenizer", "sequence_length", "batch_sequences", "model", "base", "pool")
    settings = {name: plain(getattr(config, name)) for name in names}
    settings |= {mode: plain(recipe) for mode, recipe in config.modes.items()}
    settings |= {f"arm {arm.name}": plain(arm) for arm in config.arms}
    return settings | {f"target {target.name}": plain(target) for target in config.targets}


def check_budgets(config: SelectionStudySection, pool: Pool) -> None:
    """HarnessError where the budget is too large a part of what some draw has in a target's domain."""
    for target in config.active_targets:
        for draw in range(config.draws):
            Chooser(config, pool, target, draw).check_budget()
