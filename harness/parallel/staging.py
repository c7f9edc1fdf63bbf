"""A copy of fragments in host memory, so that training may go on while they are written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from .fragments import Fragment

_ALIGNMENT = 64


class Staging:
    """One block of host memory, taken at the first copy and used again by every later one of the same fragments: fresh
    memory would cost more than the copy. Page-locked where the fragments lie on a GPU."""

    def __init__(self) -> None:
        self._shapes: list[tuple[torch.Size, torch.dtype]] = []
        self._copies: list[Tensor] = []

    @torch.no_grad()
    def copy(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """The fragments over memory of their own, which stays as it is until the next call."""
        fragments = list(fragments)
        sources = [fragment.tensor.detach() for fragment in fragments]
        self._reserve(sources)
        together: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
        for number, source in enumerate(sources):
            if source.numel():
                together[source.device, source.dtype].append(number)
        for numbers in together.values():
            torch._foreach_copy_(
                [self._copies[number] for number in numbers], [sources[number] for number in numbers], non_blocking=True
            )
        for device in {device for device, _ in together if device.type == "cuda"}:
            torch.cuda.synchronize(device)
        return [replace(fragment, tensor=copy) for fragment, copy in zip(fragments, self._copies, strict=True)]

    def _reserve(self, sources: list[Tensor]) -> None:
        shapes = [(source.shape, source.dtype) for source in sources]
        if shapes == self._shapes:
            return
        self._copies = []  # the old block goes before the new one comes
        sizes = [-(-source.nbytes // _ALIGNMENT) * _ALIGNMENT for source in sources]
        pinned = any(source.is_cuda for source in sources)
        block = torch.zeros(sum(sizes), dtype=torch.uint8, pin_memory=pinned)  # zeros: so that it is really there
        place = 0
        for source, size in zip(sources, sizes, strict=True):
            self._copies.append(block[place : place + source.nbytes].view(source.dtype).view(source.shape))
            place += size
        self._shapes = shapes
