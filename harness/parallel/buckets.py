"""Gradients in flat buckets, summed over the data-parallel ranks while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 25 << 20
"""Large enough that a collective's latency doesn't count, small enough that the first one starts early (the size that
torch's DistributedDataParallel settled on; Li et al., arXiv 2006.15704)."""


class GradientBuckets:
    """Owns the gradients of `parameters`: each `.grad` is a view of a bucket, so nothing is copied to be reduced.

    Buckets are filled in the reverse order of the parameters, which is about the order in which backward reaches them,
    and reduced in that order on every rank: a bucket waits for the ones before it.
    """

    def __init__(
        self, parameters: Iterable[Tensor], group: dist.ProcessGroup, bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        self._group = group
        self._flats: list[Tensor] = []
        self._bucket_of: dict[int, int] = {}
        self._sizes: list[int] = []
        members: list[Tensor] = []
        for parameter in reversed(list(parameters)):
            if members and (
                parameter.dtype != members[0].dtype or sum(m.nbytes for m in members) + parameter.nbytes > bucket_bytes
            ):
                self._add(members)
                members = []
            members.append(parameter)
        if members:
            self._add(members)
        self._open = False
        self._missing: list[int] = []
        self._running: list[dist.Work] = []

    def expect(self) -> None:
        """The next backward pass is a step's last: reduce each bucket as soon as all of its gradients are there."""
        self._open = True
        self._missing = list(self._sizes)
        self._running = []

    def arrived(self, parameter: Tensor) -> None:
        """This parameter's gradient is final for this backward pass."""
        if self._open:
            self._missing[self._bucket_of[id(parameter)]] -= 1
            self._start()

    def finish(self) -> None:
        """Reduce what is left (parameters that no loss depended on never arrive) and wait for all."""
        self._missing = [0] * len(self._sizes)
        self._start()
        for work in self._running:
            work.wait()
        self._open = False

    def clear(self) -> None:
        for flat in self._flats:
            flat.zero_()

    def _start(self) -> None:
        while len(self._running) < len(self._flats) and self._missing[len(self._running)] <= 0:
            flat = self._flats[len(self._running)]
            self._running.append(dist.all_reduce(flat, group=self._group, async_op=True))

    def _add(self, members: list[Tensor]) -> None:
        flat = members[0].new_zeros(sum(member.numel() for member in members))
        start = 0
        for member in members:
            member.grad = flat[start : start + member.numel()].view(member.shape)
            self._bucket_of[id(member)] = len(self._flats)
            start += member.numel()
        self._sizes.append(len(members))
        self._flats.append(flat)
