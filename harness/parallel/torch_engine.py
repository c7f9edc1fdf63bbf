"""ZeRO stage 0: plain torch, every data-parallel rank with all masters and moments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .buckets import GradientBuckets
from .engine import OptimizerBuilder
from .fragments import Fragment
from .layout import ParallelLayout
from .placement import Placement, place_parameters
from .tensor import TensorParallel


class TorchEngine:
    """The control for the other stages; see Engine for what the methods promise.

    In fp32 the model's parameters are the masters. In bf16 the model computes with bf16 weights, and the masters are
    fp32 copies taken before the cast; micro-batch gradients are added up in fp32, and `backward` leaves no gradient of
    a bf16 weight behind.
    """

    def __init__(
        self,
        model: nn.Module,
        build_optimizer: OptimizerBuilder,
        precision: str,
        placements: Mapping[str, Placement] | None = None,
        layout: ParallelLayout | None = None,
    ) -> None:
        """Without `layout` this is one rank; without `placements` nothing is divided or padded."""
        self.module = model
        self._layout = layout
        self._placements = placements or place_parameters(model, TensorParallel())
        self._working = dict(model.named_parameters())  # tied weights appear once, under their first name
        self._masters = {name: weight for name, weight in self._working.items() if weight.requires_grad}
        if precision == "bf16":
            self._masters = {name: _cast_to_bf16(weight) for name, weight in self._masters.items()}
        self._separate = precision == "bf16"
        self._buckets: GradientBuckets | None = None
        if layout is not None and layout.data_size > 1:
            self._buckets = GradientBuckets(self._masters.values(), layout.data_group)
        for name, master in self._masters.items():
            if self._separate or self._buckets is not None:
                self._working[name].register_post_accumulate_grad_hook(self._receiver(master))
        self._optimizer = build_optimizer(self._masters)
        self._norm: Tensor | None = None
        initialise_state(self._optimizer)

    def backward(self, loss_sum: Tensor, global_tokens: int, *, last: bool) -> None:
        self._norm = None
        if self._buckets is not None and last:
            self._buckets.expect()
        (loss_sum / global_tokens).backward()
        if self._buckets is not None and last:
            self._buckets.finish()

    def grad_norm(self) -> Tensor:
        if self._norm is None:
            layout = self._layout
            if layout is None or layout.tensor_size == 1:
                self._norm = _total_norm(self._gradients())
            else:
                # What every tensor-parallel rank holds counts once, on the first.
                mine = [name for name in self._masters if self._placements[name].sharded or layout.tensor_rank == 0]
                square = _total_norm(self._gradients(mine)).square().to(layout.device)
                dist.all_reduce(square, group=layout.tensor_group)
                self._norm = square.sqrt()
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
        self.skip()
        self.refresh_weights()

    def skip(self) -> None:
        if self._buckets is not None:
            self._buckets.clear()
        else:
            self._optimizer.zero_grad(set_to_none=True)
        self._norm = None

    def fragments(self, *, owned: bool = False) -> Iterator[Fragment]:
        owners = self._owners()
        for name, master in self._masters.items():
            place = self._placements[name]
            if owned and not self._owns(place, owners[name]):
                continue
            for kind, value in {"master": master.detach(), **self._optimizer.state[master]}.items():
                if value.dim() > 0:
                    yield Fragment(name, kind, place.global_shape, place.offsets, value[: place.shape[0]])
                elif not owned or self._layout is None or self._layout.tensor_rank == 0:
                    yield Fragment.whole(name, kind, value)

    @torch.no_grad()
    def refresh_weights(self) -> None:
        if self._separate:
            working: list[Tensor] = [self._working[name] for name in self._masters]
            torch._foreach_copy_(working, [*self._masters.values()])

    def _gradients(self, names: list[str] | None = None) -> list[Tensor]:
        masters = self._masters.values() if names is None else [self._masters[name] for name in names]
        return [master.grad for master in masters if master.grad is not None]

    def _owners(self) -> dict[str, int]:
        """Which data-parallel rank saves a parameter: whole ones, dealt out so that all write about equally much."""
        loads = [0] * (self._layout.data_size if self._layout is not None else 1)
        owners = {}
        for name in sorted(self._masters, key=lambda name: -self._masters[name].numel()):
            owners[name] = loads.index(min(loads))
            loads[owners[name]] += self._masters[name].numel()
        return owners

    def _owns(self, place: Placement, owner: int) -> bool:
        layout = self._layout
        return layout is None or (layout.data_rank == owner and (place.sharded or layout.tensor_rank == 0))

    def _receiver(self, master: nn.Parameter) -> Callable[[Tensor], None]:
        """A hook that takes a weight's gradient of this micro-batch: in bf16 it moves into the master's fp32 sum."""

        def receive(weight: Tensor) -> None:
            if self._separate and weight.grad is not None:
                if master.grad is None:
                    master.grad = weight.grad.float()
                else:
                    master.grad.add_(weight.grad)
                weight.grad = None
            if self._buckets is not None:
                self._buckets.arrived(master)

        return receive


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all of them together: an fp32 scalar.

    On the CPU torch adds up a tensor's fp32 squares one after the other, and loses 0.3 % of 40 million; so in float64.
    """
    if not gradients:
        return torch.zeros(())
    dtype = torch.float64 if gradients[0].device.type == "cpu" else None
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2.0, dtype=dtype))).float()


def _cast_to_bf16(weight: nn.Parameter) -> nn.Parameter:
    """Turn a model's weight into bf16 in place and return its fp32 master."""
    master = nn.Parameter(weight.detach().clone())
    weight.data = weight.data.to(torch.bfloat16)
    # A gradient that comes in fp32 (the loss's, of the head) stays in it on its way into the master's sum.
    weight.grad_dtype = torch.float32
    return master


def initialise_state(optimizer: torch.optim.Optimizer) -> None:
    """Create every state tensor now (torch creates them at the first step), so that a checkpoint can load into them.

    A step with zero gradients and a zero learning rate changes no weight; moments stay zero and the count is set back.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    rates = [group["lr"] for group in optimizer.param_groups]
    given = [parameter.grad for parameter in parameters]  # views of buckets stay where they are
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter, gradient in zip(parameters, given, strict=True):
        parameter.grad = gradient
        optimizer.state[parameter]["step"].zero_()
