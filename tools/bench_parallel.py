"""The engines beside torch's DistributedDataParallel: one model, one loop, one group of processes, interleaved.

    python tools/bench_parallel.py --out benchmarks/parallel_cpu.json

Every variant trains the same decoder on the same batches by the same loop; only what stands behind the engine's methods
differs. All are built once, in the same processes, and each round runs all of them in a shuffled order; the first round
is warm-up and is not counted. The unit is tokens per CPU-second: process time with all threads, summed over the ranks.
A variant whose losses or gradient norms differ from DistributedDataParallel's is an error: fast and wrong is no result.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from harness.config import validate
from harness.model import ModelSection, build_decoder, count_parameters
from harness.optim import OptimizerSection, build_adamw
from harness.parallel import ParallelLayout, ParallelSection, build_divider, build_engine, state_parts

BASE, AGAIN = "DDP", "DDP again"
ENGINES: dict[str, dict[str, Any]] = {
    "ZeRO 0": {},
    "ZeRO 1": {"zero_stage": 1},
    "ZeRO 2": {"zero_stage": 2},
    "ZeRO 3": {"zero_stage": 3},
    "ZeRO 3, all divided": {"zero_stage": 3, "zero": {"keep_whole_below": 0, "live_elements": 1, "reuse_distance": 0}},
    "TP 2": {"tensor": 2},
    "TP 2, sequence parallel": {"tensor": 2, "sequence_parallel": True},
}
# ladder-1.5m, but for the number of heads, which 2 has to divide.
MODEL: dict[str, Any] = {
    "family": "llama",
    "tied_head": True,
    "layers": 5,
    "hidden_size": 160,
    "heads": 4,
    "vocab_size": 4096,
}
# So that rounding stays small and variants comparable. With AdamW's usual epsilon a gradient that is zero but for
# rounding moves its weight by the whole learning rate; and at 1e-3 some steps make 1e-3 in the gradient's norm out of
# 1e-7 in the weights, on one rank too.
OPTIMIZER, CLIP = OptimizerSection(learning_rate=3e-4, epsilon=1e-4), 1.0
SEQUENCE, SEQUENCES = 128, 4
"""Tokens of a sequence, and sequences of a micro-batch for each process."""
ACCUMULATIONS, MICRO_BATCHES = (1, 4), 4
"""Micro-batches a step, and of a variant in a round at each accumulation."""
TOLERANCES = {"loss": 1e-5, "grad_norm": 1e-4}
"""Of any step's loss, in nats, and relative of its gradient norm, which tells of a wrong scale as AdamW would not."""
LINEAR = F.linear
NOTES = [
    "ratio_to_ddp: tokens per CPU-second over DDP's in the same round at the same accumulation; above 1 is faster. DDP "
    "is there twice: a round's cost is the mean of both, and what they differ from 1 by is noise",
    "a rank that waits in gloo sleeps: cpu_seconds_of_waiting_a_second is what it spends in an all-reduce to which the "
    "others come a second late. So CPU-seconds count computing and copying, not waiting, nor what overlapping hides",
    "4 processes share 2 cores, and other jobs of the machine may use them too: tokens_per_second is what was seen and "
    "compares nothing; CPU-seconds remain comparable within a round",
    "the model is small: what an engine spends for each step and each module weighs more than at real widths, and with "
    "its defaults stage 3 keeps all of it whole but the embedding",
    "tensor-parallel ranks compute the sequences of all ranks that share their model, so all variants train the same",
    "largest_difference: from DDP's loss (nats) and gradient norm (relative), over all steps. DDP's norm is summed in "
    "float64, as stage 0's and DeepSpeed's are: torch's own on the CPU, in fp32, is inaccurate",
    "bytes_held: by kind, on the first rank, without activations and without the buffers that parallel.zero sizes; DDP "
    "has its gradients twice, as tensors and in its buckets",
]


