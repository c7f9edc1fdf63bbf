"""Pages: well-formed, escaped, complete in themselves, and drawn by a browser."""

from __future__ import annotations

import base64
import errno
import math
import os
import random
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.config import HarnessError
from harness.report import (
    Page,
    Series,
    bar_chart,
    format_bytes,
    format_number,
    format_seconds,
    histogram,
    line_chart,
    scatter,
)
from tests.report.browser import open_page
from tests.report.reading import Document, read_html

HOSTILE = "</script><img src=x onerror=alert(1)> & \"quoted\" 'too' <!-- {{}} ]]> größer ∞"


def read(page: Page) -> Document:
    return read_html(page.html())


def full_page(text: str = HOSTILE) -> Page:
    """Everything that a page can hold, with `text` wherever text goes."""
    page = Page(text, subtitle=text)
    for _ in range(4):
        page.section(text)
    page.text(text)
    page.facts({text: text, "count": 1_234_567})
    page.table([text, "n"], [[text, number] for number in (3, None, 20, math.nan, 1)], caption=text, align="pr")
    page.code(text, text)
    page.code(text + "\n" * 50, text)
    steps = [1.0, 2.0, 4.0]
    series = Series(text, steps, [3.0, 2.0, 1.5], [2.5, 1.8, 1.2], [3.5, 2.2, 1.8], hover=[text] * 3)
    marks = {text: 2.0}
    page.figure(line_chart([series], text, text, log_x=True, vertical=marks, horizontal=marks), text)
    page.figure(scatter([series], text, text, curves=[series], log_y=True, vertical=marks), text)
    page.figure(histogram([0, 1, 2, 3], {text: [1, 2, 3]}, text, text, vertical=marks), text)
    page.figure(bar_chart([text, "b", "c"], {text: steps, "other": steps}, text, text, texts=[text] * 3), text)
    return page


def test_a_plain_page() -> None:
    page = Page("Loss & more")
    page.section("A first section")
    page.text("2 < 3")
    document = read(page)
    assert document.texts == {
        "title": ["Loss & more"],
        "h1": ["Loss & more"],
        "h2": ["A first section"],
        "p": ["2 < 3"],
    }
    assert ("h2", "id", "a-first-section") in document.attributes
    assert len(page.html()) < 20_000, "a page without figures needs no plotly"


def test_contents_of_more_than_three_sections() -> None:
    page = Page("title")
    for title in ("Time", "Budget", "Time"):
        page.section(title)
    assert "nav" not in read(page).tags
    page.section("¡!")
    document = read(page)
    assert document.texts["a"] == ["Time", "Budget", "Time", "¡!"]
    links = [value for tag, name, value in document.attributes if (tag, name) == ("a", "href")]
    anchors = [value for tag, name, value in document.attributes if (tag, name) == ("h2", "id")]
    assert links == [f"#{anchor}" for anchor in anchors]
    assert len(set(anchors)) == 4


def test_hostile_text_is_only_text() -> None:
    document = read(full_page())
    assert "img" not in document.tags
    assert not [name for _, name, _ in document.attributes if name.startswith("on")]
    for tag in ("title", "h1", "h2", "dt", "dd", "td", "th", "a", "summary"):
        assert any(text.startswith(HOSTILE) for text in document.texts[tag]), tag
    assert document.texts["figcaption"] == [HOSTILE] * 6
    assert document.texts["code"] == [HOSTILE, HOSTILE + "\n" * 50]
    # In a figure plotly reads markup, so there it is escaped once more.
    line = document.figures[0]
    assert line["data"][1]["name"].startswith("&lt;/script&gt;&lt;img")
    assert "<" not in line["layout"]["xaxis"]["title"]["text"]


def test_hostile_figures_of_other_makers() -> None:
    from plotly.graph_objects import Figure

    page = Page("title")
    page.figure(Figure(layout={"title": {"text": HOSTILE}}))
    document = read(page)
    assert "img" not in document.tags
    assert document.figures[0]["layout"] == {"title": {"text": HOSTILE}}


