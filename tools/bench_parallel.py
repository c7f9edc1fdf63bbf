"""The engines beside torch's DistributedDataParallel: one model, one loop, one group of processes, interleaved.

    python tools/bench_parallel.py --out benchmarks/parallel_cpu.json

Every variant trains the same decoder on the same batches by the same loop; only what stands behind the engine's methods
differs. All are built once, in the same processes, and each round runs all of them in a shuffled order; the first round
is warm-up and is not counted. The unit is tokens per CPU-second: process time with all threads, summed over the ranks.
Losses of every step are compared with DistributedDataParallel's, since a fast wrong engine is no result.
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
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from harness.config import validate
from harness.model import ModelSection, build_decoder, count_parameters
from harness.optim import OptimizerSection, build_adamw
from harness.parallel import ParallelLayout, ParallelSection, build_divider, build_engine, state_parts

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_train import cpu_model

BASE = "DDP"
VARIANTS: dict[str, dict[str, Any]] = {
    "ZeRO 0": {},
    "ZeRO 1": {"zero_stage": 1},
    "ZeRO 2": {"zero_stage": 2},
    "ZeRO 3": {"zero_stage": 3},
    # With its defaults stage 3 keeps all of so small a model whole but the embedding.
    "ZeRO 3, all divided": {"zero_stage": 3, "zero": {"keep_whole_below": 0, "live_elements": 1, "reuse_distance": 0}},
    "TP 2": {"tensor": 2},
    "TP 2, sequence parallel": {"tensor": 2, "sequence_parallel": True},
}
# ladder-1.5m, but for the number of heads, which has to be even.
MODEL = {"family": "llama", "tied_head": True, "layers": 5, "hidden_size": 160, "heads": 4, "vocab_size": 4096}
SEQUENCE = 128
SEQUENCES_PER_PROCESS = 4
"""A micro-batch, of data parallelism without tensor parallelism; tensor-parallel ranks share a larger one."""
ACCUMULATION = (1, 4)
"""Micro-batches a step."""
MICRO_BATCHES = 4
"""Of a variant, an accumulation and a round."""
OPTIMIZER = OptimizerSection(learning_rate=1e-3)
CLIP = 1.0
TOLERANCE = 1e-4
"""Of a step's loss, in nats."""
NOTES = [
    "ratio_to_ddp: tokens per CPU-second over DDP's in the same round and at the same accumulation; above 1 is faster",
    "gloo's waiting threads sleep: cpu_seconds_of_a_second_waiting is what a rank spends in an all-reduce that the "
    "other ranks come to a second late. So CPU-seconds count work and copying, not waiting",
    "on 2 cores, 4 processes share cores, and at 2 other jobs of the machine may: tokens_per_second is what was seen "
    "and compares nothing; CPU-seconds remain comparable within a round",
    "a tensor-parallel rank takes the sequences of as many data-parallel ranks as share its model, so that all "
    "variants train the same tokens; the layers are narrow, so its collectives weigh more than at real widths",
    "loss_difference: the largest difference from DDP's loss at any step, in nats",
]


class TorchDdp:
    """What one would write by hand: DistributedDataParallel, fused AdamW, clip_grad_norm_."""

    def __init__(self, section: ModelSection) -> None:
        self._model = build_decoder(section, seed=1)
        self.module = DistributedDataParallel(self._model)
        matrices = [weight for weight in self._model.parameters() if weight.dim() > 1]
        vectors = [weight for weight in self._model.parameters() if weight.dim() == 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": OPTIMIZER.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=OPTIMIZER.learning_rate,
            betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
            eps=OPTIMIZER.epsilon,
            fused=True,
        )

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self.module.no_sync()

    def backward(self, loss_sum: Tensor, global_tokens: int, *, last: bool) -> None:
        (loss_sum * (dist.get_world_size() / global_tokens)).backward()

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self._model.parameters(), CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def held(self) -> dict[str, int]:
        """Bytes a rank holds: gradients are there twice, as tensors and in the buckets that are reduced."""
        size = sum(weight.nbytes for weight in self._model.parameters())
        return {"weights": size, "moments": 2 * size, "gradients": 2 * size}


