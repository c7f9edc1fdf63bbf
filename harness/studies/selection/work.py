"""The processes that do the study's cells. Each takes the next cell that nobody has, until none is left."""

from __future__ import annotations

import logging
import os
from typing import Any

from harness.config import plain

from ..files import claimed
from .arms import Chooser
from .config import SelectionStudySection
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


def decisive_settings(config: SelectionStudySection) -> dict[str, Any]:
    """What the result of a cell depends on; a key for each arm and target, since others do not concern it."""
    names = ("seed", "budget_tokens", "tokenizer", "sequence_length", "batch_sequences", "model", "base", "pool")
    values = {name: plain(getattr(config, name)) for name in names}
    values |= {mode: plain(recipe) for mode, recipe in config.modes.items()}
    values |= {f"arm {arm.name}": plain(arm) for arm in config.arms}
    return values | {f"target {target.name}": plain(target) for target in config.targets}


def check_budgets(config: SelectionStudySection, pool: Pool) -> None:
    """HarnessError where the budget is too large a part of what some draw has in a target's domain."""
    for target in config.active_targets:
        for draw in range(config.draws):
            Chooser(config, pool, target, draw).check_budget()
