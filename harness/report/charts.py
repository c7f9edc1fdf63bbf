"""The figures that reports share, in one style. Axis titles carry the units; what is not finite leaves a gap."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .gaps import is_drawn, is_finite, note_left_out, plain_numbers, values_of
from .numbers import format_number
from .style import DASHES, NEUTRAL, PALETTE, SYMBOLS

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

LONGEST_LABEL = 48
"""Characters of a name, beyond which its middle is left out."""
LONGEST_TICK = 26
"""Likewise beside an axis, of which a telephone must see something too."""


@dataclass(frozen=True)
class Series:
    """Points that belong together, in the order in which a line joins them."""

    name: str
    x: Sequence[float | None]
    y: Sequence[float | None]
    lower: Sequence[float | None] | None = None
    """Lower bounds, with `upper`: a line's band, or the error bars of points. In the units of y."""
    upper: Sequence[float | None] | None = None
    hover: Sequence[str] | None = None
    """A text for each point, shown beside its numbers."""
    color: int | None = None
    """Place in the palette; by default the series' own place in the chart. Points and their fit share one."""

    def __post_init__(self) -> None:
        parts = {"y": self.y, "lower": self.lower, "upper": self.upper, "hover": self.hover}
        for name, values in parts.items():
            if values is not None and len(values) != len(self.x):
                raise ValueError(f"series {self.name!r}: {len(self.x)} x but {len(values)} {name}")
        if (self.lower is None) != (self.upper is None):
            raise ValueError(f"series {self.name!r}: a band needs both a lower and an upper bound")


def line_chart(
    series: Sequence[Series],
    x_title: str,
    y_title: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    vertical: Mapping[str, float] | None = None,
    horizontal: Mapping[str, float] | None = None,
) -> Figure:
    """Lines, each with its band. `vertical` and `horizontal`: straight lines with a label, at a place of an axis."""
    figure = _figure(x_title, y_title, log_x, log_y)
    for place, one in enumerate(series):
        _add_band(figure, one, place)
        _add_line(figure, one, place)
    figure.update_layout(hovermode="x unified")
    _add_marks(figure, vertical, horizontal, log_x, log_y)
    return figure


def scatter(
    points: Sequence[Series],
    x_title: str,
    y_title: str,
    *,
    curves: Sequence[Series] = (),
    log_x: bool = False,
    log_y: bool = False,
    vertical: Mapping[str, float] | None = None,
    horizontal: Mapping[str, float] | None = None,
) -> Figure:
    """Points with their error bars, and curves with their bands: measurements and fits, residuals, isoflop parabolas.

    A curve takes the colour of the points at its own place, unless it names another.
    """
    figure = _figure(x_title, y_title, log_x, log_y)
    for place, one in enumerate(curves):
        _add_band(figure, one, place)
        _add_line(figure, one, place, dash="solid")
    for place, one in enumerate(points):
        color = _color(one, place)
        marker = {"color": PALETTE[color], "symbol": SYMBOLS[color], "size": 8, "opacity": 0.9}
        bars, missing = _error_bars(one)
        figure.add_scatter(mode="markers", marker=marker, error_y=bars, **_data(one, unified=False))
        note_left_out(figure.data[-1], missing)
    figure.update_layout(hovermode="closest")
    _add_marks(figure, vertical, horizontal, log_x, log_y)
    return figure


def histogram(
    edges: Sequence[float],
    counts: Mapping[str, Sequence[float | None]],
    x_title: str,
    y_title: str,
    *,
    log_y: bool = False,
    vertical: Mapping[str, float] | None = None,
) -> Figure:
    """Bars between `edges`, one more than each of `counts` has. The first is the whole, drawn behind its parts."""
    figure = _figure(x_title, y_title, False, log_y)
    bins = list(pairwise(edges))
    ranges = [f"{format_number(low)} to {format_number(high)}" for low, high in bins]
    finite = [all(map(is_finite, bin_)) for bin_ in bins]
    for place, (name, values) in enumerate(counts.items()):
        if len(values) != len(bins):
            raise ValueError(f"histogram {name!r}: {len(values)} counts for {len(bins)} bins")
        figure.add_bar(
            name=label(name),
            x=[(low + high) / 2 if good else None for (low, high), good in zip(bins, finite, strict=True)],
            width=[high - low if good else 0 for (low, high), good in zip(bins, finite, strict=True)],
            y=plain_numbers(values),
            customdata=ranges,
            marker={"color": _part_color(place), "line": {"width": 0}},
            hovertemplate=f"%{{customdata}}<br>%{{y:,}} · {label(name)}<extra></extra>",
        )
    figure.update_layout(barmode="overlay", showlegend=True)
    _add_marks(figure, vertical, None, False, log_y)
    return figure