class OurEngine:
    """The engine of a layout, as the Trainer builds it."""

    def __init__(self, section: ModelSection, layout: ParallelLayout) -> None:
        divide = build_divider(layout, "fp32")
        model = build_decoder(section, seed=1, tensor=layout.tensor_parallel(), divide=divide)
        sizes = {id(weight): getattr(weight, "ds_numel", weight.numel()) for weight in model.parameters()}
        self._groups: list[list[int]] = []

        def build_optimizer(masters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
            optimizer = build_adamw(OPTIMIZER, masters)
            self._groups = [[sizes[id(weight)] for weight in group["params"]] for group in optimizer.param_groups]
            return optimizer

        self._engine = build_engine(model, build_optimizer, "fp32", model.placements(), layout)
        self._layout, self.module = layout, self._engine.module
        self.backward = self._engine.backward

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def update(self) -> None:
        self._engine.clip(CLIP)
        self._engine.step(OPTIMIZER.learning_rate)

    def held(self) -> dict[str, int]:
        """Bytes a rank holds, without the buffers that `parallel.zero` sizes."""
        layout, held = self._layout, dict[str, int]()
        for part in state_parts(self._groups, "fp32", layout.section, layout.data_size, layout.data_rank):
            if part.kind != "buffers":
                held[part.kind] = held.get(part.kind, 0) + part.bytes
        return held


class Contender:
    """A variant with its place in the batch and the losses it has seen."""

    def __init__(self, engine: TorchDdp | OurEngine, data_rank: int, data_size: int) -> None:
        self.engine, self.losses = engine, list[Tensor]()
        self._data_rank, self._data_size = data_rank, data_size

    def global_losses(self) -> Tensor:
        """Of every step, over all ranks; those that share a model have the same."""
        losses = torch.stack(self.losses)
        dist.all_reduce(losses)
        return losses / (dist.get_world_size() / self._data_size)

    def train(self, accumulation: int) -> None:
        """The steps of one round, on batches that are the same for all."""
        world = dist.get_world_size()
        shape = (accumulation, self._data_size, SEQUENCES_PER_PROCESS * world // self._data_size, SEQUENCE + 1)
        for _ in range(MICRO_BATCHES // accumulation):
            # Small numbers are frequent, so that there is something to learn; a seed a step.
            generator = torch.Generator().manual_seed(len(self.losses))
            text = (torch.rand(shape, generator=generator) ** 3 * MODEL["vocab_size"]).long()[:, self._data_rank]
            global_tokens = text[..., 1:].numel() * self._data_size
            total = torch.zeros(())
            for number, part in enumerate(text, 1):
                last = number == accumulation
                with self.engine.micro_batch(last):
                    loss = self.engine.module(part[:, :-1], part[:, 1:]).loss
                    self.engine.backward(loss, global_tokens, last=last)
                total += loss.detach()
            self.engine.update()
            self.losses.append(total / global_tokens)


def waiting_cost() -> float:
    """CPU-seconds that rank 0 spends in waiting a second for the others in a collective."""
    dist.barrier()
    if dist.get_rank() > 0:
        time.sleep(1)
    start = time.process_time()
    dist.all_reduce(torch.zeros(1))
    return time.process_time() - start


Spent = dict[str, dict[int, list[list[float]]]]
"""By variant and accumulation, the CPU-seconds of all ranks and the wall seconds of each counted round."""


def work(rounds: int, result: Path) -> None:
    """One rank; the first writes what was measured."""
    section = validate(ModelSection, MODEL, "bench_parallel")
    with ExitStack() as stack:
        first = stack.enter_context(ParallelLayout(ParallelSection(device="cpu", threads=1)))
        contenders = {BASE: Contender(TorchDdp(section), first.rank, first.world_size)}
        for name, changes in VARIANTS.items():
            parallel = validate(ParallelSection, {"device": "cpu", **changes}, "bench_parallel")
            layout = stack.enter_context(ParallelLayout(parallel))
            contenders[name] = Contender(OurEngine(section, layout), layout.data_rank, layout.data_size)
        waited = waiting_cost()
        spent: Spent = {name: {accumulation: [] for accumulation in ACCUMULATION} for name in contenders}
        order = random.Random(1)  # the same on all ranks
        for number in range(1 + rounds):
            for accumulation in ACCUMULATION:
                for name in order.sample(list(contenders), len(contenders)):
                    dist.barrier()
                    cpu, wall = time.process_time(), time.perf_counter()
                    contenders[name].train(accumulation)
                    cost = torch.tensor([time.process_time() - cpu, (time.perf_counter() - wall) / first.world_size])
                    dist.all_reduce(cost)
                    if number > 0:
                        spent[name][accumulation].append(cost.tolist())
        losses = {name: contender.global_losses() for name, contender in contenders.items()}
        if first.rank == 0:
            held = {name: contender.engine.held() for name, contender in contenders.items()}
            result.write_text(json.dumps(summary(first.world_size, waited, spent, losses, held)))


def summary(world: int, waited: float, spent: Spent, losses: dict[str, Tensor], held: dict[str, Any]) -> dict[str, Any]:
    """What one number of processes gave. Raises ValueError where a variant's losses are not DDP's."""
    rows, tokens = [], MICRO_BATCHES * SEQUENCES_PER_PROCESS * world * SEQUENCE
    for name, by_accumulation in spent.items():
        difference = float((losses[name] - losses[BASE]).abs().max())
        if not difference <= TOLERANCE:
            raise ValueError(f"{name} on {world} processes: a loss differs from {BASE}'s by {difference}")
        for accumulation, rounds in by_accumulation.items():
            base = spent[BASE][accumulation]
            rows.append(
                {
                    "variant": name,
                    "accumulation": accumulation,
                    "tokens_per_cpu_second": spread(tokens / cpu for cpu, _ in rounds),
                    "ratio_to_ddp": spread(theirs / ours for (ours, _), (theirs, _) in zip(rounds, base, strict=True)),
                    "tokens_per_second": statistics.median(tokens / wall for _, wall in rounds),
                    "loss_difference": difference,
                    "bytes_held": held[name],
                }
            )
    return {
        "processes": world,
        "cpu_seconds_of_a_second_waiting": waited,
        "steps": len(losses[BASE]),
        "loss": {"first": float(losses[BASE][0]), "last": float(losses[BASE][-1])},
        "rows": rows,
    }


def spread(values: Iterable[float]) -> dict[str, Any]:
    values = list(values)
    return {"median": statistics.median(values), "range": [min(values), max(values)]}


def launch(world: int, rounds: int) -> dict[str, Any]:
    """Run `work` on so many processes; what they measured."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        command += [__file__, "--rounds", str(rounds), "--result", str(result)]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}, check=True)
        return json.loads(result.read_text())


def print_table(results: dict[str, Any]) -> None:
    print(
        f"\n{results['processes']} processes: tokens per CPU-second over {BASE}'s, median (range); state a rank holds"
    )
    by_name = {(row["variant"], row["accumulation"]): row for row in results["rows"]}
    for name in (BASE, *VARIANTS):
        cells = [f"{name:24}"]
        for accumulation in ACCUMULATION:
            row = by_name[name, accumulation]
            ratio, (low, high) = row["ratio_to_ddp"]["median"], row["ratio_to_ddp"]["range"]
            rate = row["tokens_per_cpu_second"]["median"]
            cells.append(f"x{accumulation}: {ratio:.3f} ({low:.3f}-{high:.3f}) {rate:5.0f}/s")
        cells.append(f"{sum(row['bytes_held'].values()) / 1e6:5.1f} MB, loss within {row['loss_difference']:.1e}")
        print("  ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=7)
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
    document = {
        "command": f"python tools/bench_parallel.py --rounds {arguments.rounds}",
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "threads_a_process": 1,
            "backend": "gloo",
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in packages},
        },
        "notes": NOTES,
        "settings": {
            "model": MODEL,
            "parameters": count_parameters(validate(ModelSection, MODEL, "bench_parallel")).total,
            "sequence_length": SEQUENCE,
            "sequences_a_micro_batch_and_process": SEQUENCES_PER_PROCESS,
            "precision": "fp32",
            "clip_norm": CLIP,
            "rounds": arguments.rounds,
            "micro_batches_a_round": MICRO_BATCHES,
        },
        "results": results,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
