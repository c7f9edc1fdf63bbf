"""One rank's part of a checkpoint that several write and read; started by bench_checkpoint.py.

bench_checkpoint_ranks.py FOLDER ZERO_STAGE ROUNDS RESULT
"""

from __future__ import annotations

import gc
import json
import shutil
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from harness.checkpoint import CheckpointStore, Saver
from harness.config import validate
from harness.model import ModelSection, build_decoder
from harness.optim import OptimizerSection, build_adamw
from harness.parallel import Engine, ParallelLayout, ParallelSection, build_divider, build_engine

MANY_RANKS = {"family": "gpt2", "layers": 6, "hidden_size": 512, "heads": 8, "vocab_size": 16384, "max_positions": 1024}
"""27.8 M parameters."""


def measure_rank(folder: Path, stage: int, rounds: int, result: Path) -> None:
    """One rank's part of a checkpoint that several write and read; the first rank writes the largest figures."""
    with ExitStack() as stack:
        engine, layout = build(MANY_RANKS, stage, stack)
        channel = layout.channel()
        share = (layout.rank, layout.world_size)
        store = CheckpointStore(folder, *share, add_up=channel.add_up)
        owned, held = list(engine.fragments(owned=True)), list(engine.fragments())
        seen: list[dict[str, float]] = []
        saver = Saver(store)
        for _ in range(1 + rounds):
            dist.barrier()  # all have read what goes now
            if layout.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
            row: dict[str, float] = {}
            dist.barrier()
            before = resident()
            if not seen:
                saver.reserve(owned)
            saver.start(1, owned, {})
            saved = saver.wait()
            assert saved is not None
            assert saved.error is None, saved
            row |= {"stall_seconds": saved.stall_seconds, "save_seconds": saved.seconds}
            row["save_memory_bytes"] = peak_resident() - before
            dist.barrier()
            before, began = resident(), time.perf_counter()
            assert store.verify(1, share=share) == []
            row["verify_seconds"] = time.perf_counter() - began
            dist.barrier()
            began = time.perf_counter()
            store.load(1, held, verify=False)
            row["load_seconds"] = time.perf_counter() - began
            row["load_memory_bytes"] = peak_resident() - before
            seen.append(row)
        saver.close()
        files = store.manifest(1).files
        # Memory as the first time took it; times of the later ones.
        mine = {
            key: seen[0][key] if key.endswith("bytes") else statistics.median(row[key] for row in seen[1:])
            for key in seen[0]
        }
        mine["written_bytes"] = sum(fragment.tensor.nbytes for fragment in owned)
        mine["read_bytes"] = sum(fragment.tensor.nbytes for fragment in held)
        largest = torch.tensor(list(mine.values()), dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        if layout.rank == 0:
            rounded = {
                key: int(value) if key.endswith("bytes") else float(f"{value:.3g}")
                for key, value in zip(mine, largest.tolist(), strict=True)
            }
            state = sum(file.bytes for file in files.values())
            result.write_text(
                json.dumps({"zero_stage": stage, "ranks": layout.world_size, "state_bytes": state, **rounded})
            )


def resident() -> int:
    """Bytes of memory that the process has now; the peak begins again from here."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak_resident() -> int:
    return status("VmHWM")


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def build(model: dict[str, Any], stage: int, stack: ExitStack) -> tuple[Engine, ParallelLayout]:
    """Put together as the Trainer does."""
    parallel = {"device": "cpu", "zero_stage": stage, "zero": {"keep_whole_below": 0}}
    layout = stack.enter_context(ParallelLayout(validate(ParallelSection, parallel, "bench_checkpoint")))
    section = validate(ModelSection, model, "bench_checkpoint")
    decoder = build_decoder(section, seed=1, divide=build_divider(layout, "fp32"))
    engine = build_engine(
        decoder, lambda masters: build_adamw(OptimizerSection(), masters), "fp32", decoder.placements(), layout
    )
    return engine, layout


if __name__ == "__main__":
    measure_rank(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
