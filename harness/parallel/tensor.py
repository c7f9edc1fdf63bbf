"""Tensor parallelism as the model sees it: where layers come from, and how activations enter and leave them.

A block's products lie between `enter` and a row-parallel layer: column-parallel layers divide their outputs, the
row-parallel one takes divided inputs and its output is whole again (Shoeybi et al., arXiv 1909.08053). With one rank
every layer is torch's own and every mapping is the identity.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .mappings import Copy, GatherTokens, SplitTokens
from .randomness import ForwardSeeds

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class TensorParallel:
    """The tensor-parallel ranks that share one model.

    The layers' parameters are created uninitialised, under the names that torch's layers give them. A module's
    attribute `tensor_sharded` says along which dimension each of its parameters is divided, into equal contiguous
    parts.
    """

    def __init__(
        self,
        group: ProcessGroup | None = None,
        rank: int = 0,
        size: int = 1,
        *,
        sequence_parallel: bool = False,
        forward_seeds: ForwardSeeds | None = None,
    ) -> None:
        self.group, self.rank, self.size = group, rank, size
        self.forward_seeds = forward_seeds or ForwardSeeds()
        """Where the dropouts of a forward pass get their seeds from."""
        self.splits_tokens = sequence_parallel and size > 1
        """Whether activations between `enter` and the row-parallel layers are (tokens / size, width), this rank's
        share, instead of (batch, sequence, width)."""

    # ---- layers ----------------------------------------------------------------------------------------------------

    def column_linear(self, inputs: int, outputs: int, *, bias: bool) -> nn.Module:
        """(..., inputs), whole, to this rank's (..., outputs / size); outputs must be a multiple of size."""
        if self.size == 1:
            return nn.Linear(inputs, outputs, bias=bias)
        from .megatron_layers import ColumnLinear

        return ColumnLinear(inputs, outputs, bias, self)

    def row_linear(self, inputs: int, outputs: int, *, bias: bool) -> nn.Module:
        """This rank's (batch, sequence, inputs / size) to the whole (batch, sequence, outputs), or to this rank's
        tokens of it where tokens are split."""
        if self.size == 1:
            return nn.Linear(inputs, outputs, bias=bias)
        from .megatron_layers import RowLinear

        return RowLinear(inputs, outputs, bias, self)

    def embedding(self, rows: int, width: int) -> nn.Module:
        """int64 ids (...) to (..., width), whole on every rank; each holds rows / size rows."""
        if self.size == 1:
            return nn.Embedding(rows, width)
        from .megatron_layers import Embedding

        return Embedding(rows, width, self)

    # ---- activations -----------------------------------------------------------------------------------------------

    def split(self, x: Tensor) -> Tensor:
        """From an activation (batch, sequence, width) that all ranks have to what is passed between blocks."""
        return SplitTokens.apply(x.flatten(0, -2), self.group) if self.splits_tokens else x

    def split_flags(self, flags: Tensor) -> Tensor:
        """bool (batch, sequence), the same on all ranks, of the tokens that `split` leaves on this one."""
        return flags.flatten().chunk(self.size)[self.rank] if self.splits_tokens else flags

    def enter(self, x: Tensor, batch: int) -> Tensor:
        """From what is passed between blocks to (batch, sequence, width), the same on all ranks, before
        column-parallel layers."""
        if self.size == 1:
            return x
        if self.splits_tokens:
            return GatherTokens.apply(x, self.group).unflatten(0, (batch, -1))
        return Copy.apply(x, self.group)

    def on_tokens(self, weight: Tensor) -> Tensor:
        """A parameter that every rank holds, about to be used on what is passed between blocks."""
        return Copy.apply(weight, self.group) if self.splits_tokens else weight

    def on_heads(self, weight: Tensor) -> Tensor:
        """A parameter that every rank holds, about to be used on this rank's share of the heads."""
        return Copy.apply(weight, self.group) if self.size > 1 else weight

    @contextmanager
    def whole_tokens(self) -> Iterator[None]:
        """Within the block no tokens are split: for inputs of any length. The same numbers, less division."""
        before, self.splits_tokens = self.splits_tokens, False
        try:
            yield
        finally:
            self.splits_tokens = before

    def sum_over_tokens(self, x: Tensor) -> Tensor:
        """A sum over what this rank has of an activation passed between blocks, made one over all its tokens, in
        place; without gradient."""
        if self.splits_tokens:
            torch.distributed.all_reduce(x, group=self.group)
        return x

    def gather_columns(self, x: Tensor, start: int, rows: int) -> Tensor:
        """(..., rows) on all ranks from each rank's columns from `start` on; without gradient."""
        if self.size == 1:
            return x
        whole = x.new_zeros((*x.shape[:-1], rows))
        whole[..., start : start + x.shape[-1]] = x
        torch.distributed.all_reduce(whole, group=self.group)
        return whole