@dataclass
class Variant:
    """A model with what stands behind the loop's three calls, and what it has seen."""

    layout: ParallelLayout
    module: nn.Module
    backward: Callable[[Tensor, int, bool], None]
    update: Callable[[], Tensor]
    """Clip, step, clear the gradient; its norm before clipping."""
    bytes_held: dict[str, int]
    unreduced: Callable[[], AbstractContextManager[None]] = nullcontext
    """Around the micro-batches of a step but the last."""
    seen: list[Tensor] = field(default_factory=list)
    """Of each step this rank's share of the loss, and the gradient's norm."""

    def __post_init__(self) -> None:
        # Stage 3 leaves its own linear function in torch, for the whole process: it is to slow down stage 3 alone.
        self._linear, F.linear = F.linear, LINEAR

    def train(self, accumulation: int) -> None:
        """The steps of one round."""
        with mock.patch.object(F, "linear", self._linear):
            for _ in range(MICRO_BATCHES // accumulation):
                self.seen.append(self._step(accumulation))

    def _step(self, accumulation: int) -> Tensor:
        shape = (accumulation, self.layout.data_size, SEQUENCES * self.layout.tensor_size, SEQUENCE + 1)
        # The same for all variants, by the step's number; small numbers are frequent, so that there is much to learn.
        uniform = torch.rand(shape, generator=torch.Generator().manual_seed(len(self.seen)))
        text = (uniform**3 * MODEL["vocab_size"]).long()
        tokens, loss_sum = text[..., 1:].numel(), torch.zeros(())
        for number, part in enumerate(text[:, self.layout.data_rank], 1):
            last = number == accumulation
            with nullcontext() if last else self.unreduced():
                loss = self.module(part[:, :-1], part[:, 1:]).loss
                self.backward(loss, tokens, last)
            loss_sum += loss.detach()
        return torch.stack([loss_sum / tokens, self.update()])

    def losses_and_norms(self) -> Tensor:
        """(2, steps), over all ranks."""
        losses, norms = torch.stack(self.seen, 1)
        return torch.stack([self.layout.sum_over_data(losses.contiguous()), norms])


def torch_ddp(section: ModelSection, layout: ParallelLayout) -> Variant:
    """What one would write by hand: DistributedDataParallel, torch's fused AdamW, clipping by the norm."""
    model = build_decoder(section, seed=1)
    wrapped = DistributedDataParallel(model)
    optimizer = build_adamw(OPTIMIZER, dict(model.named_parameters()))

    def backward(loss_sum: Tensor, tokens: int, last: bool) -> None:
        (loss_sum * (layout.data_size / tokens)).backward()

    def update() -> Tensor:
        # clip_grad_norm_, but for float64: torch's fp32 norm on the CPU is off by 0.3 % at this many gradients.
        norms = [torch.linalg.vector_norm(weight.grad, dtype=torch.float64) for weight in model.parameters()]
        norm = torch.linalg.vector_norm(torch.stack(norms)).float()
        nn.utils.clip_grads_with_norm_(model.parameters(), CLIP, norm)
        optimizer.step()
        optimizer.zero_grad()
        return norm

    size = sum(weight.nbytes for weight in model.parameters())
    held = {"weights": size, "moments": 2 * size, "gradients": 2 * size}
    return Variant(layout, wrapped, backward, update, held, wrapped.no_sync)


def ours(section: ModelSection, layout: ParallelLayout) -> Variant:
    """The engine of a layout, put together as the Trainer does."""
    model = build_decoder(section, seed=1, tensor=layout.tensor_parallel(), divide=build_divider(layout, "fp32"))
    groups: list[list[int]] = []

    def build_optimizer(masters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = build_adamw(OPTIMIZER, masters)
        for group in optimizer.param_groups:  # ds_numel: what stage 3 has divided looks empty
            groups.append([getattr(weight, "ds_numel", weight.numel()) for weight in group["params"]])
        return optimizer

    engine = build_engine(model, build_optimizer, "fp32", model.placements(), layout)

    def backward(loss_sum: Tensor, tokens: int, last: bool) -> None:
        engine.backward(loss_sum, tokens, last=last)

    def update() -> Tensor:
        norm = engine.grad_norm()
        engine.clip(CLIP)
        engine.step(OPTIMIZER.learning_rate)
        return norm

    held: dict[str, int] = {}
    for part in state_parts(groups, "fp32", layout.section, layout.data_size, layout.data_rank):
        if part.kind != "buffers":
            held[part.kind] = held.get(part.kind, 0) + part.bytes
    return Variant(layout, engine.module, backward, update, held)


Spent = dict[str, dict[int, list[list[float]]]]
"""By variant and accumulation, for each counted round: the ranks' CPU-seconds together, and wall seconds."""


def work(rounds: int, result: Path) -> None:
    """One rank's part; the first writes what was measured."""
    section = validate(ModelSection, MODEL, "bench_parallel")
    with ExitStack() as stack:
        first = stack.enter_context(ParallelLayout(ParallelSection(device="cpu", threads=1)))
        variants = {name: torch_ddp(section, first) for name in (BASE, AGAIN)}
        for name, changes in ENGINES.items():
            parallel = validate(ParallelSection, {"device": "cpu", "threads": 1, **changes}, "bench_parallel")
            layout = stack.enter_context(ParallelLayout(parallel))
            variants[name] = ours(section, layout)
        waiting = cost_of_waiting()
        spent: Spent = {name: {accumulation: [] for accumulation in ACCUMULATIONS} for name in variants}
        order = random.Random(1)  # the same on all ranks
        for number in range(1 + rounds):
            for accumulation in ACCUMULATIONS:
                for name in order.sample(list(variants), len(variants)):
                    dist.barrier()
                    cpu, wall = time.process_time(), time.perf_counter()
                    variants[name].train(accumulation)
                    cost = torch.tensor([time.process_time() - cpu, (time.perf_counter() - wall) / first.world_size])
                    dist.all_reduce(cost)
                    if number > 0:
                        spent[name][accumulation].append(cost.tolist())
        seen = {name: variant.losses_and_norms() for name, variant in variants.items()}
        held = {name: variant.bytes_held for name, variant in variants.items()}
        if first.rank == 0:
            result.write_text(json.dumps(summary(first.world_size, waiting, spent, seen, held)))


def cost_of_waiting() -> float:
    """CPU-seconds that the first rank spends in a collective to which the others come a second late."""
    dist.barrier()
    if dist.get_rank() > 0:
        time.sleep(1)
    start = time.process_time()
    dist.all_reduce(torch.zeros(1))
    return time.process_time() - start


def summary(world: int, waiting: float, spent: Spent, seen: dict[str, Tensor], held: dict[str, Any]) -> Any:
    """What one number of processes gave. Raises ValueError where a variant is not right."""
    rows, tokens = [], MICRO_BATCHES * SEQUENCES * world * SEQUENCE
    for name in spent:
        differences = (seen[name] - seen[BASE]).abs() / torch.stack([torch.ones_like(seen[BASE][0]), seen[BASE][1]])
        difference = dict(zip(TOLERANCES, differences.amax(1).tolist(), strict=True))
        if not all(difference[key] <= TOLERANCES[key] for key in TOLERANCES):  # this way round for nan
            raise ValueError(f"{name} on {world} processes does not do what {BASE} does: {difference}")
        for accumulation, rounds in spent[name].items():
            row: dict[str, Any] = {"variant": name, "accumulation": accumulation, "largest_difference": difference}
            twice = zip(spent[BASE][accumulation], spent[AGAIN][accumulation], rounds, strict=True)
            row["ratio_to_ddp"] = spread((one + other) / 2 / cpu for (one, _), (other, _), (cpu, _) in twice)
            row["tokens_per_cpu_second"] = spread(tokens / cpu for cpu, _ in rounds)
            row["tokens_per_second"] = statistics.median(tokens / wall for _, wall in rounds)
            rows.append({**row, "bytes_held": held[name]})
    return {
        "processes": world,
        "cpu_seconds_of_waiting_a_second": waiting,
        "ddp_losses": seen[BASE][0].tolist(),
        "ddp_grad_norms": seen[BASE][1].tolist(),
        "rows": rows,
    }


def spread(values: Iterable[float]) -> dict[str, Any]:
    ordered = sorted(values)
    return {"median": statistics.median(ordered), "range": [ordered[0], ordered[-1]]}


def launch(world: int, rounds: int) -> Any:
    """What `work` measures on so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        command += [__file__, "--rounds", str(rounds), "--result", str(result)]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}, check=True)
        return json.loads(result.read_text())


def print_table(measured: dict[str, Any]) -> None:
    print(f"\n{measured['processes']} processes; tokens per CPU-second over {BASE}'s: median (range)", flush=True)
    for row in measured["rows"]:
        ratio, (low, high) = row["ratio_to_ddp"]["median"], row["ratio_to_ddp"]["range"]
        print(
            f"{row['variant']:24} x{row['accumulation']}  {ratio:.3f} ({low:.3f}-{high:.3f})"
            f"  {row['tokens_per_cpu_second']['median']:5.0f} tokens / CPU-second"
            f"  {sum(row['bytes_held'].values()) / 1e6:5.1f} MB  loss within {row['largest_difference']['loss']:.0e}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.result:
        work(arguments.rounds, arguments.result)
        return
    results = []
    for world in arguments.processes:
        results.append(launch(world, arguments.rounds))
        print_table(results[-1])
    packages = ("torch", "deepspeed", "megatron-core", "numpy")
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    machine = {
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "threads_a_process": 1,
        "backend": "gloo",
        "python": platform.python_version(),
    }
    document = {
        "command": f"python tools/bench_parallel.py --rounds {arguments.rounds}",
        "machine": {**machine, **{package: importlib.metadata.version(package) for package in packages}},
        "settings": {
            "model": MODEL,
            "parameters": count_parameters(validate(ModelSection, MODEL, "bench_parallel")).total,
            "sequence_length": SEQUENCE,
            "micro_batch_size": SEQUENCES,
            "micro_batches_a_round": MICRO_BATCHES,
            "precision": "fp32",
            "clip_norm": CLIP,
        },
        "rounds": arguments.rounds,
        "notes": NOTES,
        "results": results,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
