"""Processes, devices, seeds, tensor-parallel layers, and the engine that turns losses into weight updates.

In: a model and the losses of a step's micro-batches. Out: updated weights, and the fragments that checkpoints are made
of. Read layout.py first, then tensor.py and engine.py. Only this room knows process groups or asks which device it runs
on.
"""

from .channel import Channel
from .config import ParallelSection, ZeroSection
from .engine import Engine, OptimizerBuilder, build_divider, build_engine
from .fragments import Fragment
from .hardware import Peak, memory_bytes, peak_flops
from .hub import Verdict
from .layout import ParallelLayout
from .placement import Placement, place_parameters
from .pretend import pretended_layout
from .processes import Identity
from .randomness import derive_seed, seed_dropout
from .staging import Staging
from .state_size import StatePart, state_parts, stays_whole
from .tensor import TensorParallel
from .torch_engine import TorchEngine
from .watchdog import Watchdog

__all__ = [
    "Channel",
    "Engine",
    "Fragment",
    "Identity",
    "OptimizerBuilder",
    "ParallelLayout",
    "ParallelSection",
    "Peak",
    "Placement",
    "Staging",
    "StatePart",
    "TensorParallel",
    "TorchEngine",
    "Verdict",
    "Watchdog",
    "ZeroSection",
    "build_divider",
    "build_engine",
    "derive_seed",
    "memory_bytes",
    "peak_flops",
    "place_parameters",
    "pretended_layout",
    "seed_dropout",
    "state_parts",
    "stays_whole",
]
