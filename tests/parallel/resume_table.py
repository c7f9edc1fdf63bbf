"""Every layout's checkpoint resumed on every layout: the state bit for bit, and ten further steps.

    python -m tests.parallel.resume_table benchmarks/checkpoint_layouts.json      # all pairs; some 20 minutes

The tests (test_resume_layouts.py) run a few of the pairs. For each pair there is a run of 10 steps on the one layout,
from which a copy goes on for 10 steps on the other. What its ranks hold before the first of these is compared with the
checkpoint, saved once more, and compared again; the 10 steps are compared with those of runs that never stopped.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness import runs
from harness.config import plain
from tests.parallel.layout_table import SEEDS, TOLERANCE, Case, launch
from tests.parallel.layout_worker import differing_bytes, whole_tensors

COLUMNS = ("loss", "grad_norm", "validation_loss")
EXACT_COLUMNS = ("learning_rate", "tokens_seen", "target_tokens")
OF_THE_SAVE = ("saved_at", "layout", "settings")
"""What a state says about the save, and not about the run."""
BF16_SHARE = 0.2
"""In bf16, how far a change of layout may move the losses, as a share of what another seed does."""

SIZES = {  # tensor, data, stage, sequence parallel
    "tp1-dp1-zero0": (1, 1, 0, False),
    "tp1-dp2-zero1": (1, 2, 1, False),
    "tp2-dp2-zero3-sp": (2, 2, 3, True),
    "tp4-dp1-zero0": (4, 1, 0, False),
    "tp1-dp3-zero3": (1, 3, 3, False),
    "tp1-dp4-zero2": (1, 4, 2, False),
}
ONE = next(iter(SIZES))


@dataclass(frozen=True)
class Series:
    """What is the same in all runs that are compared with each other. Ragged masks, and clipping at work, in all."""

    name: str
    precision: str
    family: str
    tied: bool
    dropout: float = 0.0
    saved_step: int = 10
    steps: int = 20

    def run_name(self, layout: str) -> str:
        """Of the run that is not interrupted."""
        return f"{self.name}-{layout}"


FP32 = Series("fp32", "fp32", "llama", tied=False)
BF16 = Series("bf16", "bf16", "gpt2", tied=True)
DROPOUT = Series("fp32-dropout", "fp32", "gpt2", tied=True, dropout=0.1)
"""On the same layout only: on another the random streams are others."""


@dataclass(frozen=True)
class Pair:
    """A run that is saved on the one layout and goes on on the other."""

    series: Series
    save: str
    load: str

    @property
    def name(self) -> str:
        return f"{self.series.run_name(self.save)}-to-{self.load}"

    @property
    def same_layout(self) -> bool:
        return self.save == self.load


def world_size(layout: str) -> int:
    return SIZES[layout][0] * SIZES[layout][1]


def source_job(folder: Path, series: Series, layout: str, seed: int | None = None) -> dict[str, Any]:
    """For layout_worker.py: the run that is not interrupted; with a `seed` of its own, another one."""
    name = series.run_name(layout) if seed is None else f"{series.run_name(layout)}-seed-{seed}"
    case = Case(*SIZES[layout], series.family, series.tied)
    settings = plain(case.settings(folder, series.precision, name))
    settings["model"]["dropout"] = series.dropout
    settings["train"] |= {"steps": series.steps} | ({} if seed is None else {"seed": seed})
    settings["checkpoint"]["every_steps"] = settings["validation"]["every_steps"] = series.saved_step
    return {"settings": settings, "checked": True}


def resume_job(folder: Path, pair: Pair) -> dict[str, Any]:
    """For layout_worker.py: what goes on on the one layout from the run on the other."""
    job = source_job(folder, pair.series, pair.load)
    job["settings"]["run"]["name"] = pair.name
    return job | {"after": [str(folder / "runs" / pair.series.run_name(pair.save)), pair.series.saved_step]}


def compare_pair(folder: Path, pair: Pair) -> dict[str, Any]:
    """The differences of a pair. AssertionError where the state that is no tensor is another."""
    series, diagonal = pair.series, pair.same_layout
    names = (pair.name, series.run_name(pair.save), series.run_name(pair.load))
    ours, source, same = (runs.read(folder / "runs" / name) for name in names)
    saves = [event["step"] for event in ours.events if event["event"] == "saved"]
    assert saves == 2 * [series.saved_step, series.steps], "those of the source, and the same again"
    assert list(ours.steps) == list(range(1, series.steps + 1))
    assert state_of(source.path, series.saved_step) == state_of(ours.path, series.saved_step)
    final, expected = (state_of(run.path, series.steps) for run in (ours, same))
    assert final["callbacks"]["checked"]["steps"] == list(ours.steps)
    if not diagonal:  # losses and norms, which are compared below
        for state in (final, expected):
            del state["faults"], state["validation_loss"]
    assert final == expected
    for column in EXACT_COLUMNS:
        assert (ours.column(column) == source.column(column)).all(), column

    saved, again = (whole_tensors(run.path, series.saved_step) for run in (source, ours))
    result: dict[str, Any] = {"tensors": len(saved), "differing_bytes": differing_bytes_of(saved, again)}
    further = slice(series.saved_step, None)
    for column in COLUMNS:
        series_of = [run.column(column)[further] for run in (ours, source, same)]
        result[column] = max(relative_difference(series_of[0], other) for other in series_of[1:])
    losses = [run.column("loss")[further] for run in (ours, source, same)]
    result["mean_loss"] = max(float(np.abs(losses[0] - other).mean()) for other in losses[1:])
    if diagonal:
        last, expected_last = (whole_tensors(run.path, series.steps) for run in (ours, same))
        result["differing_bytes_at_the_end"] = differing_bytes_of(last, expected_last)
    return result


def differing_bytes_of(one: dict[str, Tensor], other: dict[str, Tensor]) -> int:
    assert one.keys() == other.keys()
    return sum(differing_bytes(one[key], other[key]) for key in one)


def relative_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert (np.isnan(ours) == np.isnan(theirs)).all()
    return float(np.nanmax(np.abs(ours / theirs - 1)))


def state_of(run: Path, step: int) -> dict[str, Any]:
    """All of a checkpoint that is no tensor and not about the save itself."""
    state = json.loads((run / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())["state"]
    assert len(state["faults"]["losses"]) == step, "statistics of no steps prove nothing"
    assert state["stream"]["consumed_samples"] > 0
    return {key: value for key, value in state.items() if key not in OF_THE_SAVE}


def problem(pair: Pair, row: dict[str, Any], two_seeds: float | None = None) -> str | None:
    """Why a pair is not as it must be; `two_seeds`: the mean difference in loss that another seed makes, in bf16."""
    if row["differing_bytes"]:
        return f"{row['differing_bytes']} bytes of the state differ"
    if pair.same_layout:
        exact = row["differing_bytes_at_the_end"] == 0 and all(row[column] == 0 for column in COLUMNS)
        return None if exact else "the further steps are not bit-exact"
    if pair.series.precision == "fp32":
        far = [column for column in COLUMNS if not row[column] <= TOLERANCE[column]]
        return f"{', '.join(far)} differ by more than the tolerance" if far else None
    assert two_seeds is not None
    return None if row["mean_loss"] <= BF16_SHARE * two_seeds else "losses differ nearly as much as another seed's"


def all_pairs() -> list[Pair]:
    crossed = [Pair(series, save, load) for series in (FP32, BF16) for save, load in product(SIZES, repeat=2)]
    return crossed + [Pair(DROPOUT, layout, layout) for layout in SIZES]


def launch_all(folder: Path, jobs: list[tuple[str, dict[str, Any]]]) -> None:
    """Run (layout, job) pairs, those of a world size together, in a fresh group of processes now and then."""
    for world in sorted({world_size(layout) for layout, _ in jobs}):
        mine = [job for layout, job in jobs if world_size(layout) == world]
        for part in range(0, len(mine), 16):
            launch(world, mine[part : part + 16], folder, timeout_seconds=3600)
            print(f"{world} processes: {min(part + 16, len(mine))} of {len(mine)} runs", flush=True)


def measure(folder: Path) -> dict[str, Any]:
    pairs = all_pairs()
    sources = dict.fromkeys((pair.series, pair.save) for pair in pairs)
    jobs = [(layout, source_job(folder, series, layout)) for series, layout in sources]
    launch_all(folder, [*jobs, (ONE, source_job(folder, BF16, ONE, seed=SEEDS[1]))])
    launch_all(folder, [(pair.load, resume_job(folder, pair)) for pair in pairs])
    one_seed, other = (folder / "runs" / f"{BF16.run_name(ONE)}{end}" for end in ("", f"-seed-{SEEDS[1]}"))
    differences = runs.read(one_seed).column("loss") - runs.read(other).column("loss")
    two_seeds = float(np.abs(differences[BF16.saved_step :]).mean())
    rows, problems = [], []
    for pair in pairs:
        row = compare_pair(folder, pair)
        said = problem(pair, row, two_seeds)
        problems += [f"{pair.name}: {said}"] if said else []
        numbers = {key: value if isinstance(value, int) else float(f"{value:.2e}") for key, value in row.items()}
        rows.append({"series": pair.series.name, "save": pair.save, "load": pair.load, **numbers})
    return {
        "series": [asdict(series) for series in (FP32, BF16, DROPOUT)],
        "worst": worst(rows),
        "bf16_mean_loss_of_two_seeds": float(f"{two_seeds:.2e}"),
        "problems": problems,
        "pairs": rows,
    }


def worst(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The largest figures: on the same layout, and across in each precision."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        name = "same layout" if row["save"] == row["load"] else f"across, {row['series']}"
        groups.setdefault(name, []).append(row)
    about = ("series", "save", "load", "tensors")
    return {
        name: {key: max(row[key] for row in group) for key in group[0] if key not in about}
        for name, group in groups.items()
    }


def main() -> None:
    import deepspeed
    import megatron.core

    target = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Path(folder))
    report = {
        "what": f"runs of {FP32.steps} steps, saved after {FP32.saved_step} on one layout (`save`), which go on from "
        "there on another (`load`). differing_bytes: of all tensors, between the checkpoint and what the loading "
        "layout saves before its first step; loss, grad_norm, validation_loss: the largest relative difference of the "
        "further steps from the uninterrupted runs of both layouts; mean_loss: the mean difference in loss, nats; "
        "differing_bytes_at_the_end: on the same layout, after all steps. The state that is no tensor is the same in "
        "every pair, or there is no report",
        "command": "python -m tests.parallel.resume_table benchmarks/checkpoint_layouts.json",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
            "megatron-core": megatron.core.__version__,
        },
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, gloo",
        "tolerance": {column: TOLERANCE[column] for column in COLUMNS} | {"bf16_share_of_two_seeds": BF16_SHARE},
        **measured,
    }
    target.write_text(json.dumps(report, indent=1) + "\n")
    assert not measured["problems"], measured["problems"]


if __name__ == "__main__":
    main()
