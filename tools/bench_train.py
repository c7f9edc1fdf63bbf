"""The loop beside a bare PyTorch loop over the same model, and beside transformers' model, in one interleaved run.

    python tools/bench_train.py --out benchmarks/train_cpu.json

All three train the same shape on the same number of tokens with the same optimizer (fused AdamW), clipping and
precision. Rounds are interleaved, because wall times on a shared machine move by more than any difference that matters;
the unit is tokens per CPU-second (process time over all threads). The first round is warm-up and is not counted. Peak
memory is each contender's own, measured in a process of its own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.cli import load_settings
from harness.model import build_decoder, flops_per_token
from harness.parallel import ParallelLayout, memory_bytes, peak_flops
from harness.runs import RunFolder
from harness.settings import Settings
from harness.train import Trainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.model.reference import reference_model

CONTENDERS = ("harness", "bare", "transformers")
Advance = Callable[[], object]


def bare_loop(
    model: nn.Module, losses: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], settings: Settings
) -> Advance:
    """What one would write by hand: one batch in memory, forward, backward, clip, step, read the loss."""
    options = settings.optimizer
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        fused=True,
    )
    shape = (settings.train.global_batch_size, settings.data.sequence_length)
    assert settings.model.vocab_size is not None
    tokens, targets = (torch.randint(settings.model.vocab_size, shape) for _ in range(2))

    def advance() -> float:
        total = 0.0
        for part, target in zip(
            tokens.split(settings.train.micro_batch_on(1)), targets.split(settings.train.micro_batch_on(1)), strict=True
        ):
            loss = losses(part, target) / tokens.numel()
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm or 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return advance


@contextmanager
def contender(name: str, settings: Settings, folder: Path) -> Iterator[Advance]:
    """A function that trains one step."""
    if name == "harness":
        with ParallelLayout(settings.parallel) as layout, RunFolder(folder / "run") as run:
            trainer = Trainer(settings, layout, run)
            yield trainer.advance
            trainer.close()
        return
    model = build_decoder(settings.model, seed=1)
    if name == "bare":
        yield bare_loop(model, lambda tokens, targets: model(tokens, targets).loss, settings)
        return
    reference = reference_model(settings.model, model).train()
    yield bare_loop(
        reference,
        lambda tokens, targets: nn.functional.cross_entropy(
            reference(tokens, use_cache=False).logits.flatten(0, 1), targets.flatten(), reduction="sum"
        ),
        settings,
    )


def measure(settings: Settings, rounds: int, steps: int) -> dict[str, list[dict[str, float]]]:
    """CPU and wall seconds of `steps` steps, for each contender and round; the order rotates."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    with (
        tempfile.TemporaryDirectory() as folder,
        contender("harness", settings, Path(folder)) as ours,
        contender("bare", settings, Path(folder)) as bare,
        contender("transformers", settings, Path(folder)) as theirs,
    ):
        advances = dict(zip(CONTENDERS, (ours, bare, theirs), strict=True))
        for number in range(rounds + 1):
            for turn in range(len(CONTENDERS)):
                name = CONTENDERS[(number + turn) % len(CONTENDERS)]
                cpu, wall = time.process_time(), time.perf_counter()
                for _ in range(steps):
                    advances[name]()
                spent = {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}
                if number > 0:
                    results[name].append(spent)
    return results


def peak_memory(arguments: argparse.Namespace, name: str) -> int:
    """The peak resident set of a process in which only this contender trains."""
    command = [sys.executable, __file__, "--memory-of", name, "--shape", arguments.shape, "--steps", "3"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(printed.split()[-1])


def report(settings: Settings, arguments: argparse.Namespace) -> dict[str, Any]:
    measured = measure(settings, arguments.rounds, arguments.steps)
    tokens = arguments.steps * settings.train.global_batch_size * settings.data.sequence_length
    peak = peak_flops(torch.device("cpu"), torch.float32)
    flops = flops_per_token(settings.model, settings.data.sequence_length)
    contenders = {}
    for name, spent in measured.items():
        rates = [tokens / each["cpu_seconds"] for each in spent]
        wall = statistics.median(tokens / each["wall_seconds"] for each in spent)
        contenders[name] = {
            "tokens_per_cpu_second": {"median": statistics.median(rates), "range": [min(rates), max(rates)]},
            "tokens_per_second": wall,
            "utilisation": wall * flops / peak.flops_per_second,
            "peak_memory_bytes": peak_memory(arguments, name),
        }
    ratios = {
        f"harness / {peer}": [
            theirs["cpu_seconds"] / ours["cpu_seconds"]
            for ours, theirs in zip(measured["harness"], measured[peer], strict=True)
        ]
        for peer in ("bare", "transformers")
    }
    return {
        "shape": arguments.shape,
        "settings": {
            "vocab_size": settings.model.vocab_size,
            "sequence_length": settings.data.sequence_length,
            "global_batch_size": settings.train.global_batch_size,
            "micro_batch_size": settings.train.micro_batch,
            "precision": settings.train.precision,
        },
        "rounds": arguments.rounds,
        "steps_a_round": arguments.steps,
        "ratio_of_tokens_per_cpu_second": {
            name: {"median": statistics.median(values), "range": [min(values), max(values)]}
            for name, values in ratios.items()
        },
        "contenders": contenders,
        "peak_flops_per_second": peak.flops_per_second,
        "peak_source": peak.source,
    }


def build_settings(shape: str) -> Settings:
    """The quickstart's data and batch, another shape; no validation, no checkpoints, no TensorBoard but the metrics."""
    family = "gpt2" if shape.startswith("gpt2") else "llama"
    model = ["model.shape=null", "model.family=gpt2", "model.layers=5", "model.hidden_size=160", "model.heads=5"]
    settings = load_settings(
        "quickstart",
        [
            *(model if shape == "gpt2-small-width" else [f"model.shape={shape}"]),
            f"model.tied_head={'true' if family == 'gpt2' else 'false'}",
            "data.sequence_length=256",
            "train.steps=1000000",
            "train.global_batch_size=8",
            "train.micro_batch_size=4",
            "schedule.kind=constant",
            "schedule.decay_steps=null",
            "validation.every_steps=null",
            "checkpoint.every_steps=null",
            "summary.baselines=false",
            "parallel.device=cpu",
        ],
    )
    return settings.resolved(settings.data.tokenizer.vocab_size)


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["ladder-1.5m", "gpt2-small-width"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps a contender and round")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory-of", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        with (
            tempfile.TemporaryDirectory() as folder,
            contender(arguments.memory_of, build_settings(arguments.shape), Path(folder)) as advance,
        ):
            for _ in range(arguments.steps):
                advance()
        print(memory_bytes(torch.device("cpu")))
        return
    results = []
    for shape in arguments.shapes:
        arguments.shape = shape
        results.append(report(build_settings(shape), arguments))
        print(json.dumps(results[-1]["ratio_of_tokens_per_cpu_second"], indent=2), flush=True)
    packages = ("torch", "transformers", "megatron-core", "numpy")
    machine = {
        "cpu": cpu_model(),
        "cores": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }
    document = {
        "command": f"python tools/bench_train.py --rounds {arguments.rounds} --steps {arguments.steps}",
        "machine": machine,
        "results": results,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
