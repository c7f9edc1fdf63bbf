"""The machine under test: the one place where a GPU and the CPU differ, so that all else can be tried without a GPU."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

POISON = 255
"""As a byte: four of them are an fp32 that is not a number, two a bf16 or fp16, all of them an integer −1."""
FLUSH_BYTES = 256 << 20
"""Written before each timed call: several times the largest L2 cache."""
HEAD_START_CYCLES = 4_000_000
"""About 2 ms for which the GPU is held before each timed call: the host gets ahead of it, as it does in training."""


class Shape(NamedTuple):
    """Tokens, vocabulary, width."""

    tokens: int
    vocab_size: int
    dim: int

    @property
    def products(self) -> int:
        """N·V·D."""
        return self.tokens * self.vocab_size * self.dim

    def __str__(self) -> str:
        return "x".join(map(str, self))


class Device:
    """The CPU, on which Triton runs in its interpreter: every check in small, times that mean nothing."""

    kind = "cpu"
    compiler = "aot_eager"
    rounds, least_rounds = 1, 1
    workspaces = 2
    least_block = 64
    shapes = (Shape(40, 60, 16), Shape(20, 70, 40))

    def __init__(self) -> None:
        self.torch = torch.device(self.kind)

    def describe(self) -> dict[str, Any]:
        """Names and versions."""
        return {
            "kind": self.kind,
            "name": platform.processor() or platform.machine(),
            "host": platform.platform(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            **{package: _version(package) for package in ("torch", "triton", "numpy")},
        }

    def synchronize(self) -> None:
        """Waits until all work is done, and raises what went wrong in it."""

    def alive(self) -> bool:
        """Whether the device still computes."""
        try:
            self.synchronize()
            return bool((torch.ones(4, device=self.torch) * 2).sum().item() == 8.0)
        except RuntimeError:
            return False

    def poison(self, size: int) -> None:
        """Leaves not-a-numbers in memory that is about to be allocated: what is not written will show."""
        kept = [torch.full((1 << power,), POISON, dtype=torch.uint8, device=self.torch) for power in range(6, 21)]
        del kept

    def flush(self) -> None:
        """Empties the caches."""

    def milliseconds(self, work: Callable[[], object]) -> float:
        """Of one call."""
        self.flush()
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)

    def host_milliseconds(self, work: Callable[[], object]) -> float:
        """Until a call returns, whatever it has left the device to do."""
        self.synchronize()
        start = time.perf_counter()
        work()
        elapsed = 1e3 * (time.perf_counter() - start)
        self.synchronize()
        return elapsed

    def peak_bytes(self, work: Callable[[], object]) -> int:
        """The most memory that is allocated during a call beyond what was before it."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work()
        return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

    def free(self) -> None:
        """Gives back memory that nothing uses."""

    def replayable(self, work: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
        """The same work on the same tensors, as often as wanted."""
        return work


class Gpu(Device):
    """The first CUDA device."""

    kind = "cuda"
    compiler = "inductor"
    rounds, least_rounds = 7, 3
    workspaces = 100
    least_block = 256
    shapes = (
        Shape(8192, 256000, 2304),
        Shape(8192, 128256, 4096),
        Shape(32768, 50304, 768),
        Shape(4096, 151936, 5120),
    )

    def __init__(self) -> None:
        super().__init__()
        self._flushed: Tensor | None = None

    def describe(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(0)
        return super().describe() | {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "driver_and_clocks": _ask_driver(),
        }

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def poison(self, size: int) -> None:
        torch.cuda.empty_cache()  # what earlier calls left behind may hold right results
        kept = [torch.empty(size, dtype=torch.uint8, device=self.torch).fill_(POISON)]
        # Tensors of at most 1 MB come from a pool of their own.
        kept += [torch.empty(1 << 19, dtype=torch.uint8, device=self.torch).fill_(POISON) for _ in range(64)]
        del kept

    def flush(self) -> None:
        if self._flushed is None:
            self._flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.torch)
        self._flushed.zero_()

    def milliseconds(self, work: Callable[[], object]) -> float:
        self.flush()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))

    def peak_bytes(self, work: Callable[[], object]) -> int:
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def free(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def replayable(self, work: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = work()

        def replay() -> list[Tensor]:
            graph.replay()
            return results

        return replay


def pick(kind: str) -> Device:
    """The device of this kind. Raises RuntimeError where there is none."""
    if kind == "cpu":
        return Device()
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU here; --device cpu runs everything in small in Triton's interpreter")
    return Gpu()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ask_driver() -> str | None:
    """Driver, clocks and what draws power, as nvidia-smi says; only reads."""
    if shutil.which("nvidia-smi") is None:
        return None
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,ecc.mode.current"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"
