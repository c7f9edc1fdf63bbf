"""What has no place on a figure's axes: it leaves a gap, is counted, and the figure's caption says so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .numbers import is_number

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

LEFT_OUT = "harness_left_out"


def count_left_out(figure: Figure) -> int:
    """How many points, bounds and marks are not drawn: not finite, or not positive on a logarithmic axis.

    A bar of no height is not drawn on a logarithmic axis either, and rightly so.
    """
    count = _noted(figure.layout)
    for trace in figure.data:
        count += _noted(trace)
        if trace.type == "scatter" and trace.fill != "toself":
            logs = [
                figure.layout[(name or letter).replace(letter, f"{letter}axis")].type == "log"
                for letter, name in (("x", trace.xaxis), ("y", trace.yaxis))
            ]
        elif trace.type == "bar":
            logs = [False, False]
        else:
            continue
        for point in zip(values_of(trace.x), values_of(trace.y), strict=False):
            # A text or a date has its place on an axis of its own kind.
            both = zip(point, logs, strict=True)
            count += not all(is_drawn(v, log) or not (v is None or is_number(v)) for v, log in both)
    return count


def is_drawn(value: Any, log: bool) -> bool:
    """Whether there is a place for it on an axis."""
    return is_finite(value) and (not log or value > 0)


def is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def plain_numbers(values: Sequence[Any]) -> list[float | None]:
    """Numbers of Python's own, None for what is not finite: plotly would pack arrays into a binary form."""
    return [float(value) if is_finite(value) else None for value in values]


def values_of(values: Any) -> Sequence[Any]:
    """A trace's, which has None for no values."""
    return () if values is None else values


def note_left_out(place: Any, count: int) -> None:
    """Keep with a trace or a layout how many of its bands', error bars' or marks' values are left out already."""
    place.meta = {LEFT_OUT: count}


def _noted(place: Any) -> int:
    return place.meta[LEFT_OUT] if isinstance(place.meta, dict) and LEFT_OUT in place.meta else 0
