"""One run of a ladder: trained, measured, written down; goes on where a kill left it."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from harness.config import HarnessError
from harness.data import prepare_for_training
from harness.runs import read
from harness.train import train

from ..files import claimed, write_json
from .config import LadderSection
from .grid import Cell, as_row, cells, settings_of

LAST_SHARE = 0.05
"""Of a run's steps: what its training loss is the mean of."""


def run_cells(config: LadderSection, parent: int | None = None) -> int:
    """Do runs that nobody has; how many were done. With `parent`, ends when that process is gone."""
    done = 0
    for cell in cells(config):
        if parent is not None and os.getppid() != parent:
            return done
        with claimed(config.path / "locks" / cell.name) as mine:
            if mine and cell.result(config) is None:
                run_cell(config, cell)
                done += 1
    return done


def run_cell(config: LadderSection, cell: Cell) -> dict[str, Any]:
    """The run's checkpoints are deleted in the end; its metrics stay, for fits and forecasts."""
    started, used = time.perf_counter(), time.process_time()
    settings = settings_of(config, cell)
    result = train(settings)
    if result.stopped_by is not None:
        raise HarnessError(f"{cell.name}: stopped by {result.stopped_by}; the same command goes on")
    row = {**as_row(config, cell), **measured(config, result.folder)}
    row |= {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used}
    write_json(config.path / "results" / f"{cell.name}.json", row)
    shutil.rmtree(result.folder / "checkpoints", ignore_errors=True)
    return row


def measured(config: LadderSection, folder: Path) -> dict[str, Any]:
    """Losses of a finished run, nats a token, from its records."""
    log = read(folder)
    losses = log.column("loss")
    validations = [record for record in log.metrics if "validation_loss" in record]
    prepared = prepare_for_training(config.data)
    assert prepared.tokenizer is not None
    unique = sum(prepared.split(corpus.name, "train").tokens for corpus in config.data.corpora)
    seen = int(log.metrics[-1]["tokens_seen"])
    return {
        "loss": validations[-1]["validation_loss"],
        "bits_per_byte": validations[-1]["validation_bits_per_byte"],
        "training_loss": float(np.mean(losses[-max(1, round(LAST_SHARE * len(losses))) :])),
        "tokens_seen": seen,
        "epochs": seen / unique,
        "vocabulary": prepared.tokenizer.vocab_size,
        "validation": [[record["step"], record["validation_loss"]] for record in validations],
    }
