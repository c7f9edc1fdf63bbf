"""A page of HTML: one file, complete in itself.

plotly.js is inlined once, where there is a figure, and compressed: 2.0 MB instead of 4.8 (plotly's package brings no
smaller one). The browser unpacks it, which Chrome can do since 80, Safari since 16.4 and Firefox since 113. The page's
own security policy forbids the browser every request to a network.
"""

from __future__ import annotations

import base64
import functools
import html
import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.config import HarnessError
from harness.disk import write_whole

from .gaps import count_left_out
from .numbers import format_number, is_number, scalar
from .style import templates

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "form-action 'none'; base-uri 'none'"
)
SECTIONS_WITHOUT_CONTENTS = 3
"""With more sections than these there is a table of contents."""
ROWS_IN_VIEW = 16
"""A longer table scrolls in a box of its own, except on paper."""
LINES_IN_VIEW = 24
"""Longer code is folded away."""
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}
"""Control characters to the pictures that Unicode has of them: HTML knows no way to write the characters themselves."""


class Page:
    """What is added to it appears in that order. All text is escaped; `write` makes the file."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title, self.subtitle = title, subtitle
        self._body: list[str] = []
        self._sections: dict[str, str] = {}
        """Titles by their anchors."""
        self._figures = 0

    def section(self, title: str) -> None:
        """A heading; its anchor is its own words."""
        words = re.sub(r"\W+", "-", title.lower()).strip("-") or "section"
        anchor, number = words, 1
        while anchor in self._sections:
            number += 1
            anchor = f"{words}-{number}"
        self._sections[anchor] = title
        self._body.append(f'<h2 id="{escape(anchor)}">{escape(title)}</h2>')

    def text(self, paragraph: str) -> None:
        self._body.append(f"<p>{escape(paragraph)}</p>")

    def facts(self, values: Mapping[str, Any], digits: int = 4) -> None:
        """Names with their values; units are the caller's, in the name or in a value that is text.

        Numbers get thousands separators, fractions `digits` significant digits.
        """
        pairs = (
            f"<div><dt>{escape(name)}</dt><dd>{_value(value, digits)}</dd></div>" for name, value in values.items()
        )
        self._body.append(f'<dl class="facts">{"".join(pairs)}</dl>')

    def table(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence[Any]],
        caption: str = "",
        align: str = "",
        digits: int = 4,
    ) -> None:
        """Rows under column heads, which sort by a click.

        `align` has a letter for each column: l, r or c, or p for preformatted text (code, documents). By default
        columns of numbers are right-aligned, all others left. Numbers are shown as in `facts`.
        """
        body = [list(row) for row in rows]
        align = align or "".join(_alignment([row[place] for row in body]) for place in range(len(columns)))
        if len(align) != len(columns) or set(align) - set("lrcp"):
            raise ValueError(f"align {align!r}: needs one letter of l, r, c, p for each of {len(columns)} columns")
        heads = "".join(f'<th class="{a}" scope="col">{escape(c)}</th>' for a, c in zip(align, columns, strict=True))
        lines = [
            "".join(f'<td class="{a}">{_value(v, digits)}</td>' for a, v in zip(align, row, strict=True))
            for row in body
        ]
        if not lines:
            lines = [f'<td class="l" colspan="{len(columns)}">none</td>']
        tall = " tall" if len(body) > ROWS_IN_VIEW or "p" in align else ""
        name = f' role="region" aria-label="{escape(caption)}"' if caption else ""
        self._body.append(
            f'<figure class="table">{_caption(caption)}<div class="scroll{tall}" tabindex="0"{name}><table>'
            f"<thead><tr>{heads}</tr></thead><tbody>{''.join(f'<tr>{line}</tr>' for line in lines)}</tbody>"
            "</table></div></figure>"
        )

    def figure(self, fig: Figure, caption: str = "", height_px: int = 360) -> None:
        """A figure of plotly's; how many of its points have no place on its axes is said in the caption."""
        self._figures += 1
        if left_out := count_left_out(fig):
            what = (
                "1 value is not drawn, which is" if left_out == 1 else f"{left_out:,} values are not drawn, which are"
            )
            caption = f"{caption} ({what} not finite, or not positive on a logarithmic axis.)".lstrip()
        self._body.append(
            f'<figure class="chart"><div class="plot" id="figure-{self._figures}" style="height:{height_px:d}px" '
            f'role="img" aria-label="{escape(caption)}"></div>{_json_element(_plain_figure(fig), "figure")}'
            f"{_caption(caption)}</figure>"
        )

    def code(self, text: str, caption: str = "") -> None:
        """Preformatted text, folded away where it is long."""
        lines = text.count("\n") + 1
        block = f'<pre tabindex="0"><code>{escape(text)}</code></pre>'
        if lines <= LINES_IN_VIEW:
            self._body.append(f'<figure class="code">{_caption(caption)}{block}</figure>')
            return
        summary = f"{escape(caption)} ({lines:,} lines)" if caption else f"{lines:,} lines"
        self._body.append(f'<details class="code"><summary>{summary}</summary>{block}</details>')

    def html(self) -> str:
        """The whole page."""
        subtitle = f'<p class="subtitle">{escape(self.subtitle)}</p>' if self.subtitle else ""
        body = [f"<header><h1>{escape(self.title)}</h1>{subtitle}</header>", self._contents(), *self._body]
        if self._figures:
            body.append("<noscript><p>The figures of this page are drawn by JavaScript.</p></noscript>")
        scripts = [f"<script>{_own('page.js')}</script>"]
        if self._figures:
            packed = f'<script type="text/plain" id="plotly">{_packed_plotly()}</script>'
            scripts = [_json_element(templates(), "templates"), packed, *scripts]
        return "\n".join(
            [
                "<!DOCTYPE html>",
                '<html lang="en">',
                '<head><meta charset="utf-8">',
                f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                '<meta name="color-scheme" content="light dark">',
                f"<title>{escape(self.title)}</title>",
                f"<style>{_own('page.css')}</style></head>",
                "<body><main>",
                *filter(None, body),
                "</main>",
                *scripts,
                "</body></html>\n",
            ]
        )

    def write(self, path: Path) -> None:
        """Replace `path`, whole or not at all. HarnessError where it cannot be written."""
        try:
            write_whole(path, self.html().encode("utf-8", "replace"))
        except OSError as error:
            raise HarnessError(f"{path}: the page cannot be written: {error.strerror or error}") from None

    def _contents(self) -> str:
        if len(self._sections) <= SECTIONS_WITHOUT_CONTENTS:
            return ""
        links = (f'<li><a href="#{escape(a)}">{escape(title)}</a></li>' for a, title in self._sections.items())
        return f'<nav aria-label="Contents"><ol>{"".join(links)}</ol></nav>'


