"""How figures look: one palette for all, one template for light pages and one for dark ones.

The palette is Okabe and Ito's, which people with any kind of colour vision can tell apart ("Color Universal Design",
2008), without its black and its yellow, which vanish on a dark or a light page. The colours also differ in dash and
symbol. page.js puts the template of the reader's colour scheme into each figure.
"""

from __future__ import annotations

from typing import Any

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
NEUTRAL = "#9AA3AD"
"""For the whole of which something coloured is a part."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif"


def templates() -> dict[str, dict[str, Any]]:
    """plotly's templates, by colour scheme: light and dark."""
    return {
        "light": _template(ink="#22272e", muted="#5b6572", grid="#e6e8eb", axis="#aab1ba", surface="#ffffff"),
        "dark": _template(ink="#e4e7eb", muted="#a3acb8", grid="#2b3138", axis="#59626d", surface="#1b1f24"),
    }


def _template(ink: str, muted: str, grid: str, axis: str, surface: str) -> dict[str, Any]:
    axes = {
        "gridcolor": grid,
        "linecolor": axis,
        "tickcolor": axis,
        "zerolinecolor": axis,
        "tickfont": {"color": muted},
        "title": {"font": {"color": muted}, "standoff": 10},
        "automargin": True,
        "ticks": "outside",
        "ticklen": 4,
    }
    layout = {
        "font": {"family": FONT, "size": 13, "color": ink},
        "colorway": list(PALETTE),
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 48, "r": 12, "t": 36, "b": 44},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"color": ink}},
        "hoverlabel": {"bgcolor": surface, "bordercolor": axis, "font": {"color": ink, "family": FONT}},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": axis, "activecolor": ink},
        "shapedefaults": {"line": {"color": ink, "width": 1.5, "dash": "dot"}},
        "annotationdefaults": {"font": {"color": ink, "size": 12}, "showarrow": False},
        "xaxis": axes,
        "yaxis": {**axes, "zeroline": False},
        "bargap": 0.25,
    }
    return {"layout": layout}
