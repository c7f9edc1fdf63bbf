"""plan, run, status and report of a study of tokenization."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.config import load_config, plain
from harness.runs import configure_logging

from ..changes import check_settings
from ..workers import run_workers
from .config import TokenizationStudySection
from .runs import cells, run_cells


def plan(config_path: Path, overrides: Sequence[str] = ()) -> None:
    """Print the sources with their bounds, and the runs."""
    config = _load(config_path, overrides)
    for name, section in config.sources.items():
        source = section.source()
        print(
            f"{name}: order {source.order}, {source.alphabet} symbols; unigram loss {source.unigram_loss():.4f}, "
            f"entropy rate {source.entropy_rate():.4f} nats a symbol; {config.symbols:,} symbols"
        )
    tokens = config.steps * config.sequences * config.sequence_length
    print(
        f"{len(cells(config))} runs ({len(config.sources)} sources x {len(config.tokenizers)} tokenizers x "
        f"{len(config.models)} models x {config.seeds} seeds) of {config.steps:,} steps, {tokens:,} tokens each; "
        f"results in {config.folder}"
    )


def run(config_path: Path, overrides: Sequence[str] = ()) -> None:
    """Do what is missing."""
    config = _load(config_path, overrides)
    configure_logging()
    config.path.mkdir(parents=True, exist_ok=True)
    check_settings(config.path, _decisive_settings(config))
    if config.workers == 1:
        run_cells(config)
    else:
        run_workers(run_cells, config, config.path, config.workers)
    status(config_path, overrides)


def status(config_path: Path, overrides: Sequence[str] = ()) -> None:
    """Print how much is done and about how long the rest takes."""
    config = _load(config_path, overrides)
    found = [cell.result(config) for cell in cells(config)]
    done = [result["seconds"] for result in found if result is not None]
    print(f"{len(done)} of {len(found)} runs are done")
    if done and len(done) < len(found):
        minutes = (len(found) - len(done)) * sum(done) / len(done) / config.workers / 60
        print(f"the rest takes about {minutes:.0f} minutes")


def report(config_path: Path, overrides: Sequence[str] = ()) -> None:
    """Write report.json, report.md and report.html into the work folder."""
    from .summary import write_report

    for path in write_report(_load(config_path, overrides)):
        print(path)


def _load(config_path: Path, overrides: Sequence[str]) -> TokenizationStudySection:
    return load_config(TokenizationStudySection, config_path, overrides)


def _decisive_settings(config: TokenizationStudySection) -> dict[str, Any]:
    """What a result comes out of; more sources, tokenizers, models or seeds are no change."""
    free = {"folder", "workers", "seeds", "sources", "tokenizers", "models"}
    values = {name: value for name, value in plain(config).items() if name not in free}
    for group in ("sources", "tokenizers", "models"):
        values |= {f"{group}.{name}": plain(value) for name, value in getattr(config, group).items()}
    return values
