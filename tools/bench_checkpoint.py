"""Checkpoints beside a copy in memory, the disk itself, torch.save and DeepSpeed's own, in one interleaved run.

    python tools/bench_checkpoint.py --out benchmarks/checkpoint_cpu.json --folder FOLDER_ON_THE_DISK

All of them save and load one state: that of one engine (ZeRO 1, on one rank), fp32 masters and two moments. In each
round every contender has its turn, in an order that rotates; the first round is warm-up, in which what was loaded is
compared with what was saved, and is not counted. Then several ranks share a smaller state: what each of them holds,
writes and reads.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from bench_checkpoint_ranks import MANY_RANKS, build
from torch import Tensor

from harness.checkpoint import CheckpointStore, Saver
from harness.config import validate
from harness.model import ModelSection, count_parameters
from harness.parallel import Engine

ONE_RANK = {"family": "gpt2", "layers": 12, "hidden_size": 768, "heads": 12, "vocab_size": 16384, "max_positions": 1024}
"""98.4 M parameters, a state of 1.2 GB."""
RANKS, STAGES = (1, 2, 4), (1, 3)
PIECE_BYTES = 8 << 20
STALLS_A_ROUND = 3
NOTES = [
    "stall: from the call for the fragments to the return of Saver.start, after Saver.reserve and with no save going "
    "on; beside it one copy of as many bytes into memory that is there already, as one tensor (flat_copy: the bound is "
    "1.5 times this) and tensor by tensor (tensor_copy)",
    "save: to files that are new, and flushed to the disk when the clock stops. harness hashes what it writes, flushes "
    "folders and commits by a rename. DeepSpeed does not flush what it writes: that is done after it, and "
    "seconds_before_flush is what its own call took. It writes the weights beside the masters, in fp32 too: so more",
    "load: into the state itself. harness reads every file twice, to verify it first; 'harness, unverified' once, as "
    "the trainer does after its ranks have verified each a share. torch.load reads into fresh memory, or maps the "
    "file, and its tensors are copied into the state; nothing is verified. cold: the files' pages were dropped from "
    "the page cache (posix_fadvise); what the host of a virtual machine keeps is not in our hands",
    "speed_beside_disk: bytes a second over those of the raw disk in the same round; 1 is as fast. The disk: the same "
    "bytes in pieces of 8 MB, written and flushed, or read into one buffer",
    "several_ranks: gloo processes on one machine, one thread each; every figure is the largest over the ranks. "
    "memory_bytes: by how much saving (the copy included) and loading (verification included) raise the resident set "
    "of the process; read_bytes: of the fragments that a rank loads, beside which it verifies its share of the files",
]

Seconds = dict[str, float]


class Files:
    """Where a contender saves; nothing of an earlier save is there when the next begins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def all(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_file()]

    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.all())

    def flush(self) -> None:
        for path in self.all():
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def forget(self) -> None:
        """Drop the files from the page cache."""
        self.flush()
        for path in self.all():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class State:
    """One engine's state, and the ways to save and load it."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine = engine
        views = self.views()
        for key, view in views.items():
            if not key.startswith("step/"):
                view.copy_(torch.randn(view.shape))
        self.size = sum(view.nbytes for view in views.values())
        self.flat = torch.cat([view.reshape(-1) for view in views.values()])
        self.files = {name: Files(folder / name) for name in ("disk", "harness", "torch.save", "DeepSpeed")}
        self.store = CheckpointStore(self.files["harness"].folder)
        self._piece = memoryview(bytearray(PIECE_BYTES))

    def views(self) -> dict[str, Tensor]:
        """DeepSpeed's loading puts other tensors in the place of the moments: to be asked for every time."""
        return {fragment.key: fragment.tensor for fragment in self.engine.fragments(owned=True)}

    def is_right(self) -> bool:
        return torch.equal(torch.cat([view.reshape(-1) for view in self.views().values()]), self.flat)

    # Saving: each returns the seconds until its own call was over, where that is before all was flushed.

    def write_raw(self) -> None:
        data = memoryview(self.flat.numpy()).cast("B")
        with (self.files["disk"].folder / "raw").open("xb", buffering=0) as file:
            for start in range(0, len(data), PIECE_BYTES):
                file.write(data[start : start + PIECE_BYTES])
            os.fsync(file.fileno())

    def save(self) -> None:
        self.store.save(1, self.engine.fragments(owned=True), {})

    def torch_save(self) -> None:
        with (self.files["torch.save"].folder / "state.pt").open("xb") as file:
            torch.save(self.views(), file)
            file.flush()
            os.fsync(file.fileno())

    def deepspeed_save(self) -> float:
        began = time.perf_counter()
        self.engine.module.save_checkpoint(str(self.files["DeepSpeed"].folder), tag="state")  # type: ignore[operator]
        seconds = time.perf_counter() - began
        self.files["DeepSpeed"].flush()
        return seconds

    # Loading

    def read_raw(self) -> None:
        with (self.files["disk"].folder / "raw").open("rb", buffering=0) as file:
            while file.readinto(self._piece):
                pass

    def load(self, *, verify: bool) -> None:
        self.store.load(1, self.engine.fragments(), verify=verify)

    def torch_load(self, *, mapped: bool) -> None:
        loaded = torch.load(self.files["torch.save"].folder / "state.pt", weights_only=True, mmap=mapped)
        for key, view in self.views().items():
            view.copy_(loaded[key])

    def deepspeed_load(self) -> None:
        self.engine.module.load_checkpoint(str(self.files["DeepSpeed"].folder), tag="state")  # type: ignore[operator]


