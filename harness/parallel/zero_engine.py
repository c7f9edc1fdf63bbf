"""ZeRO stages 1 to 3 by DeepSpeed.

What this rests on beyond DeepSpeed's documented interface is in deepspeed_access.py, one function a fact. The step is
DeepSpeed's own; what is done here is what it leaves open: the gradient's scale (its average over ranks is undone, since
the loss is divided by the step's global count of tokens), the norm before the step, and masters in full precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

import torch
from torch import Tensor, nn

from . import deepspeed_access
from .engine import OptimizerBuilder
from .fragments import Fragment
from .layout import ParallelLayout
from .placement import Placement, flat_boxes


class ZeroEngine:
    """See Engine for what the methods promise. `module` is DeepSpeed's engine, which runs the model."""

    def __init__(
        self,
        model: nn.Module,
        build_optimizer: OptimizerBuilder,
        precision: str,
        placements: Mapping[str, Placement],
        layout: ParallelLayout,
    ) -> None:
        """In bf16 the model's weights are cast, and the masters with them: they have to be loaded again."""
        self._layout, self._placements = layout, placements
        trainable = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        for name, weight in trainable.items():
            # By this attribute DeepSpeed's norm knows which parameters count once a rank and which once in all.
            weight.tensor_model_parallel = placements[name].sharded and layout.tensor_size > 1  # type: ignore[attr-defined]
        optimizer = build_optimizer(trainable)
        self._parameters = trainable
        self._access = deepspeed_access.start(model, optimizer, precision, layout)
        self._access.initialise_state()
        self._norm: Tensor | None = None

    @property
    def module(self) -> nn.Module:
        return self._access.engine

    def backward(self, loss_sum: Tensor, global_tokens: int, *, last: bool) -> None:
        self._norm = None
        self._access.backward(loss_sum * (self._layout.data_size / global_tokens), last)

    def grad_norm(self) -> Tensor:
        if self._norm is None:
            norm = self._access.grad_norm()
            # DeepSpeed says -1 or inf of a norm that is not finite.
            self._norm = torch.where((norm < 0) | norm.isinf(), torch.full_like(norm, torch.nan), norm).float()
        return self._norm

    def clip(self, norm: float) -> None:
        self._access.clip_at(norm)

    def step(self, learning_rate: float) -> None:
        if not self._access.step(learning_rate):
            raise RuntimeError("DeepSpeed did not take the step: its gradient is not finite, which grad_norm() says")
        self._norm = None

    def skip(self) -> None:
        self._access.drop_gradients()
        self._norm = None

    def fragments(self, *, owned: bool = False) -> Iterator[Fragment]:
        layout = self._layout
        for name, weight in self._parameters.items():
            place = self._placements[name]
            if owned and layout.tensor_rank > 0 and not place.sharded:
                continue
            start, values = self._access.local_state(weight)
            for kind, value in values.items():
                yield from _boxes(name, kind, place, self._access.shape(weight), start, value)
            if not owned or layout.tensor_rank == layout.data_rank == 0:
                yield Fragment.whole(name, "step", self._access.step_count(weight))

    def refresh_weights(self) -> None:
        self._access.refresh_weights()


def _boxes(
    name: str, kind: str, place: Placement, shape: tuple[int, ...], start: int, values: Tensor
) -> Iterator[Fragment]:
    """A flat range of a local tensor of `shape` as boxes of the global one, padding left out; one without elements
    where nothing remains, so that the rank is known to know the tensor."""
    empty = True
    for offsets, sizes, first in flat_boxes(shape, start, start + values.numel()):
        rows = min(sizes[0], place.shape[0] - offsets[0])
        if rows > 0:
            box = values[first - start : first - start + prod(sizes)].view(sizes)
            where = tuple(whole + here for whole, here in zip(place.offsets, offsets, strict=True))
            yield Fragment(name, kind, place.global_shape, where, box[:rows])
            empty = False
    if empty:
        nothing = values.new_empty((0, *place.global_shape[1:]))
        yield Fragment(name, kind, place.global_shape, (0,) * len(place.global_shape), nothing)
