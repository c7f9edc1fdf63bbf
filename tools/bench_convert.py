"""Peak memory and speed of `harness convert`, at a model's true shape.

    python tools/bench_convert.py --shape gpt2-1.5b --folder /somewhere/with/room --out benchmarks/convert.json

Random weights of the shape are written as a checkpoint, a tensor at a time; then each conversion runs in a process of
its own, whose peak resident memory is read when it ends: to Hugging Face, and back. Beside it `transformers` loads and
saves the same folder. The goal: at most twice the largest tensor above what the process holds when it has imported
everything, plus a constant. Before the figures are believed, the folder that came back is compared with the first, byte
for byte.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from harness.convert import ModelSource
from harness.convert.harness_run import write_run
from harness.convert.source import decoder_shapes
from harness.data import Tokenizer
from harness.model import ModelSection, count_parameters
from harness.parallel import Fragment, derive_seed

CONSTANT_MB = 192
"""Beyond twice the largest tensor: headers, JSON, blocks being read and hashed, the logits of 64 tokens."""

MEASURED = """
import json, sys, time
from pathlib import Path
from harness.convert import convert
from harness.convert.proof import TOKENS
from transformers import AutoModelForCausalLM
import torch
def resident(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
before, started, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
what, source, target, proof = sys.argv[1:]
result = {}
if what == "transformers":
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.save_pretrained(target)
else:
    done = convert(Path(source), Path(target), to=what, proof=None if proof == "none" else proof)
    result["proof"] = done.record["proof"]
result |= {"imported_bytes": before, "peak_bytes": resident("VmHWM"),
           "seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
print(json.dumps(result))
"""


class RandomSource(ModelSource):
    """Weights that are drawn when they are asked for."""

    format = "random"
    path = Path("random")

    def __init__(self, section: ModelSection) -> None:
        self.section = section

    def read(self, fragments: Sequence[Fragment]) -> None:
        for fragment in fragments:
            generator = torch.Generator().manual_seed(derive_seed(1, "weights", fragment.name))
            assert fragment.tensor.shape == fragment.global_shape
            fragment.tensor.normal_(std=0.02, generator=generator)

    @property
    def tokenizer(self) -> Tokenizer | None:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="gpt2-1.5b")
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder with room for four copies")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peer", action="store_true", help="also transformers, which holds the whole model")
    options = parser.parse_args()
    section = ModelSection(shape=options.shape, vocab_size=options.vocab)  # type: ignore[call-arg]
    options.folder.mkdir(parents=True, exist_ok=True)
    run, exported, back = (options.folder / name for name in ("run", "exported", "back"))
    run.mkdir()
    write_run(run, RandomSource(section), torch.float32)

    largest = 4 * max(map(prod, decoder_shapes(section).values()))
    rows = {"to Hugging Face": measure("huggingface", run, exported, "streamed")}
    rows["from Hugging Face"] = measure("harness", exported, back, "streamed")
    rows["to Hugging Face, no proof"] = measure("huggingface", back, options.folder / "again", "none")
    differing = [
        name.name
        for name in sorted(exported.glob("*.safetensors"))
        if subprocess.run(["cmp", "-s", name, options.folder / "again" / name.name], check=False).returncode
    ]
    assert not differing, f"another model came back: {differing}"
    if options.peer:
        rows["transformers, load and save"] = measure("transformers", exported, options.folder / "peer", "none")
    limit = 2 * largest + CONSTANT_MB * 2**20
    for name, row in rows.items():
        row["above_imports_bytes"] = row["peak_bytes"] - row["imported_bytes"]
        row["over_largest_tensor"] = row["above_imports_bytes"] / largest
        row["within_limit"] = row["above_imports_bytes"] <= limit
        print(f"{name}: {row['above_imports_bytes'] / 2**20:,.0f} MiB above imports, {row['seconds']:.0f} s")
    result = {
        "command": f"python tools/bench_convert.py --shape {options.shape} --vocab {options.vocab} --folder FOLDER"
        + (" --peer" if options.peer else ""),
        "when": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "shape": options.shape,
        "parameters": count_parameters(section).total,
        "weights_bytes": 4 * count_parameters(section).total,
        "largest_tensor_bytes": largest,
        "limit_bytes": limit,
        "limit": f"2 x largest tensor + {CONSTANT_MB} MiB, above what the imports hold",
        "conversions": rows,
    }
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(what: str, source: Path, target: Path, proof: str) -> dict[str, Any]:
    """One conversion in a process of its own."""
    command = [sys.executable, "-c", MEASURED, what, str(source), str(target), proof]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{what}: {done.stderr}")
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return values


if __name__ == "__main__":
    main()