@contextmanager
def clock(into: list[Seconds]) -> Iterator[Seconds]:
    """Add the wall and CPU-seconds (of all threads) of what is within."""
    spent: Seconds = {}
    cpu, wall = time.process_time(), time.perf_counter()
    yield spent
    spent |= {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    into.append(spent)


def in_turn(number: int, contenders: Iterable[Any]) -> list[Any]:
    """The contenders in an order that rotates with the round."""
    items = list(contenders)
    return items[number % len(items) :] + items[: number % len(items)]


def measure_stalls(state: State, rounds: int) -> dict[str, list[Seconds]]:
    target = torch.zeros_like(state.flat)
    parts, place = {}, 0
    for key, view in state.views().items():
        parts[key] = target[place : place + view.numel()].view(view.shape)
        place += view.numel()

    def copy_tensors() -> None:
        for key, view in state.views().items():
            parts[key].copy_(view)

    results: dict[str, list[Seconds]] = defaultdict(list)
    saver = Saver(state.store)
    saver.reserve(state.engine.fragments(owned=True))
    contenders: dict[str, Callable[[], Any]] = {
        "stall": lambda: saver.start(1, state.engine.fragments(owned=True), {}),
        "flat_copy": lambda: target.copy_(state.flat),
        "tensor_copy": copy_tensors,
    }
    for number in range(-1, rounds * STALLS_A_ROUND):
        for name in in_turn(number, contenders):
            with clock(results[name] if number >= 0 else []):
                contenders[name]()
            saved = saver.wait()  # outside of the clock: only a copy is beside a copy
            assert saved is None or saved.error is None, saved
    saver.close()
    return results


def measure_saves(state: State, rounds: int) -> tuple[dict[str, list[Seconds]], dict[str, int]]:
    contenders = {
        "disk": state.write_raw,
        "harness": state.save,
        "torch.save": state.torch_save,
        "DeepSpeed": state.deepspeed_save,
    }
    results: dict[str, list[Seconds]] = defaultdict(list)
    for number in range(-1, rounds):
        for name in in_turn(number, contenders):
            state.files[name].clear()
            os.sync()
            with clock(results[name] if number >= 0 else []) as spent:
                before_flush = contenders[name]()
            if before_flush is not None:
                spent["seconds_before_flush"] = before_flush
    return results, {name: files.bytes() for name, files in state.files.items()}


def measure_loads(state: State, rounds: int) -> tuple[dict[str, dict[str, list[Seconds]]], dict[str, int]]:
    """Cold and warm, of the files that the last round of saving left."""
    contenders: dict[str, tuple[str, Callable[[], None]]] = {
        "disk": ("disk", state.read_raw),
        "harness": ("harness", lambda: state.load(verify=True)),
        "harness, unverified": ("harness", lambda: state.load(verify=False)),
        "torch.load": ("torch.save", lambda: state.torch_load(mapped=False)),
        "torch.load, mapped": ("torch.save", lambda: state.torch_load(mapped=True)),
        "DeepSpeed": ("DeepSpeed", state.deepspeed_load),
    }
    results: dict[str, dict[str, list[Seconds]]] = {"cold": defaultdict(list), "warm": defaultdict(list)}
    for number in range(-1, rounds):
        for name in in_turn(number, contenders):
            files, load = contenders[name]
            state.files[files].forget()
            for cache in ("cold", "warm"):
                if number < 0:
                    for view in state.views().values():
                        view.zero_()
                with clock(results[cache][name] if number >= 0 else []):
                    load()
                if number < 0 and name != "disk" and not state.is_right():
                    raise ValueError(f"{name}: what was loaded is not what was saved")
    return results, {name: state.files[files].bytes() for name, (files, _) in contenders.items()}


def spread(values: Iterable[float]) -> dict[str, Any]:
    ordered = [float(f"{value:.4g}") for value in sorted(values)]
    return {"median": statistics.median(ordered), "range": [ordered[0], ordered[-1]]}


def table(results: dict[str, list[Seconds]], sizes: dict[str, int]) -> dict[str, Any]:
    """By contender; the raw disk is one of them."""
    rows = {}
    for name, rounds in results.items():
        rates = [sizes[name] / spent["seconds"] for spent in rounds]
        disk = [sizes["disk"] / spent["seconds"] for spent in results["disk"]]
        rows[name] = {
            "bytes": sizes[name],
            "megabytes_per_second": spread(rate / 1e6 for rate in rates),
            "speed_beside_disk": spread(rate / raw for rate, raw in zip(rates, disk, strict=True)),
            **{unit: spread(spent[unit] for spent in rounds) for unit in rounds[0]},
        }
    return rows


def measure_one_rank(folder: Path, rounds: int) -> dict[str, Any]:
    with ExitStack() as stack:
        engine, _ = build(ONE_RANK, 1, stack)
        state = State(engine, folder)
        stalls = measure_stalls(state, rounds)
        saves, saved_bytes = measure_saves(state, rounds)
        loads, loaded_bytes = measure_loads(state, rounds)
        by_copy = {
            name: spread(
                stall["seconds"] / copy["seconds"] for stall, copy in zip(stalls["stall"], stalls[name], strict=True)
            )
            for name in ("flat_copy", "tensor_copy")
        }
        return {
            "state_bytes": state.size,
            "stall": {
                "ratio_to": by_copy,
                **{
                    name: {unit: spread(each[unit] for each in spent) for unit in spent[0]}
                    for name, spent in stalls.items()
                },
            },
            "save": table(saves, saved_bytes),
            **{f"load, {cache}": table(results, loaded_bytes) for cache, results in loads.items()},
        }


def launch(ranks: int, stage: int, folder: Path, rounds: int) -> dict[str, Any]:
    """What measure_rank finds on so many ranks."""
    result = folder / "ranks.json"
    worker = [str(Path(__file__).with_name("bench_checkpoint_ranks.py")), str(folder / "ranks")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *worker]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    subprocess.run([*command, str(stage), str(rounds), str(result)], env=environment, check=True)
    return json.loads(result.read_text())  # type: ignore[no-any-return]


def print_tables(measured: dict[str, Any]) -> None:
    for name, ratio in measured["stall"]["ratio_to"].items():
        print(f"stall over {name}: {ratio['median']:.2f} ({ratio['range'][0]:.2f}-{ratio['range'][1]:.2f})")
    for what in ("save", "load, cold", "load, warm"):
        print(what)
        for name, row in measured[what].items():
            ratio, rate = row["speed_beside_disk"], row["megabytes_per_second"]["median"]
            print(
                f"  {name:20} {ratio['median']:.2f} of the disk's ({ratio['range'][0]:.2f}-{ratio['range'][1]:.2f})"
                f"  {rate:6.0f} MB/s  {row['seconds']['median']:.2f} s  {row['cpu_seconds']['median']:.2f} CPU-s"
            )


def machine() -> dict[str, Any]:
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    packages = ("torch", "deepspeed", "safetensors", "numpy")
    return {
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; 7 GB are needed. Default: a temporary one")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        one_rank = measure_one_rank(folder, arguments.rounds)
        print_tables(one_rank)
        several = []
        for stage in STAGES:
            for ranks in RANKS:
                several.append(launch(ranks, stage, folder, arguments.rounds))
                print(several[-1], flush=True)
        filesystem = subprocess.run(["df", "--output=fstype", name], capture_output=True, text=True, check=True).stdout
    parameters = [count_parameters(validate(ModelSection, model, "")).total for model in (ONE_RANK, MANY_RANKS)]
    document = {
        "command": f"python tools/bench_checkpoint.py --rounds {arguments.rounds}",
        "machine": machine() | {"filesystem": filesystem.split()[-1]},
        "load_average_before": round(load, 1),
        "rounds": arguments.rounds,
        "notes": NOTES,
        "one_rank": {"model": ONE_RANK, "parameters": parameters[0], **one_rank},
        "several_ranks": {"model": MANY_RANKS, "parameters": parameters[1], "rows": several},
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