def bar_chart(
    labels: Sequence[str],
    values: Mapping[str, Sequence[float | None]],
    value_title: str,
    label_title: str = "",
    *,
    upright: bool = False,
    reference: bool = False,
    overlaid: bool = False,
    log: bool = False,
    texts: Sequence[str] | None = None,
) -> Figure:
    """A bar for each label, from top to bottom; `upright`, from left to right. `texts` stand at the last series' bars.

    Several series stand side by side; with `reference`, the first is grey, what the others are compared with;
    `overlaid`, it is the whole, drawn behind its parts.
    """
    figure = _figure(label_title, value_title, False, log) if upright else _figure(value_title, label_title, log, False)
    shown = [label(text, LONGEST_TICK) for text in labels]
    places = list(range(len(shown)))
    for place, (name, numbers) in enumerate(values.items()):
        if len(numbers) != len(shown):
            raise ValueError(f"bars {name!r}: {len(numbers)} values for {len(shown)} labels")
        across, along = (places, plain_numbers(numbers)) if upright else (plain_numbers(numbers), places)
        last = texts is not None and place == len(values) - 1
        figure.add_bar(
            name=label(name),
            x=across,
            y=along,
            orientation="v" if upright else "h",
            customdata=[label(text, math.inf) for text in labels],
            text=[label(text) for text in texts] if last and texts else None,
            textposition="outside" if last else "none",
            cliponaxis=False,
            marker={"color": _part_color(place + (not (reference or overlaid))), "line": {"width": 0}},
            hovertemplate=f"%{{customdata}}<br>%{{{'y' if upright else 'x'}:,}} · {label(name)}<extra></extra>",
        )
    ticks = {
        "tickmode": "array",
        "tickvals": places,
        "ticktext": shown,
        "showgrid": False,
        "ticklabeloverflow": "allow",
    }
    (figure.update_xaxes if upright else figure.update_yaxes)(**ticks)
    if not upright:
        figure.update_yaxes(autorange="reversed")
    if texts and not log:  # they need room beyond the longest bar
        longest = max((value for value in plain_numbers(numbers) if value is not None), default=0)
        (figure.update_yaxes if upright else figure.update_xaxes)(range=[0, 1.25 * longest or 1])
    figure.update_layout(barmode="overlay" if overlaid else "group", showlegend=len(values) > 1)
    return figure


def label(text: object, longest: float = LONGEST_LABEL) -> str:
    """Text as plotly shows it, which reads a kind of HTML otherwise; a long one without its middle."""
    plain = str(text)
    if len(plain) > longest:
        half = int(longest) // 2
        plain = f"{plain[:half]}…{plain[-half:]}"
    return html.escape(plain, quote=False)


def _figure(x_title: str, y_title: str, log_x: bool, log_y: bool) -> Figure:
    from plotly.graph_objects import Figure

    figure = Figure(layout={"template": {}})
    for update, title, log in ((figure.update_xaxes, x_title, log_x), (figure.update_yaxes, y_title, log_y)):
        update(title_text=label(title, math.inf))
        if log:
            update(type="log", exponentformat="power", minor={"ticks": "outside", "ticklen": 2})
    return figure


def _data(series: Series, unified: bool) -> dict[str, Any]:
    hover = "%{y:.5~g}" if unified else f"{label(series.name)}<br>%{{x:.5~g}}, %{{y:.5~g}}"
    if series.hover is not None:
        hover += "<br>%{customdata}"
    return {
        "name": label(series.name),
        "x": plain_numbers(series.x),
        "y": plain_numbers(series.y),
        "customdata": None if series.hover is None else [label(text, 200) for text in series.hover],
        "hovertemplate": hover if unified else hover + "<extra></extra>",
        "showlegend": True,
    }


