"""One source, and one fine-tuning of it: trained, measured, written down. Both go on where a kill left them."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from harness.callbacks import FaultError
from harness.config import plain, validate
from harness.convert import RunSource
from harness.data import EvaluationWindows, prepare_for_training
from harness.evaluate import restore
from harness.model import count_parameters
from harness.normfree import NormFreeProof, freezing_cost, measure, prove, site_statistics
from harness.parallel import derive_seed
from harness.remove_norms import FOLDED, HUGGINGFACE, consumed_steps, fold_run
from harness.runs import read
from harness.settings import Settings
from harness.train import train

from ..files import claimed, locked, write_json
from .config import NormRemovalStudySection, RecipeSection
from .grid import Cell, control_cells, removal_cells

CURVE_POINTS = 200
"""Of a run's loss, in its result."""


def run_cells(config: NormRemovalStudySection, parent: int | None = None) -> int:
    """Do runs that nobody has, the removals first, since they say how long their controls are; how many were done. With
    `parent`, ends when that process is gone."""
    done = 0
    for cells in (removal_cells, control_cells):
        for cell in cells(config):
            if parent is not None and os.getppid() != parent:
                return done
            with claimed(config.path / "locks" / cell.name) as mine:
                if mine and not cell.result_file(config).exists():
                    run_cell(config, cell)
                    done += 1
    return done


def source_of(config: NormRemovalStudySection, family: str) -> Path:
    """The run of a family's source, trained by whichever process needs it first."""
    folder = config.path / "sources" / family
    with locked(config.path / "sources" / f"{family}.lock"):
        if not (folder / "measured.json").exists():
            removal = {**plain(config.source.norm_removal), "enabled": True, "control": "aux"}
            settings = _settings(config, folder, family, config.source, config.seed, norm_removal=removal)
            settings = settings.model_copy(
                update={"checkpoint": settings.checkpoint.model_copy(update={"every_steps": 100, "keep_last": 1})}
            )
            train(settings)
            write_json(folder / "measured.json", _measure_source(config, folder))
    return folder


def run_cell(config: NormRemovalStudySection, cell: Cell) -> dict[str, Any]:
    """Fine-tune, measure, and of a removal fold and prove. The run's checkpoints are deleted then: what counts is in
    the result. A removal that diverges is a result, too: its curve, and `failed` with the reason."""
    source = source_of(config, cell.family)
    started, used = time.perf_counter(), time.process_time()
    folder = config.path / "cells" / cell.name
    arm = cell.arm_of(config)
    seed = derive_seed("norm removal", config.seed, cell.seed) % 2**31  # not of the arm: all read the same text
    removal = {**plain(arm.norm_removal), "enabled": True}
    recipe = config.removal.model_copy(update={"steps": cell.steps})
    settings = _settings(config, folder, cell.family, recipe, seed, norm_removal=removal, init_from=str(source))
    failed = None
    try:
        train(settings)
    except FaultError as error:
        failed = str(error)
    log = read(folder)
    result: dict[str, Any] = {
        **asdict(cell),
        "control": arm.norm_removal.control,
        "curve": _curve(log.metrics),
        "validation": [
            [record["step"], record["validation_loss"]] for record in log.metrics if "validation_loss" in record
        ],
        "events": [event for event in log.events if event["event"] in ("norm_removed", "rolled_back")],
    }
    if failed is not None:
        result |= {"failed": failed, "failed_after": log.metrics[-1]["step"] if log.metrics else 0}
    elif arm.norm_removal.control == "none":
        result["consumed_steps"] = consumed_steps(folder, recipe.sequences)
        why_not = fold_run(folder, cell.steps)
        proof = prove(
            folder,
            folded=folder / FOLDED,
            huggingface=why_not or folder / HUGGINGFACE,
            original=source,
            data=config.data,
            windows=config.windows,
        )
        result |= {"proof": _without_quality(proof), "rare_bytes": asdict(proof.quality["norm-free"]["rare bytes"])}
        result |= _measured(config, folder / FOLDED)
    else:
        result |= _measured(config, folder)
    result |= {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used}
    write_json(cell.result_file(config), result)
    for name in ("checkpoints", FOLDED, HUGGINGFACE):
        shutil.rmtree(folder / name, ignore_errors=True)
    return result


