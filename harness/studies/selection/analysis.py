"""Bits per byte of every arm, and its differences from a baseline with bootstrap intervals.

The unit is the item of a benchmark under the model of one (draw, seed). An arm and its baseline are paired in all
three: same pool draw, same initial weights and order of text, same item. The bootstrap draws draws, seeds and items
with replacement, each for itself, since each is a sample of what might have been.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .config import SHARED, SelectionStudySection
from .grid import arms_and_targets, cells


@dataclass(frozen=True)
class Difference:
    """An arm minus a baseline, in bits per byte: below zero the arm is better."""

    mean: float
    low: float
    high: float
    """A 95 % interval (percentiles of the bootstrap)."""
    by_draw: list[float]
    pairs: int
    """Runs of the arm that have a run of the baseline beside them."""


Runs = dict[tuple[int, int], dict[str, Any]]
"""Results of one arm by (draw, seed)."""


def read_results(config: SelectionStudySection) -> list[dict[str, Any]]:
    """The results that there are, of the cells that the configuration asks for, in their order."""
    files = (cell.result_file(config) for cell in cells(config))
    return [json.loads(file.read_text()) for file in files if file.exists()]


def bits_per_byte(nats: np.ndarray, sizes: np.ndarray) -> float:
    """Of all items together, and the mean over models: nats [models, items], sizes [items]."""
    return float(nats.sum(axis=-1).mean() / math.log(2) / sizes.sum())


def difference(
    arm: np.ndarray, baseline: np.ndarray, sizes: np.ndarray, keys: list[tuple[int, int]], resamples: int, seed: int = 0
) -> Difference:
    """The paired bootstrap of nats [models, items], where `keys` says (draw, seed) of each row.

    A resample weighs a model by how often its draw and its seed were drawn, and an item likewise; its statistic is
    Σ nats of the arm minus Σ nats of the baseline, in bits, over the bytes, all of them weighted. Where a grid is not
    complete, weights are divided by their sum; resamples without any model are drawn again.
    """
    each = (arm - baseline) / math.log(2)
    draws, draw_of = np.unique([draw for draw, _ in keys], return_inverse=True)
    seeds, seed_of = np.unique([seed for _, seed in keys], return_inverse=True)
    generator = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    missing = resamples
    while missing > 0:
        draw_weights = _counts(generator, missing, len(draws))
        seed_weights = _counts(generator, missing, len(seeds))
        item_weights = _counts(generator, missing, len(sizes))
        models = draw_weights[:, draw_of] * seed_weights[:, seed_of]
        total = models.sum(axis=1)
        some = total > 0
        mean = models[some] @ each / total[some, None]  # [resamples, items]
        found.append((mean * item_weights[some]).sum(axis=1) / (item_weights[some] @ sizes))
        missing -= int(some.sum())
    low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
    by_draw = [float(each[draw_of == number].sum(axis=1).mean() / sizes.sum()) for number in range(len(draws))]
    mean_difference = float(each.sum(axis=1).mean() / sizes.sum())
    return Difference(mean_difference, float(low), float(high), by_draw, len(keys))


def analyse(config: SelectionStudySection) -> dict[str, Any]:
    """Everything that the report says, as JSON: a row for each (mode, target, arm) that has results."""
    results = read_results(config)
    rows = []
    for mode in config.modes:
        for target in config.active_targets:
            by_arm: dict[str, Runs] = {}
            for arm, where in arms_and_targets(config):
                if where in (target.name, SHARED):
                    by_arm[arm] = _runs(results, mode, arm, where)
            rows += [_row(config, mode, target.name, arm, by_arm) for arm in by_arm if by_arm[arm]]
    expected = len(cells(config))
    return {
        "cells": {"done": len(results), "expected": expected},
        "cpu_seconds": sum(result["cpu_seconds"] for result in results),
        "rows": rows,
    }


def _runs(results: list[dict[str, Any]], mode: str, arm: str, where: str) -> Runs:
    mine = [r for r in results if (r["mode"], r["arm"], r["target"]) == (mode, arm, where)]
    return {(result["draw"], result["seed"]): result for result in mine}


def _row(config: SelectionStudySection, mode: str, target: str, arm: str, by_arm: dict[str, Runs]) -> dict[str, Any]:
    runs = by_arm[arm]
    sizes = np.array(next(iter(runs.values()))["items"][target]["bytes"])
    domain = config.target(target).in_domain
    choices = [run["choice"] for run in runs.values()]
    windows = sum(choice["windows"] for choice in choices)
    row: dict[str, Any] = {
        "mode": mode,
        "target": target,
        "arm": arm,
        "runs": len(runs),
        "bits_per_byte": bits_per_byte(_nats(runs, target, list(runs)), sizes),
        "in_domain": None if domain is None else sum(choice["sources"][domain] for choice in choices) / windows,
        "window_bytes": sum(choice["bytes"] for choice in choices) / windows,
        "unique_tokens": float(np.mean([choice["tokens"] for choice in choices])),
        "epochs": float(np.mean([run["epochs"] for run in runs.values()])),
        "training_loss": float(np.mean([run["training_loss"] for run in runs.values()])),
    }
    for baseline in (config.arms[0].name, config.second_baseline):
        if baseline is None or baseline == arm:
            continue
        other = by_arm.get(baseline, {})
        keys = [key for key in runs if key in other]
        if keys:
            found = difference(
                _nats(runs, target, keys), _nats(other, target, keys), sizes, keys, config.resamples, seed=config.seed
            )
            row[f"minus_{baseline}"] = vars(found)
    return row


def _nats(runs: Runs, target: str, keys: list[tuple[int, int]]) -> np.ndarray:
    return np.array([runs[key]["items"][target]["nats"] for key in keys])


def _counts(generator: np.random.Generator, resamples: int, size: int) -> np.ndarray:
    """How often each of `size` things is drawn in `size` draws with replacement: float64 [resamples, size]."""
    return generator.multinomial(size, np.full(size, 1 / size), size=resamples).astype(np.float64)