def _add_line(figure: Figure, series: Series, place: int, dash: str | None = None) -> None:
    color = _color(series, place)
    line = {"color": PALETTE[color], "width": 2, "dash": dash or DASHES[color]}
    figure.add_scatter(mode="lines", line=line, **_data(series, unified=dash is None))


def _add_band(figure: Figure, series: Series, place: int) -> None:
    """One closed outline for each stretch of points that have both bounds."""
    if series.lower is None or series.upper is None:
        return
    log_x, log_y = (axis.type == "log" for axis in (figure.layout.xaxis, figure.layout.yaxis))
    xs: list[Any] = []
    ys: list[Any] = []
    stretch: list[tuple[Any, Any, Any]] = []
    left_out = 0
    for x, low, high, y in [*zip(series.x, series.lower, series.upper, series.y, strict=True), (None,) * 4]:
        if is_drawn(x, log_x) and is_drawn(low, log_y) and is_drawn(high, log_y):
            stretch.append((x, low, high))
            continue
        left_out += is_drawn(x, log_x) and is_drawn(y, log_y)  # where the line has a gap too, that one counts
        if stretch:
            backwards = stretch[::-1]
            xs += [x for x, _, _ in stretch] + [x for x, _, _ in backwards] + [None]
            ys += [high for _, _, high in stretch] + [low for _, low, _ in backwards] + [None]
            stretch = []
    figure.add_scatter(
        x=xs,
        y=ys,
        fill="toself",
        fillcolor=_with_opacity(PALETTE[_color(series, place)], 0.2),
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
    )
    note_left_out(figure.data[-1], left_out)


def _error_bars(series: Series) -> tuple[dict[str, Any] | None, int]:
    """plotly's, and how many points lack theirs."""
    if series.lower is None or series.upper is None:
        return None, 0
    # plotly takes distances; where one is missing it draws none.
    above = [_less(bound, y) for bound, y in zip(series.upper, series.y, strict=True)]
    below = [_less(y, bound) for bound, y in zip(series.lower, series.y, strict=True)]
    missing = sum(is_finite(y) and None in two for y, *two in zip(series.y, above, below, strict=True))
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1.5}, missing


def _add_marks(
    figure: Figure,
    vertical: Mapping[str, float] | None,
    horizontal: Mapping[str, float] | None,
    log_x: bool,
    log_y: bool,
) -> None:
    # A shape on a logarithmic axis is placed by its value, an annotation by the value's logarithm.
    for name, x in (vertical or {}).items():
        if is_drawn(x, log_x):
            figure.add_shape(type="line", x0=x, x1=x, y0=0, y1=1, yref="y domain", line={})
            at = math.log10(x) if log_x else x
            side = (
                {"xanchor": "right", "xshift": -4} if x > _middle(figure, log_x) else {"xanchor": "left", "xshift": 4}
            )
            figure.add_annotation(text=label(name), x=at, y=1, yref="y domain", yanchor="top", showarrow=False, **side)
    left_out = sum(not is_drawn(x, log_x) for x in (vertical or {}).values())
    for name, y in (horizontal or {}).items():
        if is_drawn(y, log_y):
            figure.add_shape(type="line", y0=y, y1=y, x0=0, x1=1, xref="x domain", line={})
            at = math.log10(y) if log_y else y
            figure.add_annotation(
                text=label(name), y=at, x=1, xref="x domain", xanchor="right", yanchor="bottom", showarrow=False
            )
    left_out += sum(not is_drawn(y, log_y) for y in (horizontal or {}).values())
    note_left_out(figure.layout, left_out)


def _middle(figure: Figure, log: bool) -> float:
    """Of the horizontal axis, to see on which side of a line there is more room."""
    values = [x for trace in figure.data for x in values_of(trace.x) if is_drawn(x, log)] or [1]
    return math.sqrt(min(values) * max(values)) if log else (min(values) + max(values)) / 2


def _less(value: Any, other: Any) -> float | None:
    return float(value) - float(other) if is_finite(value) and is_finite(other) else None


def _color(series: Series, place: int) -> int:
    return (place if series.color is None else series.color) % len(PALETTE)


def _part_color(place: int) -> str:
    return NEUTRAL if place == 0 else PALETTE[(place - 1) % len(PALETTE)]


def _with_opacity(color: str, opacity: float) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"
