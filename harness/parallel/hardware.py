"""What the device can do, for the utilisation column."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

# Dense tensor-core rates of the data sheets, FLOP/s. fp32 products run on the plain cores unless TF32 is allowed.
_BF16_PEAKS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12}
_FP32_PEAKS = {"H200": 67e12, "H100": 67e12, "H800": 67e12, "B200": 80e12, "A100": 19.5e12, "L40S": 91.6e12}


@dataclass(frozen=True)
class Peak:
    """A device's rate of floating-point operations, and where the figure comes from."""

    flops_per_second: float
    source: str


def peak_flops(device: torch.device, dtype: torch.dtype) -> Peak:
    """The data sheet's rate where the GPU is known; else what a large product reaches here, now."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for model, peak in (_BF16_PEAKS if dtype == torch.bfloat16 else _FP32_PEAKS).items():
            if model in name:
                return Peak(peak, f"data sheet, {model}, dense {dtype}".replace("torch.", ""))
    return Peak(
        _measure_product(device, dtype),
        f"measured, best of several 1024 x 1024 products in {dtype}".replace("torch.", ""),
    )


def memory_bytes(device: torch.device) -> int:
    """The most memory this process has held so far: on the GPU what torch allocated, on the CPU the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        # Not ru_maxrss, which on Linux a process inherits from the one that started it.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _measure_product(device: torch.device, dtype: torch.dtype, size: int = 1024, seconds: float = 0.3) -> float:
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        product = left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    del product
    return 2 * size**3 / best
