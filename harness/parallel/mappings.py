"""What tensor-parallel ranks say to each other inside a forward and backward pass, as autograd functions.

Under sequence parallelism an activation is divided by *tokens*, all dimensions but the last flattened: every operation
between the blocks' products is per token, so nothing else depends on which tokens a rank has, and pieces lie one after
the other in memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renames these and warns about the old names, which are all that 2.11 and 2.12 have.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Copy(torch.autograd.Function):
    """The same tensor on all ranks, used differently on each: identity forward, sum of the gradients backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class Reduce(torch.autograd.Function):
    """A sum of all ranks' parts, used by all in the same way: sum forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class GatherTokens(torch.autograd.Function):
    """(tokens / ranks, width) of each rank to (tokens, width) on all; backward each gets its tokens' sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gather_tokens(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter_tokens(gradient, ctx.group), None


class ReduceScatterTokens(torch.autograd.Function):
    """Each rank's part (tokens, width) of a sum to the sum's (tokens / ranks, width); backward the gradient is
    gathered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter_tokens(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gather_tokens(gradient, ctx.group), None


class SplitTokens(torch.autograd.Function):
    """(tokens, width), the same on all ranks, to each rank's (tokens / ranks, width); backward the gradient is
    gathered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gather_tokens(gradient, ctx.group), None


def gather_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The ranks' rows, one rank after the other."""
    whole = x.new_empty((x.shape[0] * dist.get_world_size(group), *x.shape[1:]))
    _all_gather(whole, x.contiguous(), group=group)
    return whole


def reduce_scatter_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's rows of the sum over ranks."""
    part = x.new_empty((x.shape[0] // dist.get_world_size(group), *x.shape[1:]))
    _reduce_scatter(part, x.contiguous(), group=group)
    return part
