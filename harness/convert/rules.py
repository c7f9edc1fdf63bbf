"""What a row of a name table may say: how one of our tensors, or a part of it, lies in one of theirs.

Each rule is a function of the model's section and of our tensor's shape, and gives (our box, their box, transposed).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from harness.checkpoint import Box
from harness.model import ModelSection

from .links import Link, Links

Share = tuple[Box, Box, bool]
Rule = Callable[[ModelSection, tuple[int, ...]], Iterable[Share]]


def whole(shape: tuple[int, ...]) -> Box:
    return Box((0,) * len(shape), shape)


def same(section: ModelSection, shape: tuple[int, ...]) -> Iterator[Share]:
    yield whole(shape), whole(shape), False


def transposed(section: ModelSection, shape: tuple[int, ...]) -> Iterator[Share]:
    """theirs (in, out), ours (out, in)."""
    yield whole(shape), whole(shape[::-1]), True


def _heads(section: ModelSection, part: str) -> Iterator[tuple[int, int, int]]:
    """(first row in our qkv, first row among that part's heads, rows) of runs of query, key or value heads."""
    per_group, width = section.heads // section.key_value_heads, section.head_width
    first, count = {"q": (0, per_group), "k": (per_group, 1), "v": (per_group + 1, 1)}[part]
    for group in range(section.key_value_heads):
        yield (group * (per_group + 2) + first) * width, group * count * width, count * width


def heads(part: str, *, fused: bool = False, flipped: bool = False) -> Rule:
    """The query ("q"), key or value heads of our `attention.qkv`, in order.

    fused: their tensor holds all queries, then all keys, then all values. flipped: it is (in, out).
    """

    def rule(section: ModelSection, shape: tuple[int, ...]) -> Iterator[Share]:
        before = {"q": 0, "k": section.heads, "v": section.heads + section.key_value_heads}[part] if fused else 0
        start = before * section.head_width
        for ours, theirs, rows in _heads(section, part):
            zeros, rest = (0,) * (len(shape) - 1), shape[1:]
            box, other = Box((ours, *zeros), (rows, *rest)), Box((start + theirs, *zeros), (rows, *rest))
            yield box, Box(other.offsets[::-1], other.shape[::-1]) if flipped else other, flipped

    return rule


@dataclass(frozen=True)
class Row:
    """One line of a name table; `{i}` stands for the number of the block."""

    ours: str
    theirs: str
    rule: Rule = same


def link_names(rows: Iterable[Row], section: ModelSection, shapes: Mapping[str, tuple[int, ...]]) -> Links:
    """The links of one model, of which `shapes` are our parameters; rows of parameters that it lacks are left out.

    Raises ValueError where a parameter stands in no row.
    """
    links = []
    for row in rows:
        for number in range(section.layers) if "{i}" in row.ours else (0,):
            ours, theirs = row.ours.format(i=number), row.theirs.format(i=number)
            for our_box, their_box, flipped in row.rule(section, shapes[ours]) if ours in shapes else ():
                links.append(Link(ours, our_box, theirs, their_box, flipped))
    found = Links(links)
    for name, shape in shapes.items():
        if found.our_shapes.get(name) != shape:
            raise ValueError(f"the table gives {name} the shape {found.our_shapes.get(name)}, and the model {shape}")
    return found
