"""megatron-core's tensor-parallel layers, as this house's decoder uses them. Imported only where there is something to
divide: the import takes seconds.

Their collectives on activations are ours (mappings.py): megatron-core's sequence-parallel ones call CUDA. Groups are
handed in, so megatron-core's global process-group state stays untouched.
"""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from .mappings import Reduce, ReduceScatterTokens

with warnings.catch_warnings():
    # It says which optional CUDA packages it does not find; none of the layers below uses them.
    warnings.simplefilter("ignore")
    _level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        from megatron.core.model_parallel_config import ModelParallelConfig
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
    finally:
        logging.disable(_level)

if TYPE_CHECKING:
    from .tensor import TensorParallel


def _config(tensor: TensorParallel) -> ModelParallelConfig:
    # use_cpu_initialization keeps the layers from allocating on CUDA by themselves; the caller says where they lie.
    return ModelParallelConfig(
        tensor_model_parallel_size=tensor.size, use_cpu_initialization=True, perform_initialization=False
    )


def _unused(weight: Tensor) -> Tensor:
    raise AssertionError("weights are initialised by name, not by the layer")


class ColumnLinear(ColumnParallelLinear):
    """megatron-core's, without its own collectives: TensorParallel.enter stands in front."""

    tensor_sharded = {"weight": 0, "bias": 0}  # noqa: RUF012 (megatron's modules are not annotated)

    def __init__(self, inputs: int, outputs: int, bias: bool, tensor: TensorParallel) -> None:
        super().__init__(
            inputs,
            outputs,
            config=_config(tensor),
            init_method=_unused,
            bias=bias,
            disable_grad_reduce=True,
            tp_group=tensor.group,
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class RowLinear(RowParallelLinear):
    """megatron-core's, with an output that is summed into whole tokens or into this rank's share of them."""

    tensor_sharded = {"weight": 1}  # noqa: RUF012

    def __init__(self, inputs: int, outputs: int, bias: bool, tensor: TensorParallel) -> None:
        super().__init__(
            inputs,
            outputs,
            config=_config(tensor),
            init_method=_unused,
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=tensor.group,
        )
        self._tensor = tensor

    def forward(self, x: Tensor) -> Tensor:
        # Its own forward has no switch for the reduction; the product is all that remains of it.
        part = F.linear(x, self.weight)
        if self._tensor.splits_tokens:
            whole = ReduceScatterTokens.apply(part.flatten(0, -2), self._tensor.group)
        else:
            whole = Reduce.apply(part, self._tensor.group)
        return whole if self.bias is None else whole + self._tensor.on_tokens(self.bias)


class Embedding(VocabParallelEmbedding):
    """megatron-core's, its output whole on every rank."""

    tensor_sharded = {"weight": 0}  # noqa: RUF012

    def __init__(self, rows: int, width: int, tensor: TensorParallel) -> None:
        super().__init__(rows, width, init_method=_unused, config=_config(tensor), tp_group=tensor.group)
