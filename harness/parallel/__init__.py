"""Processes, devices, seeds, and the engine that turns losses into weight updates.

In: a model and the losses of a step's micro-batches. Out: updated weights, and the fragments that checkpoints are made
of. Read layout.py first, then engine.py. Only this room knows process groups or asks which device it runs on.
"""

from .config import ParallelSection
from .engine import Engine, OptimizerBuilder, TorchEngine
from .fragments import Fragment
from .hardware import Peak, memory_bytes, peak_flops
from .layout import ParallelLayout, derive_seed

__all__ = [
    "Engine",
    "Fragment",
    "OptimizerBuilder",
    "ParallelLayout",
    "ParallelSection",
    "Peak",
    "TorchEngine",
    "derive_seed",
    "memory_bytes",
    "peak_flops",
]
