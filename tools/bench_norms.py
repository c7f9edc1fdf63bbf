"""What norms that can be switched off cost: a training step beside the same with plain ones, by state.

    python tools/bench_norms.py --out benchmarks/norms_cpu.json [--compile]

Sides, interleaved in every round: plain; real (no site removed, statistics gathered as in training: this may cost 2 %
at most); frozen (all sites); mixed (half way). Forward, loss and backward of one micro-batch; CPU-seconds of the
process on a CPU, wall seconds on a GPU. Ratios are medians over rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from harness.model import Decoder, ModelSection, SiteState, build_decoder, norm_sites

SHAPES = {
    "gpt2, 4 layers of 128": ({"family": "gpt2", "layers": 4, "hidden_size": 128, "heads": 4}, 1024, 16, 256),
    "llama, 4 layers of 128": ({"family": "llama", "layers": 4, "hidden_size": 128, "heads": 4}, 1024, 16, 256),
    "gpt2, 2 layers of 768": ({"family": "gpt2", "layers": 2, "hidden_size": 768, "heads": 12}, 4096, 2, 512),
    "llama, 2 layers of 768": ({"family": "llama", "layers": 2, "hidden_size": 768, "heads": 12}, 4096, 2, 512),
}
STATES = {"real": 0.0, "frozen": 1.0, "mixed": 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3, help="of each side in a round")
    parser.add_argument("--compile", action="store_true", help="the blocks by torch.compile")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cells = {}
    for name, shape in SHAPES.items():
        cells[name] = measure(shape, device, options)
        print(name, {side: cell["ratio"] for side, cell in cells[name].items()}, flush=True)
    result = {
        "command": f"python tools/bench_norms.py --out {options.out} --rounds {options.rounds} --steps {options.steps}"
        f" --threads {options.threads}" + (" --compile" if options.compile else ""),
        "machine": {"system": platform.platform(), "device": device_name(device)},
        "versions": {"python": platform.python_version(), "torch": version("torch"), "harness": version("harness")},
        "unit": "CPU-seconds" if device.type == "cpu" else "wall seconds",
        "goal": "real: a ratio of at most 1.02",
        "shapes": cells,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(shape: tuple[dict[str, Any], int, int, int], device: torch.device, options: Any) -> dict[str, Any]:
    """By side: median seconds of a step, and the median and range of its ratio to plain."""
    values, vocabulary, batch, sequence = shape
    section = ModelSection.model_validate({**values, "vocab_size": vocabulary, "max_positions": sequence})
    tokens = torch.randint(vocabulary, (batch, sequence), device=device)
    models = {"plain": build_decoder(section, seed=0, device=device, compile_blocks=options.compile)}
    for side, alpha in STATES.items():
        model = build_decoder(section, seed=0, device=device, compile_blocks=options.compile, switchable_norms=True)
        assert model.norm_states is not None
        model.norm_states.set({site.name: SiteState(alpha, 1.0) for site in norm_sites(section)})
        models[side] = model
    sides = {side: step_of(model.train(), tokens) for side, model in models.items()}
    for side in sides.values():
        for _ in range(2):
            side()
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(options.rounds):
        order = list(sides) if number % 2 else list(reversed(sides))
        for side in order:
            seconds[side].append(timed(sides[side], options.steps, device))
    return {
        side: {
            "seconds": round(statistics.median(values), 5),
            "ratio": round(statistics.median(ratios), 4),
            "range": [round(min(ratios), 4), round(max(ratios), 4)],
        }
        for side, values in seconds.items()
        if (ratios := [mine / plain for mine, plain in zip(values, seconds["plain"], strict=True)])
    }


def step_of(model: Decoder, tokens: torch.Tensor) -> Callable[[], None]:
    """Forward and backward as the trainer does them: statistics open for the forward pass, taken after the step."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        if model.norm_states is not None:
            model.norm_states.gather(True)
        loss = model(tokens, tokens).loss
        if model.norm_states is not None:
            model.norm_states.gather(False)
        loss.backward()
        if model.norm_states is not None:
            model.norm_states.take(lambda sums: sums)

    return step


def timed(step: Callable[[], None], steps: int, device: torch.device) -> float:
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    started = clock()
    for _ in range(steps):
        step()
    if on_gpu:
        torch.cuda.synchronize()
    return (clock() - started) / steps


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.processor() or 'CPU'}"


if __name__ == "__main__":
    main()
