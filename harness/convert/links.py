"""How the tensors of another format and ours are one another's: boxes of the one, transposed or not, are boxes of the
other. One list of links a model serves both directions, whole tensors and any slice of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import prod

from torch import Tensor

from harness.checkpoint import Box, cover_problem


@dataclass(frozen=True)
class Link:
    """Elements that two formats share: `ours[our_box] == theirs[their_box]`, the latter without its leading dimensions
    of size 1 where it has more than ours, and transposed if `transposed`."""

    ours: str
    our_box: Box
    theirs: str
    their_box: Box
    transposed: bool = False

    def translate(self, part: Box) -> Box:
        """Where a part of `our_box` lies in their tensor; both in the coordinates of the whole tensors."""
        steps = [start - base for start, base in zip(part.offsets, self.our_box.offsets, strict=True)]
        sizes = list(part.shape)
        if self.transposed:
            steps, sizes = steps[::-1], sizes[::-1]
        leading = len(self.their_box.shape) - len(sizes)
        offsets = [base + step for base, step in zip(self.their_box.offsets, [0] * leading + steps, strict=True)]
        return Box(tuple(offsets), (1,) * leading + tuple(sizes))

    def as_ours(self, theirs: Tensor) -> Tensor:
        """A view of (a part of) their box, in the orientation of ours."""
        view = theirs[(0,) * (theirs.dim() - len(self.our_box.shape))]
        return view.mT if self.transposed else view

    def as_theirs(self, ours: Tensor) -> Tensor:
        """A view of (a part of) our box, in the orientation of theirs."""
        view = ours.mT if self.transposed else ours
        return view[(None,) * (len(self.their_box.shape) - view.dim())]


class Links:
    """All links of one model: which of our tensors are made of which of theirs.

    Raises ValueError where they do not tile every tensor on both sides: a table that is wrong, not an input.
    """

    def __init__(self, links: Iterable[Link]) -> None:
        self._links = list(links)
        self.by_ours: dict[str, list[Link]] = defaultdict(list)
        self.by_theirs: dict[str, list[Link]] = defaultdict(list)
        for link in self._links:
            if prod(link.our_box.shape) != prod(link.their_box.shape):
                raise ValueError(f"{link.ours} and {link.theirs}: {link.our_box} is not {link.their_box}")
            self.by_ours[link.ours].append(link)
            self.by_theirs[link.theirs].append(link)
        self.our_shapes = {name: _extent([one.our_box for one in links]) for name, links in self.by_ours.items()}
        self.their_shapes = {name: _extent([one.their_box for one in links]) for name, links in self.by_theirs.items()}

    def renamed(self, rename: Callable[[str], str]) -> Links:
        """The same, where their tensors have other names."""
        return Links(replace(link, theirs=rename(link.theirs)) for link in self._links)


def _extent(boxes: list[Box]) -> tuple[int, ...]:
    """The shape that boxes tile."""
    ends = ([start + size for start, size in zip(box.offsets, box.shape, strict=True)] for box in boxes)
    shape = tuple(map(max, zip(*ends, strict=True)))
    problem = cover_problem(shape, boxes)
    if problem:
        raise ValueError(problem)
    return shape