def test_what_no_file_can_hold(tmp_path: Path) -> None:
    """Lone surrogates, NUL and other control characters, in every place."""
    full_page("a\x00b\x1b[31m\ud800c\td").write(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not set(map(chr, range(32))) - set("\n\t") & set(text)
    assert "a␀b␛[31m?c\td" in read_html(text).texts["td"]


def test_a_page_needs_no_network() -> None:
    from plotly.offline import get_plotlyjs

    document = read(full_page())
    assert document.network_addresses() == []
    assert "link" not in document.tags
    policy = next(v for tag, name, v in document.attributes if (tag, name) == ("meta", "content") and "-src" in v)
    assert policy.startswith("default-src 'none';")
    assert "http:" not in policy
    assert "*" not in policy
    packed = [content for attributes, content in document.scripts if attributes.get("id") == "plotly"]
    assert [zlib.decompress(base64.b64decode(one)).decode() for one in packed] == [get_plotlyjs()]
    for attributes, content in document.scripts:
        if attributes.get("id") != "plotly":
            assert "//" not in content.replace("// ", ""), "an address"


def test_the_reader_of_these_tests_sees_violations() -> None:
    for wrong in ("<p><b>a</p></b>", "<p>", "</p>", "<p id=a id=b></p>"):
        with pytest.raises(AssertionError):
            read_html(wrong)
    addresses = (
        '<img src="//a.b"><a href="http://c"></a><style>@import "x"; a {b: url(y)}</style><p style="c: url(z)"></p>'
    )
    assert len(read_html(addresses).network_addresses()) == 5


NUMBERS: list[tuple[Any, str]] = [
    (0, "0"),
    (1_234_567, "1,234,567"),
    (-1_234, "−1,234"),
    (10**20, "100,000,000,000,000,000,000"),
    (30.0, "30"),
    (-0.0, "0"),
    (0.36, "0.3600"),
    (1234.5678, "1,235"),
    (3.14159, "3.142"),
    (0.00012345, "0.0001234"),
    (1.23456e-05, "1.235×10⁻⁵"),
    (1.5e200, "1.500×10²⁰⁰"),
    (math.nan, "NaN"),
    (math.inf, "∞"),
    (-math.inf, "−∞"),
    (None, "–"),
    (True, "yes"),
    (np.int64(5_000), "5,000"),
    (np.float32(0.5), "0.5000"),
    (np.float64("nan"), "NaN"),
]


@pytest.mark.parametrize(("value", "expected"), NUMBERS)
def test_numbers(value: Any, expected: str) -> None:
    assert format_number(value) == expected


def test_numbers_read_back() -> None:
    seed = random.randrange(1 << 48)
    r = random.Random(seed)
    for _ in range(2_000):
        value, digits = r.choice([-1, 1]) * 10 ** r.uniform(-12, 20), r.randint(1, 8)
        text = format_number(value, digits).replace(",", "").replace("−", "-").replace("×10", "e")
        back = float(text.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")))
        assert abs(back / value - 1) <= 0.51 * 10 ** (1 - digits), (seed, value, digits)


def test_sizes_and_times() -> None:
    sizes = {0: "0 B", 566: "566 B", 999: "999 B", 1_000: "1 kB", 2_300: "2.30 kB", 47_800_000: "47.8 MB"}
    sizes |= {999_999: "1.00 MB", 3 * 10**12: "3 TB", 4 * 10**15: "4,000 TB"}
    assert {size: format_bytes(size) for size in sizes} == sizes
    times = {0: "0 s", 0.42: "0.420 s", 59.94: "59.9 s", 59.96: "1 min 00 s", 245: "4 min 05 s", 3_599.7: "1 h 00 min"}
    times |= {7_380: "2 h 03 min", 86_400: "1 d 00 h", 10**7: "115 d 17 h"}
    assert {seconds: format_seconds(seconds) for seconds in times} == times
    assert (format_bytes(None), format_seconds(math.nan)) == ("–", "NaN")


def test_facts_keep_the_value_beside_the_text() -> None:
    page = Page("title")
    page.facts({"pairs": 123_456, "score": np.float64(1 / 3), "unit": "12 s", "none": None, "sure": True}, digits=3)
    document = read(page)
    assert document.texts["dt"] == ["pairs", "score", "unit", "none", "sure"]
    assert document.texts["dd"] == ["123,456", "0.333", "12 s", "–", "yes"]
    assert document.data == [("123456", "123,456"), (repr(1 / 3), "0.333")]


def test_tables() -> None:
    page = Page("title")
    rows = [["a", 1, 0.5, None], ["b", None, math.nan, 7], ["c", np.int32(3), -math.inf, "x"]]
    page.table(["name", "count", "score", "mixed"], iter(rows), caption="caption")
    document = read(page)
    assert document.texts["th"] == ["name", "count", "score", "mixed"]
    assert document.texts["td"] == ["a", "1", "0.5000", "–", "b", "–", "NaN", "7", "c", "3", "−∞", "x"]
    classes = [value for tag, name, value in document.attributes if (tag, name) == ("th", "class")]
    assert classes == ["l", "r", "r", "l"]
    page.table(["empty", "table"], [])
    assert read(page).texts["td"][-1] == "none"
    for columns, row, align in ((["a"], [1, 2], "r"), (["a", "b"], [1, 2], "r"), (["a"], [1], "x")):
        with pytest.raises(ValueError):
            page.table(columns, [row], align=align)


def test_long_code_is_folded() -> None:
    page = Page("title")
    page.code("a: 1\nb:\t2", "short")
    assert "details" not in read(page).tags
    page.code("line\n" * 99 + "line", "long")
    document = read(page)
    assert document.texts["summary"] == ["long (100 lines)"]
    assert document.texts["code"] == ["a: 1\nb:\t2", "line\n" * 99 + "line"]


def caption(figure: Any) -> str:
    page = Page("title")
    page.figure(figure, "caption")
    return read(page).texts["figcaption"][0]


def test_what_is_not_drawn_is_said() -> None:
    nan, inf = math.nan, math.inf
    assert caption(line_chart([Series("a", [1, 2], [3, 4])], "x", "y")) == "caption"
    lines = [Series("a", [0, 1, 2, inf], [1, nan, 2, None]), Series("b", [-1], [1])]
    assert caption(line_chart(lines, "x", "y")).startswith("caption (2 values are not drawn")
    assert caption(line_chart(lines, "x", "y", log_x=True)).startswith("caption (4 values")
    assert caption(line_chart(lines, "x", "y", horizontal={"m": nan})).startswith("caption (3 values")
    # A point that the line lacks already counts once.
    band = Series("a", [1, 2, 3, 4], [1, 1, nan, 1], [0, nan, 0, 0.5], [2, 2, nan, inf])
    assert caption(line_chart([band], "x", "y")).startswith("caption (3 values")
    assert caption(line_chart([band], "x", "y", log_y=True)).startswith("caption (4 values")
    assert caption(scatter([band], "x", "y")).startswith("caption (3 values")
    assert caption(histogram([-inf, 0, 1, 2], {"a": [1, 2, nan]}, "x", "y")).startswith("caption (2 values")
    assert caption(histogram([0, 1, 2], {"a": [1, 0]}, "x", "y", log_y=True)) == "caption"
    assert "(1 value is not drawn" in caption(bar_chart(["a", "b"], {"n": [None, 1]}, "x"))


def test_figures_of_other_makers() -> None:
    """Arrays, dates and names on the axes, several axes, traces without x and y."""
    from plotly.graph_objects import Figure

    figure = Figure(layout={"xaxis2": {"type": "log"}, "meta": 7})
    figure.add_scatter(
        x=np.array(["2024-01-01", "2024-02-01"], dtype="datetime64[D]"), y=np.array([1.0, np.nan]), meta=9
    )
    figure.add_scatter(x=["a", "b", "c"], y=[0, -1, None])
    figure.add_scatter(x=np.array([0, 1]), y=np.array([1, 2]), xaxis="x2")
    figure.add_pie(labels=["a"], values=[1])
    assert caption(figure).startswith("caption (3 values are not drawn")


def test_a_band_is_closed_and_has_gaps() -> None:
    band = Series("a", [1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [0, 1, math.nan, 3, 4], [2, 3, 4, 5, 6])
    page = Page("title")
    page.figure(line_chart([band], "x", "y"))
    outline, line = read(page).figures[0]["data"]
    assert outline["x"] == [1, 2, 2, 1, None, 4, 5, 5, 4, None]
    assert outline["y"] == [2, 3, 1, 0, None, 5, 6, 4, 3, None]
    assert (line["x"], line["y"]) == ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5])
    assert outline["fillcolor"].startswith("rgba(0,114,178,")
    assert line["line"]["color"] == "#0072B2"


def test_points_and_their_fit_share_a_colour() -> None:
    points = [Series("a", *np.array([[1, 2], [3, 4], [2, 2], [6, 7]])), Series("b", [1], [2])]
    page = Page("title")
    page.figure(scatter(points, "x", "y", curves=[Series("fit of b", [1, 2], [2, 2], color=1)]))
    fit, first, second = read(page).figures[0]["data"]
    assert fit["line"]["color"] == second["marker"]["color"] != first["marker"]["color"]
    assert (first["error_y"]["array"], first["error_y"]["arrayminus"]) == ([3, 3], [1, 2])


def test_bins_have_their_own_widths() -> None:
    page = Page("title")
    page.figure(histogram([0, 1, 3, 7], {"all": [5, 6, 7], "part": [1, 2, 3]}, "x", "y", vertical={"line": 2}))
    figure = read(page).figures[0]
    whole, part = figure["data"]
    assert (whole["x"], whole["width"], whole["y"]) == ([0.5, 2, 5], [1, 2, 4], [5, 6, 7])
    assert part["y"] == [1, 2, 3]
    assert [(shape["x0"], shape["x1"]) for shape in figure["layout"]["shapes"]] == [(2, 2)]


@pytest.mark.parametrize("log", [False, True])
def test_marks_are_where_their_values_are(log: bool) -> None:
    """On a logarithmic axis plotly wants a line's value, but the logarithm of a text's."""
    line = Series("a", [10, 1_000], [10, 1_000])
    page = Page("title")
    marks: dict[str, Any] = {"vertical": {"v": 100, "w": 900}, "horizontal": {"h": 10}}
    page.figure(line_chart([line], "x", "y", log_x=log, log_y=log, **marks))
    layout = read(page).figures[0]["layout"]
    assert [(shape["x0"], shape["y0"]) for shape in layout["shapes"]] == [(100, 0), (900, 0), (0, 10)]
    v, w, h = layout["annotations"]
    assert (v["x"], w["x"], h["y"]) == pytest.approx((2, math.log10(900), 1) if log else (100, 900, 10))
    assert (v["xanchor"], w["xanchor"]) == ("left", "right")


def test_ragged_figures_are_refused() -> None:
    with pytest.raises(ValueError, match="2 x but 1 y"):
        Series("a", [1, 2], [1])
    with pytest.raises(ValueError, match="both"):
        Series("a", [1], [1], lower=[0])
    with pytest.raises(ValueError, match="2 counts for 1 bins"):
        histogram([0, 1], {"a": [1, 2]}, "x", "y")
    with pytest.raises(ValueError, match="1 values for 2 labels"):
        bar_chart(["a", "b"], {"n": [1]}, "x")


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, page = tmp_path / "page.html", Page("new")
    path.write_text("old")
    with pytest.raises(HarnessError, match=r"nowhere/page.html: the page cannot be written: No such file"):
        page.write(tmp_path / "nowhere" / "page.html")
    (tmp_path / "folder").mkdir()
    with pytest.raises(HarnessError, match=r"folder: the page cannot be written: Is a directory"):
        page.write(tmp_path / "folder")

    def full_disk(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(HarnessError, match="No space left"):
            page.write(path)
    assert path.read_text() == "old"
    page.write(path)
    assert path.read_text(encoding="utf-8") == page.html()


def test_pages_are_the_same_every_time() -> None:
    assert full_page().html() == full_page().html()


def test_plotly_is_imported_where_it_is_needed() -> None:
    code = "import sys, harness.report as r; r.Page('a').html(); raise SystemExit('plotly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


SORT = """(() => {
  const table = document.querySelector("table");
  const column = () => Array.from(table.tBodies[0].rows, (row) => row.cells[1].textContent);
  const button = table.tHead.rows[0].cells[1].querySelector("button");
  const orders = [column()];
  for (let i = 0; i < 2; i++) { button.click(); orders.push(column()); }
  return orders;
})()"""
LOOKS = f"""({{
  sorted: {SORT},
  width: document.documentElement.scrollWidth,
  ink: getComputedStyle(document.querySelector(".xtick text")).fill,
  ticks: document.querySelectorAll(".plot")[3].querySelector(".ytick text").textContent,
  images: document.images.length,
  buttons: Array.from(document.querySelectorAll(".plot")[0].querySelectorAll(".modebar-btn"), (b) => b.dataset.title),
}})"""


@pytest.mark.parametrize(("width_px", "dark"), [(400, True), (1280, False)])
def test_a_browser_draws_it(tmp_path: Path, width_px: int, dark: bool) -> None:
    """All figures in the reader's colours, nothing wider than the screen, tables sorted by clicks, no complaint."""
    path = tmp_path / "page.html"
    full_page().write(path)
    opened = open_page(path, width_px=width_px, dark=dark, probe=LOOKS)
    assert opened.console == []
    assert opened.drawn == opened.plots == 4
    seen = opened.probed
    assert seen["sorted"] == [["3", "–", "20", "NaN", "1"], ["20", "3", "1", "–", "NaN"], ["1", "3", "20", "–", "NaN"]]
    assert seen["width"] == width_px
    assert seen["ink"] == ("rgb(163, 172, 184)" if dark else "rgb(91, 101, 114)")
    assert seen["ticks"] == f"{HOSTILE[:13]}…{HOSTILE[-13:]}"
    assert seen["images"] == 0
    # Of plotly's own buttons one would send the figure away; on a narrow screen all would hide the legend.
    assert seen["buttons"] == ([] if width_px == 400 else ["Download plot as a PNG", "Zoom", "Pan", "Reset axes"])


def test_a_browser_sees_what_goes_wrong(tmp_path: Path) -> None:
    """An error in a script, a request that the page's policy refuses, and a figure that plotly was not there for."""
    page, path = Page("title"), tmp_path / "page.html"
    page.figure(line_chart([Series("a", [1, 2], [3, 4])], "x", "y"))
    page.write(path)
    text = path.read_text(encoding="utf-8")
    packed = text.index('id="plotly">') + len('id="plotly">')
    text = text[:packed] + "AAAA" + text[text.index("</script>", packed) :]
    path.write_text(text.replace("</main>", '<img src="http://localhost/x.png"></main><script>nothing()</script>'))
    opened = open_page(path, probe="document.querySelector('.plot').textContent")
    assert (opened.plots, opened.drawn) == (1, 0)
    assert opened.probed.startswith("This figure could not be drawn: ")
    for complaint in ("nothing is not defined", "Content Security Policy"):
        assert any(complaint in line for line in opened.console), opened.console
