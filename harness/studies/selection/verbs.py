"""plan, run, status and report of a selection study."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from harness.config import load_config
from harness.model import count_parameters, flops_per_token
from harness.runs import configure_logging

from ..changes import check_settings
from ..workers import run_workers
from .config import RecipeSection, SelectionStudySection
from .grid import Cell, cells
from .pool import open_pool
from .work import check_budgets, decisive_settings, run_cells

CORE_FLOPS = 5e10
"""fp32 FLOP/s of one CPU core, of which models this small reach about a half."""
REACHED = 0.5


def plan(config_path: Path, overrides: Sequence[str] = ()) -> None:
    """Print what the study trains and about what it costs. Reads nothing but the configuration."""
    config = _load(config_path, overrides)
    section = config.model.model_copy(update={"vocab_size": config.tokenizer.vocab_size})
    counts, flops = count_parameters(section), flops_per_token(section, config.sequence_length)
    wanted = Counter(cell.mode for cell in cells(config))
    print(f"model: {counts.blocks:,} parameters in the blocks, {counts.total:,} in all, {flops:,} FLOPs a token")
    print(
        f"arms: {len(config.arms)}, targets: {', '.join(target.name for target in config.active_targets)}, "
        f"draws: {config.draws}, seeds: {config.seeds}"
    )
    recipes: dict[str, tuple[RecipeSection, int, int]] = {
        mode: (recipe, wanted[mode], config.budget_tokens) for mode, recipe in config.modes.items()
    }
    if config.base is not None and config.continued is not None:
        recipes["base"] = (config.base, 1, config.base.unique_tokens)
    total = 0.0
    for name, (recipe, runs, unique) in recipes.items():
        seconds = recipe.seen_tokens * flops / (CORE_FLOPS * REACHED)
        total += runs * seconds
        print(
            f"{name}: {runs} runs of {recipe.seen_tokens:,} tokens: {unique:,} unique, "
            f"{recipe.seen_tokens / unique:.1f} epochs, {recipe.seen_tokens / counts.blocks:.0f} tokens a parameter of "
            f"the blocks; about {seconds:.0f} core-seconds each"
        )
    print(f"in all about {total / 3600:.1f} core-hours on {config.workers} workers; results in {config.folder}")


def run(config_path: Path, overrides: Sequence[str] = ()) -> None:
    """Make the pool if it is not there, then do every cell that is missing."""
    config = _load(config_path, overrides)
    configure_logging()
    check_settings(config.path, decisive_settings(config))
    pool = open_pool(config)
    check_budgets(config, pool)
    run_workers(run_cells, config, config.path, config.workers)
    status(config_path, overrides)


def status(config_path: Path, overrides: Sequence[str] = ()) -> None:
    """Print how many cells are done, and what the rest takes by the time that those took."""
    config = _load(config_path, overrides)
    wanted = cells(config)
    done = [cell for cell in wanted if cell.result_file(config).exists()]
    print(f"{config.folder}: {len(done)} of {len(wanted)} runs are done")
    if done and len(done) < len(wanted):
        rest = Counter(cell.mode for cell in wanted) - Counter(cell.mode for cell in done)
        seconds = {mode: _mean_seconds(config, [cell for cell in done if cell.mode == mode]) for mode in rest}
        total = sum(count * seconds[mode] for mode, count in rest.items())
        print(f"the rest: about {total / 60 / config.workers:.0f} minutes with {config.workers} workers")
    for mode in config.modes:
        whole = [
            f"draw {draw} seed {seed}"
            for seed in range(config.seeds)
            for draw in range(config.draws)
            if all(cell in done for cell in wanted if (cell.mode, cell.draw, cell.seed) == (mode, draw, seed))
        ]
        print(f"  {mode}: all arms done in {len(whole)} of {config.draws * config.seeds}")


def report(config_path: Path, overrides: Sequence[str] = ()) -> None:
    """Write report.json, report.md and report.html into the work folder."""
    from .analysis import analyse
    from .summary import write_report

    config = _load(config_path, overrides)
    for path in write_report(config, analyse(config)):
        print(path)


def _load(config_path: Path, overrides: Sequence[str]) -> SelectionStudySection:
    return load_config(SelectionStudySection, config_path, overrides)


def _mean_seconds(config: SelectionStudySection, done: list[Cell]) -> float:
    seconds = [json.loads(cell.result_file(config).read_text())["seconds"] for cell in done]
    trained = [value for value in seconds if value > 1] or seconds
    return sum(trained) / len(trained) if trained else 0.0
