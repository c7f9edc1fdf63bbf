"""The engine: gradients, their norm, the optimizer step, and the fragments a checkpoint is made of.

A few methods are the only door between the loop and data parallelism, whatever stands behind them: plain torch
(torch_engine.py) or DeepSpeed's ZeRO (zero_engine.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from .fragments import Fragment
from .layout import ParallelLayout
from .placement import Placement

OptimizerBuilder = Callable[[Mapping[str, nn.Parameter]], torch.optim.Optimizer]
"""Makes the optimizer over the master weights that it is given by name."""


class Engine(Protocol):
    """What the loop needs of data parallelism.

    One step: `backward` for each micro-batch, then norm, clip, and `step` or `skip`. All ranks call all of them, in the
    same order.
    """

    @property
    def module(self) -> nn.Module:
        """What the loop calls in training, in place of the model: the model, or something that runs it."""

    def backward(self, loss_sum: Tensor, global_tokens: int, *, last: bool) -> None:
        """Add the gradient of `loss_sum / global_tokens`, the whole step's count of valid tokens over all ranks.

        `last`: this is the step's last micro-batch, so gradients may be reduced as they come.
        """

    def grad_norm(self) -> Tensor:
        """The 2-norm of the step's whole gradient, every parameter once, the same on all ranks: fp32 scalar on the
        device; nan or inf where the gradient is not finite."""

    def clip(self, norm: float) -> None:
        """Scale the gradient so that its global norm is at most `norm`."""

    def step(self, learning_rate: float) -> None:
        """One optimizer step at `learning_rate`; clears the gradient."""

    def skip(self) -> None:
        """Clear the gradient; weights, moments and counts stay as they are."""

    def fragments(self, *, owned: bool = False) -> Iterator[Fragment]:
        """Views of the master weights and the optimizer state by logical name: save from them, load into them.

        `owned` leaves out what another rank gives as well, so that all ranks' fragments tile each tensor exactly once.
        """

    def refresh_weights(self) -> None:
        """Bring the weights that the model computes with in line with the masters, after these were loaded."""


def build_divider(layout: ParallelLayout, precision: str) -> Callable[[nn.Module], None] | None:
    """What takes each part of a model as soon as it is built and leaves this rank's share of its weights; None below
    ZeRO stage 3."""
    if layout.section.zero_stage < 3:
        return None
    from .deepspeed_access import build_divider

    return build_divider(layout, precision)


def build_engine(
    model: nn.Module,
    build_optimizer: OptimizerBuilder,
    precision: str,
    placements: Mapping[str, Placement],
    layout: ParallelLayout,
) -> Engine:
    """The engine that `parallel.zero_stage` names. Raises HarnessError where DeepSpeed is wanted and missing."""
    if layout.section.zero_stage == 0:
        from .torch_engine import TorchEngine

        return TorchEngine(model, build_optimizer, precision, placements, layout)
    from .zero_engine import ZeroEngine

    return ZeroEngine(model, build_optimizer, precision, placements, layout)