def _measured(config: NormRemovalStudySection, model: Path) -> dict[str, Any]:
    """Quality on the validation windows, and the mean loss of each window, for pairing."""
    prepared = prepare_for_training(config.data)
    batches = [batch for _, batch in _windows(config)]
    quality, losses = measure(restore(model).model, batches)
    lengths = [int(count) for batch in batches for count in (batch.targets >= 0).sum(1) if count > 0]
    parts = np.split(losses, np.cumsum(lengths)[:-1])
    assert prepared.tokenizer is not None
    return {"quality": asdict(quality), "window_losses": [round(float(part.mean()), 6) for part in parts]}


def _measure_source(config: NormRemovalStudySection, folder: Path) -> dict[str, Any]:
    """What the source is, and how hard its norms are to remove."""
    restored = restore(folder, switchable_norms=True)
    model = restored.model
    model.end_of_text = restored.tokenizer.eod
    batches = [batch for _, batch in _windows(config)]
    counts = count_parameters(model.section)
    checkpoint = {name: value for name, value in RunSource(folder).details.items() if name != "path"}
    tokens = config.source.steps * config.source.sequences * config.data.sequence_length
    prepared = prepare_for_training(config.data)
    unique = sum(prepared.split(corpus.name, "train").tokens for corpus in config.data.corpora)
    return {
        "parameters": vars(counts),
        "seen_tokens": tokens,
        "tokens_a_parameter": tokens / counts.total,
        "epochs": tokens / unique,
        "sites": {
            site: vars(average) | {"ratio": average.ratio}
            for site, average in site_statistics(model, batches).sites.items()
        },
        "freezing_cost": freezing_cost(model, batches, batches),
        **_measured(config, folder),
        "curve": _curve(read(folder).metrics),
        "checkpoint": checkpoint,
    }


def _windows(config: NormRemovalStudySection) -> EvaluationWindows:
    prepared = prepare_for_training(config.data)
    return EvaluationWindows(prepared, config.data, "validation", 16, limit_samples=config.windows)


def _without_quality(proof: NormFreeProof) -> dict[str, Any]:
    values = proof.as_json()
    del values["quality"], values["gaps"], values["sites_before"]
    return values


def _curve(metrics: list[dict[str, Any]]) -> list[list[float]]:
    """(step, mean loss since the point before, norm sites left), evenly over the run."""
    pieces = np.array_split(np.arange(len(metrics)), min(CURVE_POINTS, len(metrics)))
    return [
        [
            metrics[piece[-1]]["step"],
            round(float(np.mean([metrics[place]["loss"] for place in piece])), 4),
            metrics[piece[-1]].get("norm_sites_left", 0),
        ]
        for piece in pieces
    ]


def _settings(
    config: NormRemovalStudySection,
    folder: Path,
    family: str,
    recipe: RecipeSection,
    seed: int,
    *,
    norm_removal: dict[str, Any],
    init_from: str | None = None,
) -> Settings:
    values = {
        "run": {"name": folder.name, "folder": str(folder.parent), "tensorboard": False, "log_every_steps": 100},
        "parallel": {"device": "cpu", "threads": 1},
        "data": plain(config.data),
        "model": plain(config.families[family]),
        "optimizer": plain(recipe.optimizer),
        "schedule": plain(recipe.schedule),
        "train": {
            "steps": recipe.steps,
            "global_batch_size": recipe.sequences,
            "micro_batch_size": recipe.micro_batch_size,
            "precision": recipe.precision,
            "seed": seed,
            "init_from": init_from,
        },
        "validation": {"every_steps": max(recipe.steps // 10, 1), "samples": 64},
        "checkpoint": {"every_steps": max(recipe.steps // 4, 1), "keep_last": 1},
        "faults": {"hung_after_seconds": None},
        "norm_removal": norm_removal,
    }
    return validate(Settings, values, "the study's run")
