"""One cell: choose, train, evaluate, write down."""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from harness.callbacks import Callback
from harness.config import plain, validate
from harness.parallel import derive_seed
from harness.settings import Settings
from harness.train import train

from ..files import locked, write_json
from .arms import Choice, Chooser
from .config import SHARED, RecipeSection, SelectionStudySection
from .evaluation import ItemScores
from .grid import Cell, evaluated_targets
from .items import evaluation_texts
from .pool import Pool

logger = logging.getLogger("harness.studies")


def train_cell(config: SelectionStudySection, pool: Pool, cell: Cell) -> dict[str, Any]:
    """Run a cell and write its result. Its run folder is deleted: what counts is in the result."""
    started, used = time.perf_counter(), time.process_time()
    target = None if cell.target == SHARED else config.target(cell.target)
    chooser = Chooser(config, pool, target, cell.draw)
    choice = chooser.choose(config.arm(cell.arm), cell.seed)
    described = chooser.describe(choice)
    twin = _find_twin(config, cell, described["digest"])
    if twin is not None:
        result = {**twin, **vars(cell), "same_as": twin["arm"], "choice": described, "seconds": 0.0, "cpu_seconds": 0.0}
        write_json(cell.result_file(config), result)
        return result
    texts = {name: evaluation_texts(config, config.target(name)) for name in evaluated_targets(config, cell)}
    scores = ItemScores(texts, config.sequence_length)
    recipe = config.modes[cell.mode]
    base = train_base(config, pool) if cell.mode == "continued" else None
    chosen_seconds = time.perf_counter() - started

    folder = config.path / "cells" / cell.name
    shutil.rmtree(folder, ignore_errors=True)
    # Not of the arm: the arms of one seed begin with the same weights.
    seed = derive_seed("cell", config.seed, cell.draw, cell.seed) % 2**31
    steps = _train(config, pool, folder, choice, recipe, seed, init_from=base, callbacks=[scores])
    losses = [json.loads(line)["loss"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(folder)
    seen = steps * config.batch_sequences * config.sequence_length
    result = {
        **vars(cell),
        "choice": described,
        "seen_tokens": seen,
        "epochs": seen / choice.tokens,
        "training_loss": float(np.mean(losses[-20:])),
        "items": scores.scores,
        "seconds": time.perf_counter() - started,
        "choosing_seconds": chosen_seconds,
        "cpu_seconds": time.process_time() - used,
    }
    write_json(cell.result_file(config), result)
    return result


def _find_twin(config: SelectionStudySection, cell: Cell, digest: str) -> dict[str, Any] | None:
    """The result of another arm that chose the very same windows: the same run, to the bit, so it is not done again."""
    for arm in config.arms:
        file = replace(cell, arm=arm.name).result_file(config)
        if file.exists():
            result: dict[str, Any] = json.loads(file.read_text())
            if result["choice"]["digest"] == digest:
                return result
    return None


def train_base(config: SelectionStudySection, pool: Pool) -> Path:
    """The run that continued cells begin with; trained by whichever process needs it first."""
    assert config.base is not None
    folder = config.path / "base"
    with locked(config.path / "base.lock"):
        if not (folder / "done.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            generator = np.random.default_rng(derive_seed(config.seed, "base"))
            windows = generator.permutation(len(pool.windows))
            count = int(np.searchsorted(np.cumsum(pool.tokens[windows]), config.base.unique_tokens, side="right"))
            choice = Choice(windows[:count], int(pool.tokens[windows[:count]].sum()))
            seed = derive_seed("base", config.seed) % 2**31
            steps = _train(config, pool, folder, choice, config.base, seed)
            write_json(folder / "done.json", {"steps": steps, "tokens": choice.tokens, "windows": count})
    return folder / "run"


def _train(
    config: SelectionStudySection,
    pool: Pool,
    folder: Path,
    choice: Choice,
    recipe: RecipeSection,
    seed: int,
    *,
    init_from: Path | None = None,
    callbacks: list[Callback] | None = None,
) -> int:
    """Train on chosen windows, with the run in `folder`/run; the number of steps."""
    folder.mkdir(parents=True)
    lines = (json.dumps({"text": pool.windows[number].text}) + "\n" for number in sorted(choice.windows.tolist()))
    (folder / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    steps = -(-recipe.seen_tokens // (config.batch_sequences * config.sequence_length))
    tokenizer: dict[str, str] = {"kind": config.tokenizer.kind}
    if config.tokenizer.kind == "sentencepiece":
        tokenizer["path"] = str(pool.tokenizer_folder / "tokenizer.model")
    values = {
        "run": {"name": "run", "folder": str(folder), "tensorboard": False, "log_every_steps": 10**6},
        "parallel": {"device": "cpu", "threads": 1},
        "data": {
            "folder": str(folder / "prepared"),
            "corpora": [{"name": "chosen", "source": [str(folder / "text.jsonl")]}],
            "tokenizer": tokenizer,
            "sequence_length": config.sequence_length,
            "validation_share": 0,
            "test_share": 0,
            "workers": 1,
        },
        "model": plain(config.model),
        "optimizer": plain(recipe.optimizer),
        "schedule": plain(recipe.schedule),
        "train": {
            "steps": steps,
            "global_batch_size": config.batch_sequences,
            "seed": seed,
            "init_from": None if init_from is None else str(init_from),
        },
        "validation": {"enabled": False},
        "checkpoint": {"every_steps": None, "asynchronous": False},
        "faults": {"hung_after_seconds": None},
    }
    train(validate(Settings, values, "the study's run"), callbacks or ())
    return steps
