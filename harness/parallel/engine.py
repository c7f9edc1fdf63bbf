"""The engine: gradients, their norm, the optimizer step, and the fragments a checkpoint is made of.

Five methods are the only door between the loop and data parallelism, whatever stands behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from .fragments import Fragment

OptimizerBuilder = Callable[[Mapping[str, nn.Parameter]], torch.optim.Optimizer]
"""Makes the optimizer over the master weights that it is given by name."""


class Engine(Protocol):
    """What the loop needs of data parallelism. One step: `backward` for each micro-batch, then norm, clip, step."""

    def backward(self, loss_sum: Tensor, global_tokens: int) -> None:
        """Add the gradient of `loss_sum / global_tokens`, the whole step's count of valid tokens over all ranks."""

    def grad_norm(self) -> Tensor:
        """The global 2-norm of the accumulated gradient: fp32 scalar on the device, no host synchronisation."""

    def clip(self, norm: float) -> None:
        """Scale the accumulated gradient so that its global norm is at most `norm`."""

    def step(self, learning_rate: float) -> None:
        """One optimizer step at `learning_rate`; clears the gradient."""

    def fragments(self) -> Iterator[Fragment]:
        """Views of the master weights and the optimizer state by logical name: save from them, load into them."""


class TorchEngine:
    """ZeRO stage 0 on plain torch.

    In fp32 the model's parameters are the masters. In bf16 the model computes with bf16 weights, and the masters are
    fp32 copies taken before the cast; micro-batch gradients are added up in fp32, and `backward` leaves no bf16
    gradient behind.
    """

    def __init__(
        self,
        model: nn.Module,
        build_optimizer: OptimizerBuilder,
        precision: str,
        real_rows: Mapping[str, int] | None = None,
    ) -> None:
        """`real_rows`: of parameters padded at the end, how many rows a checkpoint holds."""
        self._real_rows = real_rows or {}
        self._working = dict(model.named_parameters())  # tied weights appear once, under their first name
        self._masters = {name: weight for name, weight in self._working.items() if weight.requires_grad}
        if precision == "bf16":
            self._masters = {name: _cast_to_bf16(weight) for name, weight in self._masters.items()}
            for name, master in self._masters.items():
                self._working[name].register_post_accumulate_grad_hook(_adder_to(master))
        self._separate = precision == "bf16"
        self._optimizer = build_optimizer(self._masters)
        self._norm: Tensor | None = None
        _initialise_state(self._optimizer)

    def backward(self, loss_sum: Tensor, global_tokens: int) -> None:
        self._norm = None
        (loss_sum / global_tokens).backward()

    def grad_norm(self) -> Tensor:
        if self._norm is None:
            self._norm = nn.utils.get_total_norm(self._gradients(), 2.0)
        return self._norm

    def clip(self, norm: float) -> None:
        # torch's own rule, without waiting for the value: the factor is computed and applied on the device.
        torch._foreach_mul_(self._gradients(), (norm / (self.grad_norm() + 1e-6)).clamp(max=1.0))
        self._norm = None

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._norm = None
        self.refresh_weights()

    def fragments(self) -> Iterator[Fragment]:
        for name, master in self._masters.items():
            values = {"master": master.detach(), **self._optimizer.state[master]}
            for kind, value in values.items():
                if name in self._real_rows and value.dim() > 0:
                    value = value[: self._real_rows[name]]
                yield Fragment.whole(name, kind, value)

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Bring the weights that the model computes with in line with the masters, after these were changed or
        loaded."""
        if self._separate:
            working: list[Tensor] = [self._working[name] for name in self._masters]
            torch._foreach_copy_(working, [*self._masters.values()])

    def _gradients(self) -> list[Tensor]:
        return [master.grad for master in self._masters.values() if master.grad is not None]


def _cast_to_bf16(weight: nn.Parameter) -> nn.Parameter:
    """Turn a model's weight into bf16 in place and return its fp32 master."""
    master = nn.Parameter(weight.detach().clone())
    weight.data = weight.data.to(torch.bfloat16)
    return master


def _adder_to(master: nn.Parameter) -> Callable[[Tensor], None]:
    """A hook that moves a micro-batch's bf16 gradient into the master's fp32 gradient."""

    def add(weight: Tensor) -> None:
        if weight.grad is None:
            return
        if master.grad is None:
            master.grad = weight.grad.float()
        else:
            master.grad.add_(weight.grad)
        weight.grad = None

    return add


def _initialise_state(optimizer: torch.optim.Optimizer) -> None:
    """Create every state tensor now (torch creates them at the first step), so that a checkpoint can load into them.

    A step with zero gradients and a zero learning rate changes no weight; moments stay zero and the count is set back.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    rates = [group["lr"] for group in optimizer.param_groups]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    for parameter in parameters:
        optimizer.state[parameter]["step"].zero_()
