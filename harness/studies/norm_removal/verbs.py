"""plan, run, status and report of a study of norm removal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.config import load_config, plain
from harness.data import TokenizerSection, open_tokenizer, prepare_for_training
from harness.model import count_parameters, flops_per_token, norm_sites
from harness.runs import configure_logging

from ..changes import check_settings
from ..workers import run_workers
from .config import NormRemovalStudySection
from .grid import control_cells, removal_cells
from .runs import run_cells

CORE_FLOPS = 5e10
"""FLOP/s that one CPU core reached with models this small (7,500 tokens/s at 1.07 M parameters, fp32)."""


def plan(config_path: Path, overrides: Sequence[str] = ()) -> None:
    """Print what the study trains and about what it costs. Reads no text."""
    config = _load(config_path, overrides)
    length = config.data.sequence_length
    total = 0.0
    for family, model in config.families.items():
        section = model.model_copy(update={"vocab_size": model.vocab_size or _vocab_size(config.data.tokenizer)})
        if section.positions == "learned" and section.max_positions is None:
            section = section.model_copy(update={"max_positions": length})
        counts, flops = count_parameters(section), flops_per_token(section, length)
        tokens = config.source.steps * config.source.sequences * length
        fine = config.removal.steps * config.removal.sequences * length
        runs = config.seeds * len(config.arms)
        hours = [tokens * flops / CORE_FLOPS / 3600, runs * fine * flops / CORE_FLOPS / 3600]
        total += sum(hours)
        print(
            f"{family}: {counts.total:,} parameters, {len(norm_sites(section))} norm sites; source: {tokens:,} tokens, "
            f"{tokens / counts.total:.0f} a parameter, about {hours[0]:.1f} core-hours; {runs} fine-tunings of "
            f"{fine:,} tokens, about {hours[1]:.1f} core-hours (what rollbacks add is not counted)"
        )
    print(f"arms: {', '.join(arm.name for arm in config.arms)}; seeds: {config.seeds}")
    print(f"in all about {total:.1f} core-hours on {config.workers} workers; results in {config.folder}")


def run(config_path: Path, overrides: Sequence[str] = ()) -> None:
    """Do what is missing: sources, removals, controls."""
    config = _load(config_path, overrides)
    configure_logging()
    config.path.mkdir(parents=True, exist_ok=True)
    check_settings(config.path, _decisive_settings(config))
    prepare_for_training(config.data)
    run_workers(run_cells, config, config.path, config.workers)
    # A control becomes known when its removal is done, which may be after another process looked.
    run_cells(config)
    status(config_path, overrides)


def status(config_path: Path, overrides: Sequence[str] = ()) -> None:
    """Print how much is done."""
    config = _load(config_path, overrides)
    for family in config.families:
        done = (config.path / "sources" / family / "measured.json").exists()
        print(f"source {family}: {'done' if done else 'not done'}")
    for kind, cells in (("removals", removal_cells(config)), ("controls known so far", control_cells(config))):
        done_cells = [cell for cell in cells if cell.result_file(config).exists()]
        print(f"{kind}: {len(done_cells)} of {len(cells)} are done")


def report(config_path: Path, overrides: Sequence[str] = ()) -> None:
    """Write report.json, report.md and report.html into the work folder."""
    from .summary import write_report

    for path in write_report(_load(config_path, overrides)):
        print(path)


def _vocab_size(tokenizer: TokenizerSection) -> int:
    """Without reading a corpus."""
    return tokenizer.vocab_size if tokenizer.is_trained_here else open_tokenizer(tokenizer).vocab_size


def _load(config_path: Path, overrides: Sequence[str]) -> NormRemovalStudySection:
    return load_config(NormRemovalStudySection, config_path, overrides)


def _decisive_settings(config: NormRemovalStudySection) -> dict[str, Any]:
    """What a result comes out of; more arms, families or seeds are no change."""
    values = {name: plain(getattr(config, name)) for name in ("seed", "source", "removal", "windows")}
    data = plain(config.data)
    values |= {
        f"data.{name}": data[name] for name in ("tokenizer", "sequence_length", "document_masking", "validation_share")
    }
    values |= {f"family {name}": plain(model) for name, model in config.families.items()}
    return values | {f"arm {arm.name}": plain(arm) for arm in config.arms}
