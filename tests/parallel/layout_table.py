"""Every layout of at most four processes beside one rank: the losses, norms and weights of 20 steps.

    python -m tests.parallel.layout_table benchmarks/parallel_layouts.json      # all of them; more than half an hour

The tests (test_layouts.py) run `pairwise_cover` of the same table.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness import runs
from harness.config import plain
from harness.settings import Settings
from harness.train import train
from tests.parallel.layout_worker import whole_tensors
from tests.small_run import small_settings

STEPS = 20
SEEDS = (1234, 4321)
TOLERANCE = {"loss": 1e-5, "grad_norm": 1e-5, "validation_loss": 1e-5, "target_tokens": 0.0, "weights": 1e-4}
ROOT = Path(__file__).parents[2]

# 24 heads and 12 key-value heads, so that 2, 3 and 4 ranks divide them. 257 tokens in 384 rows: of 3 ranks the last has
# one real row, of 4 none.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "heads": 24, "kv_heads": 12, "qk_norm": True, "logit_softcap": 20.0},
    "gpt2": {"family": "gpt2", "heads": 12},
}
SIZE = {"layers": 2, "hidden_size": 48, "head_size": 4, "mlp_size": 96, "max_positions": 24}
# Nothing is kept whole and nothing stays gathered: the defaults would leave a model of this size undivided.
EVERYTHING_DIVIDED = {"keep_whole_below": 0, "live_elements": 1, "reuse_distance": 0, "prefetch_elements": 0}
MICRO_BATCH = {1: 4, 2: 2, 3: 2, 4: 1}
"""By data-parallel size, of the 12 sequences of a step: 3, 3, 2 and 3 micro-batches on each rank."""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    tensor: int
    data: int
    zero_stage: int
    sequence_parallel: bool
    family: str
    tied: bool

    @property
    def world_size(self) -> int:
        return self.tensor * self.data

    @property
    def reference(self) -> str:
        return f"{self.family}-{'tied' if self.tied else 'untied'}"

    def __str__(self) -> str:
        sequence = "-sp" if self.sequence_parallel else ""
        return f"{self.reference}-tp{self.tensor}-dp{self.data}-zero{self.zero_stage}{sequence}"

    def settings(self, folder: Path, precision: str = "fp32", name: str | None = None) -> Settings:
        parallel = {
            "tensor": self.tensor,
            "zero_stage": self.zero_stage,
            "sequence_parallel": self.sequence_parallel,
            "zero": EVERYTHING_DIVIDED,
        }
        return settings_of(
            folder, self.family, self.tied, name or str(self), MICRO_BATCH[self.data], precision, parallel
        )


def settings_of(
    folder: Path,
    family: str,
    tied: bool,
    name: str,
    micro_batch: int = 12,
    precision: str = "fp32",
    parallel: dict[str, Any] | None = None,
    **train_changes: Any,
) -> Settings:
    """Ragged masks, clipping at work, a loss that falls by a third."""
    return small_settings(
        folder,
        run={"name": name},
        data={"sequence_length": 24, "mask_after_end_of_text": True, "document_masking": family == "llama"},
        model={**SIZE, **FAMILIES[family], "tied_head": tied},
        loss={"z_loss": 1e-4, "label_smoothing": 0.05 if family == "gpt2" else 0.0},
        # With AdamW's usual epsilon a gradient that is zero but for rounding (a key's bias) moves its weight by the
        # whole learning rate, this way or that.
        optimizer={"learning_rate": 5e-3, "clip_norm": 0.7, "epsilon": 1e-4},
        train={
            "steps": STEPS,
            "global_batch_size": 12,
            "micro_batch_size": micro_batch,
            "precision": precision,
            **train_changes,
        },
        validation={"every_steps": 10, "samples": 10, "batch_size": 3},
        checkpoint={"every_steps": 10},
        parallel={"device": "cpu", **(parallel or {})},
    )


def all_cases() -> list[Case]:
    sizes = [(tensor, data) for tensor, data in product(range(1, 5), repeat=2) if tensor * data <= 4]
    return [
        Case(tensor, data, stage, sequence, family, tied)
        for (tensor, data), stage, sequence, family, tied in product(
            sizes, range(4), (False, True), FAMILIES, (True, False)
        )
        if (tensor > 1 or not sequence) and (tensor * data > 1 or stage > 0)
    ]


def pairwise_cover(cases: Sequence[Case]) -> list[Case]:
    """Few of the cases, and of few processes, in which every two values that occur together in one still do."""
    left = {pair for case in cases for pair in pairs(case)}
    chosen = []
    while left:
        best = max(cases, key=lambda case: (len(left & set(pairs(case))), -case.world_size))
        chosen.append(best)
        left -= set(pairs(best))
    return chosen


def pairs(case: Case) -> list[tuple[tuple[str, object], ...]]:
    return list(combinations(asdict(case).items(), 2))


WORKER = Path(__file__).with_name("layout_worker.py")


def launch(
    world_size: int,
    jobs: list[dict[str, Any]],
    folder: Path,
    timeout_seconds: float = 900,
    worker: Path = WORKER,
) -> None:
    """Run jobs (layout_worker.py) in one group of processes; AssertionError with their output where one fails."""
    file = folder / f"jobs-{world_size}-{time.monotonic_ns()}.json"
    file.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(worker), str(file)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"


def train_references(folder: Path) -> None:
    """The one-rank runs that the table compares with; also prepares the data for all."""
    for family, tied in product(FAMILIES, (True, False)):
        name = f"{family}-{'tied' if tied else 'untied'}"
        train(settings_of(folder, family, tied, name))
    for case in bf16_cases()[:2]:
        for seed in SEEDS:
            name = f"bf16-{case.reference}-seed-{seed}"
            train(settings_of(folder, case.family, case.tied, name, precision="bf16", seed=seed))


def bf16_cases() -> list[Case]:
    """Every stage at each size, the two families in turn."""
    sizes = [(1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (2, 2), (4, 1)]
    kinds = [("gpt2", False), ("llama", True)]
    return [
        Case(tensor, data, stage, tensor > 1, *kinds[(number + stage) % 2])
        for number, (tensor, data) in enumerate(sizes)
        for stage in range(4)
    ]


def compare_bf16(folder: Path, case: Case) -> tuple[float, float]:
    """The mean difference in loss from one rank with the same seed, and that between two seeds on one rank."""
    first, second = (folder / "runs" / f"bf16-{case.reference}-seed-{seed}" for seed in SEEDS)
    ours, same, other = (runs.read(run).column("loss") for run in (folder / "runs" / f"bf16-{case}", first, second))
    return float(np.abs(ours - same).mean()), float(np.abs(other - same).mean())


def compare(run: Path, reference: Path) -> dict[str, float]:
    """The largest relative difference of each series, of the final masters (in units of the reference's norm), and
    how much the reference's loss fell."""
    ours, theirs = runs.read(run), runs.read(reference)
    assert list(ours.steps) == list(theirs.steps) == list(range(1, STEPS + 1))
    result = {}
    for column in ("loss", "grad_norm", "validation_loss", "target_tokens"):
        a, b = ours.column(column), theirs.column(column)
        assert (np.isnan(a) == np.isnan(b)).all()
        result[column] = float(np.nanmax(np.abs(a / b - 1)))
    counted, expected_count = (
        json.loads((each / "summary.json").read_text())["validation_bytes"] for each in (run, reference)
    )
    assert counted == expected_count, "each rank scores its own share of the validation text"
    weights, expected = masters(run), masters(reference)
    assert weights.keys() == expected.keys()
    result["weights"] = max(
        float((weights[name] - expected[name]).norm() / expected[name].norm().clamp(min=1e-3)) for name in weights
    )
    losses = theirs.column("loss")
    result["fell_by"] = float(1 - losses[-3:].mean() / losses[:3].mean())
    return result


def masters(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """The master weights of a run's checkpoint, whole, whatever layout wrote them."""
    tensors = whole_tensors(run, step)
    return {key.removeprefix("master/"): tensor for key, tensor in tensors.items() if key.startswith("master/")}


def run_fp32(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for world_size in range(1, 5):
        cases = [case for case in all_cases() if case.world_size == world_size]
        for part in range(0, len(cases), 16):  # a fresh group of processes now and then
            chunk = cases[part : part + 16]
            launch(world_size, [{"settings": plain(case.settings(folder))} for case in chunk], folder)
            for case in chunk:
                result = compare(folder / "runs" / str(case), folder / "runs" / case.reference)
                rows.append({**asdict(case), **{key: float(f"{value:.2e}") for key, value in result.items()}})
                print(case, {key: f"{value:.1e}" for key, value in result.items()}, flush=True)
    return rows


def run_bf16(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for world_size in range(2, 5):
        cases = [case for case in bf16_cases() if case.world_size == world_size]
        jobs = [{"settings": plain(case.settings(folder, "bf16", f"bf16-{case}"))} for case in cases]
        launch(world_size, jobs, folder)
        for case in cases:
            ours, seeds = compare_bf16(folder, case)
            rows.append({**asdict(case), "loss": float(f"{ours:.2e}"), "two_seeds": float(f"{seeds:.2e}")})
            print("bf16", case, f"{ours:.1e} beside {seeds:.1e} of two seeds", flush=True)
    return rows


def main() -> None:
    """`layout_table.py FILE [fp32 | bf16]`: both, or one part, the other staying as it is in the file."""
    import deepspeed
    import megatron.core

    target, parts = Path(sys.argv[1]), sys.argv[2:] or ["fp32", "bf16"]
    report: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    report |= {
        "what": f"layouts beside one rank, {STEPS} steps; fp32: largest relative differences; bf16: mean difference in "
        "loss from one rank, beside that between two seeds on one rank",
        "command": "python -m tests.parallel.layout_table benchmarks/parallel_layouts.json",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
            "megatron-core": megatron.core.__version__,
        },
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, gloo",
        "tolerance": TOLERANCE,
    }
    with tempfile.TemporaryDirectory() as place:
        train_references(Path(place))
        for part in parts:
            report[part] = {"fp32": run_fp32, "bf16": run_bf16}[part](Path(place))
    rows = report["fp32"]
    report["worst"] = worst = {key: max(row[key] for row in rows) for key in TOLERANCE}
    target.write_text(json.dumps(report, indent=1) + "\n")
    assert len(rows) == len(all_cases())
    assert all(worst[key] <= TOLERANCE[key] for key in worst), worst
    assert min(row["fell_by"] for row in rows) >= 0.1
    assert all(row["loss"] < row["two_seeds"] for row in report["bf16"])


if __name__ == "__main__":
    main()
