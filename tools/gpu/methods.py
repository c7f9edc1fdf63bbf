"""The losses that are timed: ours, torch's, and other projects' where they are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.device import Device
from harness.kernels import linear_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of hidden (N, D), weight (V, D) and targets (N,): the mean."""
FILTER_BOUND = 1e-3
OURS = "triton, dW in fp32"
OURS_BF16 = "triton, dW in bf16"
FORWARD = "triton, forward alone"
COMPILED = "torch.compile"


@dataclass(frozen=True)
class Method:
    """One way to the loss and, but for the forward alone, its gradients."""

    name: str
    make: Callable[[], Loss]
    """Imports and prepares; raises ImportError or AttributeError where it is not there."""
    ours: bool = False
    forward_only: bool = False
    wide: bool = False
    """weight's gradient reaches autograd in fp32."""
    nvd: int | None = None
    """Multiples of N·V·D operations, where it is known."""
    rounds: int | None = None
    """At most: for what takes long, and is no rival."""


def list_methods(device: Device) -> Iterator[Method]:
    """All, whether or not they are there."""
    wide = {"weight_grad_dtype": torch.float32}
    yield Method(OURS, lambda: _ours("triton", **wide), ours=True, wide=True, nvd=8)
    yield Method(OURS_BF16, lambda: _ours("triton"), ours=True, nvd=8)
    yield Method(FORWARD, lambda: _ours("triton"), ours=True, forward_only=True, nvd=2)
    filtered = f"triton, filter {FILTER_BOUND}"
    yield Method(filtered, lambda: _ours("triton", filter_bound=FILTER_BOUND, **wide), ours=True, wide=True, rounds=2)
    yield Method("blocked", lambda: _ours("blocked", **wide), ours=True, wide=True, nvd=6, rounds=2)
    yield Method("torch, plain", lambda: _plain, nvd=6)
    yield Method(COMPILED, lambda: torch.compile(_plain, dynamic=False, backend=device.compiler), nvd=6)
    yield Method("torch, F.linear_cross_entropy", lambda: _torch_chunked(None), nvd=6)
    yield Method("torch, F.linear_cross_entropy, chunked", lambda: _torch_chunked("chunked"), nvd=6)
    for implementation in ("cce", "cce_exact", "cce_kahan_full_c"):
        yield Method(f"cut_cross_entropy, {implementation}", lambda name=implementation: _cut(name))
    yield Method("Liger", _liger, nvd=6)
    yield Method("QuACK", _quack, nvd=6)


def _ours(implementation: str, **settings: Any) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, implementation=implementation, **settings).loss

    return loss


def _plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets)


def _torch_chunked(how: str | None) -> Loss:
    if not hasattr(F, "linear_cross_entropy"):
        raise AttributeError(f"torch {torch.__version__} has no F.linear_cross_entropy (2.13 has)")
    options = {} if how is None else {"options": torch.nn.LinearCrossEntropyOptions()}
    return lambda hidden, weight, targets: F.linear_cross_entropy(hidden, weight, targets, **options)


def _cut(implementation: str) -> Loss:
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda hidden, weight, targets: function(hidden, weight, targets, impl=implementation)


def _liger() -> Loss:
    loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, targets: loss(weight, hidden, targets)


def _quack() -> Loss:
    function = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return lambda hidden, weight, targets: function(hidden, weight, targets)
