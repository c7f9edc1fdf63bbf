"""plan, run, status, fit and report of a ladder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.config import load_config, plain
from harness.data import prepare_for_training
from harness.disk import write_whole
from harness.runs import configure_logging

from ..changes import check_settings
from ..files import locked
from ..workers import run_workers
from .config import COUNTS, LadderSection
from .grid import as_row, cells
from .runs import run_cells

CORE_FLOPS = 6e10
"""FLOP/s that one CPU core reached with models this small, in bf16."""


def plan(config_path: Path, overrides: Sequence[str] = ()) -> None:
    """Print every run with its size and what it costs. Reads no text."""
    config = _load(config_path, overrides)
    print(f"{'run':24}{'parameters':>12}{'blocks':>12}{'tokens':>14}{'steps':>8}{'batch':>7}{'rate':>10}{'FLOPs':>10}")
    total = 0.0
    for cell in cells(config):
        row = as_row(config, cell)
        total += row["flops"]
        print(
            f"{cell.name:24}{row['total']:>12,}{row['non_embedding']:>12,}{row['tokens']:>14,}{row['steps']:>8,}"
            f"{row['sequences']:>7}{row['learning_rate']:>10.2e}{row['flops']:>10.1e}"
        )
    print(f"tokens a parameter count {config.count}: {COUNTS[config.count]}; batch: sequences a step")
    print(
        f"in all {total:.2e} FLOPs, about {total / CORE_FLOPS / 3600:.1f} core-hours on a CPU ({CORE_FLOPS:.0e} FLOP/s "
        f"a core); results in {config.folder}"
    )


def run(config_path: Path, overrides: Sequence[str] = ()) -> None:
    """Do what is missing."""
    config = _load(config_path, overrides)
    configure_logging()
    config.path.mkdir(parents=True, exist_ok=True)
    check_settings(config.path, _decisive_settings(config))
    with locked(config.path / "data.lock"):  # tasks of an array start together
        prepare_for_training(config.data)
    if config.workers == 1:
        run_cells(config)
    else:
        run_workers(run_cells, config, config.path, config.workers)
    status(config_path, overrides)


def status(config_path: Path, overrides: Sequence[str] = ()) -> None:
    """Print how much is done and about how long the rest takes."""
    config = _load(config_path, overrides)
    rows = {cell.name: (cell.result(config), as_row(config, cell)["flops"]) for cell in cells(config)}
    done = [(result["seconds"], flops) for result, flops in rows.values() if result is not None]
    left = sum(flops for result, flops in rows.values() if result is None)
    print(f"{len(done)} of {len(rows)} runs are done" + (f" (part {config.part})" if config.parts > 1 else ""))
    if done and left:
        hours = left * sum(s for s, _ in done) / sum(f for _, f in done) / config.workers / 3600
        print(f"the rest takes about {hours:.1f} hours at the pace so far")


def fit(config_path: Path, overrides: Sequence[str] = ()) -> None:
    """Print the fits of what is done, and write them to fit.json in the work folder."""
    from .analysis import analyse
    from .summary import markdown

    config = _load(config_path, overrides)
    analysis = analyse(config)
    write_whole(config.path / "fit.json", (json.dumps(analysis, indent=1, allow_nan=False) + "\n").encode())
    print(markdown(config, analysis))
    print(config.path / "fit.json")


def report(config_path: Path, overrides: Sequence[str] = ()) -> None:
    """Write report.json, report.md, report.html and runs.jsonl, a row a run, into the work folder."""
    from .summary import write_report

    for path in write_report(_load(config_path, overrides)):
        print(path)


def _load(config_path: Path, overrides: Sequence[str]) -> LadderSection:
    return load_config(LadderSection, config_path, overrides)


def _decisive_settings(config: LadderSection) -> dict[str, Any]:
    """What a result comes out of; more sizes, lengths or seeds are no change, nor is who does which part."""
    free = {"folder", "workers", "part", "parts", "seeds", "sizes", "tokens_per_parameter", "data", "resamples"}
    values = {name: value for name, value in plain(config).items() if name not in free}
    data = plain(config.data)
    values |= {f"data.{name}": value for name, value in data.items() if name not in ("folder", "workers", "corpora")}
    values |= {f"data.corpora.{corpus['name']}": _text_of(corpus) for corpus in data["corpora"]}
    return values | {f"size {name}": size for name, size in config.sizes.items()}


def _text_of(corpus: dict[str, Any]) -> dict[str, Any]:
    """Not where it lies."""
    return {name: value for name, value in corpus.items() if name != "source"}
