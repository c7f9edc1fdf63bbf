"""Which implementation runs: what was asked for, or the best that these tensors and this machine allow."""

from __future__ import annotations

import logging
import os
from functools import lru_cache

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("auto", "blocked", "triton", "reference")
LEAST_CAPABILITY = (8, 0)
"""Of a GPU: bf16 in its matrix units."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MOST = 2**31 - 2**16


def choose(implementation: str, hidden: Tensor, weight: Tensor, tokens: int) -> str:
    """One of IMPLEMENTATIONS but "auto", for which a fallback is logged, once.

    auto: Triton for 16-bit tensors on a GPU, else blocked: for fp32 there, whose products are left to cuBLAS, and for
    everything on the CPU. Raises ValueError for a name not known, and for "triton" where it cannot run.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be 'auto', 'blocked', 'triton' or 'reference', got {implementation!r}")
    if implementation == "triton":
        reason = why_not(hidden, weight, tokens)
        if reason is not None:
            raise ValueError(f"implementation 'triton' cannot run: {reason}")
    if implementation != "auto":
        return implementation
    if hidden.device.type != "cuda" or torch.float64 in (hidden.dtype, weight.dtype):
        return "blocked"
    if hidden.dtype == weight.dtype == torch.float32:
        return "blocked"
    reason = why_not(hidden, weight, tokens)
    if reason is None:
        return "triton"
    if not torch.compiler.is_compiling():
        _say(reason)
    return "blocked"


def why_not(hidden: Tensor, weight: Tensor, tokens: int) -> str | None:
    """Why the Triton kernels cannot take these tensors here; None where they can."""
    if hidden.dtype != weight.dtype or hidden.dtype not in DTYPES:
        return f"hidden is {hidden.dtype} and weight {weight.dtype}; both must be bfloat16, float16 or float32 alike"
    if max(tokens, *weight.shape) > _MOST:
        return f"{tokens} tokens, weight {tuple(weight.shape)}: each must be below 2**31 - 2**16"
    return machine_problem(hidden.device)


def machine_problem(device: torch.device) -> str | None:
    """The same, as far as it does not depend on the tensors."""
    if device.type == "cuda":
        found = capability(device)
        if found < LEAST_CAPABILITY:
            return f"{device} has compute capability {found[0]}.{found[1]}; 8.0 (Ampere) is the least"
    elif device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device}, and must be on a GPU (or on the CPU with TRITON_INTERPRET=1, for tests)"
    return _import_problem()


def _import_problem() -> str | None:
    # A statement and not importlib's function, which torch.compile does not follow.
    try:
        from .fused import passes  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}); pip install 'harness[triton]'"
    return None


def capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU: (9, 0) is Hopper."""
    properties = torch.cuda.get_device_properties(device)  # which torch.compile takes for a constant
    return properties.major, properties.minor


@lru_cache
def _say(reason: str) -> None:
    logger.warning("linear cross-entropy: the blocked form runs, slower, not the Triton kernels: %s", reason)


def target(device: torch.device) -> str:
    """What the Triton kernels are compiled for: "sm_90"."""
    if device.type != "cuda":
        return "the interpreter"
    major, minor = capability(device)
    return f"sm_{major}{minor}"
