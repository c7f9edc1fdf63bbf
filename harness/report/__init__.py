"""The one writer of HTML pages: a page is one file that needs no network, with figures by plotly.

In: titles, text, numbers, rows and figures. Out: the file. Read page.py first (what can be on a page), then charts.py
(the figures that reports share); page.css and page.js are the page's own style and program.
"""

from .charts import Series, bar_chart, histogram, line_chart, scatter
from .numbers import format_bytes, format_number, format_seconds
from .page import Page

__all__ = [
    "Page",
    "Series",
    "bar_chart",
    "format_bytes",
    "format_number",
    "format_seconds",
    "histogram",
    "line_chart",
    "scatter",
]
