"""The page of a selection has everything that its summary has."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from harness.config import HarnessError
from harness.report import format_number, format_seconds
from harness.selection.report import thin_bins, write_report
from tests.report.browser import open_page
from tests.report.reading import Document, read_html

HOSTILE = "</script><img src=x onerror=alert(1)>"


def draw_row(r: random.Random, number: int) -> dict[str, Any]:
    text = f"# {number} {HOSTILE}\n\tdef f():\n" + "word " * r.randint(0, 50)
    return {
        "id": f"doc-{number}{HOSTILE}",
        "score": r.random(),
        "bytes": r.randint(1, 10**6),
        "source": "a",
        "text": text,
    }


def draw_summary(r: random.Random, targets: int = 2) -> dict[str, Any]:
    """Random numbers, so large that none is on the page by accident."""

    def count() -> int:
        return r.randint(10**6, 10**9)

    names = [f"target {number} {HOSTILE}" for number in range(targets)]
    edges = [number / 300 for number in range(301)]
    documents = {name: [0] * 40 + [r.randint(0, 900) for _ in range(200)] + [0] * 60 for name in names}
    return {
        "title": f"Selection {HOSTILE}",
        "method": {"method": "ncd", "compressor": "gzip", "level": 9, "window_bytes": 4_321, "windows": "max"},
        "targets": [{"name": n, "documents": count(), "bytes": count(), "share": 1 / targets} for n in names],
        "budget": {"unit": "tokens", "wanted": count(), "chosen": count()},
        "pool": {
            **{key: count() for key in ("files", "documents", "bytes", "tokens", "empty")},
            "skipped": {f"reason {HOSTILE}": count(), "another": count()},
            **{key: count() for key in ("duplicates_exact", "duplicates_near", "leaks")},
        },
        "chosen": {key: count() for key in ("documents", "bytes", "tokens")},
        "thresholds": {name: r.uniform(0.3, 0.6) for name in names},
        "histogram": {
            name: {"edges": edges, "documents": documents[name], "chosen": [n // 3 for n in documents[name]]}
            for name in names
        },
        "by_source": [
            {
                "source": f"file {number} {HOSTILE}",
                **{key: count() for key in ("documents", "chosen", "bytes", "chosen_bytes")},
            }
            for number in range(30)
        ],
        "by_length": [
            {"from_bytes": 2**k, "to_bytes": 2 ** (k + 1) if k < 20 else None, "documents": count(), "chosen": count()}
            for k in range(6, 21)
        ],
        "best": [draw_row(r, number) for number in range(5)],
        "last_chosen": [draw_row(r, number) for number in range(5, 8)],
        "first_rejected": [draw_row(r, number) for number in range(8, 11)],
        "pairs": {"evaluated": count(), "all": count()},
        "recall": {"estimate": 0.99871, "lower_95": 0.99123, "audited": count(), "missed": count()},
        "time": {"wall_seconds": 4_000.0, "cpu_seconds": 7_777.0, "workers": 17, "implementation": "native: it agrees"},
        "config": f"select:\n  method: ncd # {HOSTILE}\n",
    }


def write(folder: Path, summary: dict[str, Any]) -> Document:
    write_report(folder, summary)
    return read_html((folder / "report.html").read_text(encoding="utf-8"))


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list) else [value]


def test_everything_is_on_the_page(tmp_path: Path) -> None:
    seed = random.randrange(1 << 48)
    summary = draw_summary(random.Random(seed))
    document = write(tmp_path, summary)
    assert "img" not in document.tags
    assert document.network_addresses() == []
    shown = "\n".join(text for texts in document.texts.values() for text in texts)
    exact = {value for value, _ in document.data}
    recall, time = summary.pop("recall"), summary.pop("time")
    histograms, shares = summary.pop("histogram"), [target.pop("share") for target in summary["targets"]]
    for leaf in leaves(summary):
        if isinstance(leaf, str):
            assert leaf in shown, (seed, leaf)
        elif leaf is not None:
            assert f"{leaf:,}" in shown if isinstance(leaf, int) else repr(leaf) in exact, (seed, leaf)
    for text in ("99.87 %", "99.12 %", f"{recall['audited']:,}", f"{recall['missed']:,}", "1 h 06 min", "2 h 09 min"):
        assert text in shown, (seed, text)
    assert [format_seconds(time[key]) for key in ("wall_seconds", "cpu_seconds")] == ["1 h 06 min", "2 h 09 min"]
    assert {"17", *(repr(100 * share) for share in shares)} <= exact
    assert "native: it agrees" in shown
    for drawn, (name, counts) in zip(document.figures, histograms.items(), strict=False):
        for trace, key in zip(drawn["data"], ("documents", "chosen"), strict=True):
            assert sum(trace["y"]) == sum(counts[key]), (seed, name)
        assert drawn["layout"]["shapes"][0]["x0"] == summary["thresholds"][name]


def test_shares_of_sources_and_lengths(tmp_path: Path) -> None:
    summary = draw_summary(random.Random(1))
    summary["by_source"] = [
        {"source": "prose", "documents": 800, "chosen": 20, "bytes": 8_000, "chosen_bytes": 100},
        {"source": "code", "documents": 200, "chosen": 60, "bytes": 1_000, "chosen_bytes": 400},
        {"source": "nothing", "documents": 0, "chosen": 0, "bytes": 0, "chosen_bytes": 0},
    ]
    summary["by_length"] = [
        {"from_bytes": 0, "to_bytes": 100, "documents": 0, "chosen": 0},
        {"from_bytes": 100, "to_bytes": 1024, "documents": 400, "chosen": 1},
        {"from_bytes": 1024, "to_bytes": 4096, "documents": 600, "chosen": 79},
        {"from_bytes": 4096, "to_bytes": None, "documents": 3, "chosen": 0},
    ]
    document = write(tmp_path, summary)
    shares, rates, lengths, length_rates = document.figures[2:]
    assert shares["layout"]["yaxis"]["ticktext"] == ["code", "prose", "nothing"]
    assert [trace["x"] for trace in shares["data"]] == [[20, 80, 0], [75, 25, 0]]
    assert rates["data"][0]["x"] == [30, 2.5, None]
    assert lengths["layout"]["xaxis"]["ticktext"] == ["0 – 100 B", "100 B – 1 KiB", "1 – 4 KiB", "from 4 KiB"]
    assert [trace["y"] for trace in lengths["data"]] == [[0, 400, 600, 3], [0, 1, 79, 0]]
    assert length_rates["data"][0]["y"] == pytest.approx([None, 0.25, 100 * 79 / 600, 0])
    assert {"30", "2.50", "40", "1.25"} <= set(document.texts["td"])


def test_an_exact_run_of_one_target(tmp_path: Path) -> None:
    """No audit, no tokens, no level, whole documents, a budget that is a score."""
    summary = draw_summary(random.Random(2), targets=1)
    summary["recall"] = summary["pool"]["tokens"] = summary["chosen"]["tokens"] = None
    summary["method"] = {"method": "gain", "compressor": "lz4", "level": None, "window_bytes": None, "windows": "mean"}
    summary["budget"] = {"unit": "threshold", "wanted": 0.25, "chosen": 12}
    shown = write(tmp_path, summary).texts
    assert "the choice is exact" in "".join(shown["p"])
    assert "gain over lz4, whole documents" in shown["p"][0]
    assert {"scores from 0.2500 on", "12 documents", "–"} <= set(shown["dd"])
    assert "target" not in shown["th"][-10:]


def test_nothing_at_all(tmp_path: Path) -> None:
    """An empty pool, and a page all the same."""
    summary = draw_summary(random.Random(3), targets=1)
    name = summary["targets"][0]["name"]
    summary["histogram"][name] = {"edges": [0, 0.5, 1], "documents": [0, 0], "chosen": [0, 0]}
    summary["thresholds"] = {}
    for key in ("by_source", "by_length", "best", "last_chosen", "first_rejected"):
        summary[key] = []
    for part in ("pool", "chosen", "pairs"):
        summary[part] = {key: {} if key == "skipped" else 0 for key in summary[part]}
    document = write(tmp_path, summary)
    assert document.figures == []
    assert document.texts["td"].count("none") == 5
    assert f"No document has a score for {name}." in document.texts["p"]


def test_bins_lose_nothing() -> None:
    seed = random.randrange(1 << 48)
    r = random.Random(seed)
    for _ in range(300):
        size, most = r.randint(1, 400), r.randint(1, 50)
        documents = [r.choice([0, 0, r.randint(1, 9)]) for _ in range(size)]
        chosen = [r.randint(0, count) for count in documents]
        edges, thin = thin_bins(list(range(size + 1)), [documents, chosen], most)
        assert [sum(part) for part in thin] == [sum(documents), sum(chosen)], seed
        assert len(thin[0]) == len(thin[1]) == max(0, len(edges) - 1) <= most, seed
        for low, high, part in zip(edges, edges[1:], thin[0], strict=False):
            assert sum(documents[low:high]) == part, seed
        if any(documents):
            assert documents[edges[0]] > 0 < documents[edges[-1] - 1], seed


def test_a_small_choice_of_a_large_pool_can_be_seen(tmp_path: Path) -> None:
    summary = draw_summary(random.Random(4), targets=1)
    for counts in summary["histogram"].values():
        counts["chosen"] = [min(count, 1) for count in counts["documents"]]
    axis = write(tmp_path, summary).figures[0]["layout"]["yaxis"]
    assert (axis["type"], axis["title"]["text"]) == ("log", "documents, logarithmic")


def test_examples_of_several_targets(tmp_path: Path) -> None:
    summary = draw_summary(random.Random(5))
    for row in summary["best"]:
        row["target"] = "the second"
    document = write(tmp_path, summary)
    assert document.texts["td"].count("the second") == 5
    assert document.texts["td"].count(summary["best"][0]["text"]) == 1


def test_the_recall_sentence(tmp_path: Path) -> None:
    summary = draw_summary(random.Random(6))
    summary["recall"] = {"estimate": 1.0, "lower_95": 0.999, "audited": 3_000, "missed": 0}
    sentence = next(text for text in write(tmp_path, summary).texts["p"] if "drawn at random" in text)
    assert "3,000 drawn at random" in sentence
    assert "none of them belonged" in sentence
    assert f"estimated {format_number(100)} %" in sentence
    assert "at least 99.90 %" in sentence


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match=r"nowhere/report.html: the page cannot be written"):
        write_report(tmp_path / "nowhere", draw_summary(random.Random(7)))


def test_a_browser_draws_it(tmp_path: Path) -> None:
    """Also on a narrow screen, with its figures and without a complaint."""
    write(tmp_path, draw_summary(random.Random()))
    width = "document.documentElement.scrollWidth"
    opened = open_page(tmp_path / "report.html", width_px=400, probe=width, screenshot=tmp_path / "report.png")
    assert opened.console == []
    assert opened.drawn == opened.plots == 6
    assert opened.probed == 400
    assert (tmp_path / "report.png").stat().st_size > 10_000