def escape(text: str) -> str:
    """For HTML, between tags and in attributes; what no file can hold (a lone surrogate, a NUL) gets a sign instead."""
    return html.escape(text.encode("utf-8", "replace").decode().translate(CONTROLS))


def _value(value: Any, digits: int) -> str:
    """A number keeps its full value beside the text, for sorting and for programs."""
    if isinstance(value, str):
        return escape(value)
    if is_number(value):
        return f'<data value="{scalar(value)!r}">{format_number(value, digits)}</data>'
    return format_number(value, digits) if value is None or isinstance(value, bool) else escape(str(value))


def _alignment(values: list[Any]) -> str:
    known = [value for value in values if value is not None]
    return "r" if known and all(map(is_number, known)) else "l"


def _caption(text: str) -> str:
    return f"<figcaption>{escape(text)}</figcaption>" if text else ""


def _plain_figure(figure: Figure) -> dict[str, Any]:
    plain = json.loads(figure.to_json(engine="json"))
    plain["layout"].pop("template", None)  # the page has its own
    return {"data": plain["data"], "layout": plain["layout"]}


def _json_element(value: Any, kind: str) -> str:
    """JSON that a script reads; no text in it can end the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" class="{kind}">{text}</script>'


def _own(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


@functools.cache
def _packed_plotly() -> str:
    from plotly.offline import get_plotlyjs

    return base64.b64encode(zlib.compress(get_plotlyjs().encode(), 6)).decode()
