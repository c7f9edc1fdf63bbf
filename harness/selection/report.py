"""The page of a selection: what was chosen, where the threshold lies, and how sure the choice is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.report import Page, bar_chart, format_bytes, format_number, format_seconds, histogram

FILE = "report.html"
MOST_BINS = 100
"""Bars of a histogram; finer bins are put together."""
MOST_SOURCES = 20
"""Bars by source; the table has all of them."""
LOGARITHMIC_FROM = 50
"""Counts are drawn on a logarithmic axis where the choice would be this many times lower than the pool."""
Row = Mapping[str, Any]


def write_report(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write `folder`/report.html from a plain summary, all of whose values JSON can hold.

    HarnessError where the file cannot be written. Counts are of documents unless named otherwise; null stands for what
    was not counted. The keys:

    - title
    - method: method (ncd, coverage, gain ...), compressor, level (null where it has none), window_bytes (null for whole
      documents), windows (how their scores are joined: max, mean)
    - targets: a list of {name, documents, bytes, share (of the budget, 0 to 1)}
    - budget: {unit: documents | tokens | bytes | threshold, wanted, chosen}, in that unit; with threshold, wanted
      is the score and chosen the documents
    - pool: files, documents, bytes, tokens, empty, skipped ({reason: count}), duplicates_exact, duplicates_near, leaks
      (documents that contain a target), without_id (null where no id_field is set)
    - chosen: documents, bytes, tokens
    - thresholds: {target: lowest score that is chosen}
    - histogram: {target: {edges (one more than there are bins), documents, chosen}}
    - by_source: a list of {source, documents, chosen, bytes, chosen_bytes}
    - by_length: a list of {from_bytes, to_bytes (null for no end), documents, chosen}
    - best, last_chosen, first_rejected: lists of {id, score, bytes, source, text (its beginning), target (only where
      there are several)}
    - pairs: evaluated, all (documents or windows times targets)
    - recall: {estimate, lower_95 (0 to 1), audited, missed}, or null where every document was scored in full
    - time: wall_seconds, cpu_seconds, workers, implementation
    - config: the exact configuration, YAML
    """
    method, pool, chosen = summary["method"], summary["pool"], summary["chosen"]
    share = f"{format_number(chosen['documents'])} of {_count(pool['documents'], 'documents')}"
    page = Page(summary["title"], f"{share} chosen by {_method(method)}.")
    page.section("Choice")
    page.facts(_choice(summary))
    _add_targets(page, summary)
    page.section("Pool")
    page.facts(_pool(pool))
    if pool["skipped"]:
        page.table(["skipped because", "documents"], pool["skipped"].items())
    page.section("Scores")
    _add_scores(page, summary)
    page.section("By source")
    _add_sources(page, summary["by_source"])
    page.section("By length")
    _add_lengths(page, summary["by_length"])
    page.section("Examples")
    page.text(
        "The beginnings of documents at both ends of the choice. What lies around the threshold is the best test "
        "of whether the budget is right."
    )
    for key, caption in (
        ("best", "The best"),
        ("last_chosen", "The last that were chosen"),
        ("first_rejected", "The first that were rejected"),
    ):
        _add_examples(page, summary[key], caption)
    page.section("Certainty and cost")
    page.facts(_cost(summary))
    page.text(_recall_sentence(summary["recall"]))
    page.text(f"Compressed sizes were computed by {summary['time']['implementation']}.")
    page.section("Configuration")
    page.code(summary["config"], "The exact configuration")
    page.write(folder / FILE)


def _method(method: Mapping[str, Any]) -> str:
    level = "" if method["level"] is None else f" at level {method['level']}"
    window = method["window_bytes"]
    cut = (
        "whole documents"
        if window is None
        else f"the {method['windows']} over windows of {format_number(window)} bytes"
    )
    return f"{method['method']} over {method['compressor']}{level}, {cut}"


def _choice(summary: Mapping[str, Any]) -> dict[str, Any]:
    budget, pool, chosen = summary["budget"], summary["pool"], summary["chosen"]
    unit = budget["unit"]
    by_score = unit == "threshold"
    return {
        "budget": f"scores from {format_number(budget['wanted'])} on" if by_score else _count(budget["wanted"], unit),
        "chosen of it": _count(budget["chosen"], "documents" if by_score else unit),
        "documents": chosen["documents"],
        "bytes": chosen["bytes"],
        "tokens": chosen["tokens"],
        "share of the pool's documents": _percent(chosen["documents"], pool["documents"]),
        "share of the pool's bytes": _percent(chosen["bytes"], pool["bytes"]),
    }


def _add_targets(page: Page, summary: Mapping[str, Any]) -> None:
    thresholds = summary["thresholds"]
    total = sum(target["share"] for target in summary["targets"])
    rows = [
        [
            target["name"],
            target["documents"],
            target["bytes"],
            100 * target["share"] / total,
            thresholds.get(target["name"]),
        ]
        for target in summary["targets"]
    ]
    columns = ["target", "documents", "bytes", "share of the budget, %", "lowest chosen score"]
    page.table(columns, rows, "What documents are compared with", align="lrrrr")


def _pool(pool: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "files": pool["files"],
        "documents": pool["documents"],
        "bytes": pool["bytes"],
        "tokens": pool["tokens"],
        "empty documents": pool["empty"],
        "exact duplicates": pool["duplicates_exact"],
        "near duplicates": pool["duplicates_near"],
        "documents with a target inside": pool["leaks"],
        **({} if pool.get("without_id") is None else {"documents without an id": pool["without_id"]}),
    }


def _caption(target: str, summary: Mapping[str, Any]) -> str:
    caption = f"How alike the pool is to {target}, and the part that was chosen."
    return caption if summary["recall"] is None else f"{caption} Documents out of the race stand at their estimates."


def _add_scores(page: Page, summary: Mapping[str, Any]) -> None:
    for target, counts in summary["histogram"].items():
        edges, (documents, chosen) = thin_bins(counts["edges"], [counts["documents"], counts["chosen"]])
        if not any(documents):
            page.text(f"No document has a score for {target}.")
            continue
        threshold = summary["thresholds"].get(target)
        logarithmic = max(documents) > LOGARITHMIC_FROM * max(chosen)
        figure = histogram(
            edges,
            {"all documents": documents, "chosen": chosen},
            f"score for {target}",
            "documents, logarithmic" if logarithmic else "documents",
            log_y=logarithmic,
            vertical={} if threshold is None else {f"threshold {format_number(threshold)}": threshold},
        )
        page.figure(figure, _caption(target, summary))


def thin_bins(
    edges: Sequence[float], counts: Sequence[Sequence[int]], most: int = MOST_BINS
) -> tuple[list[float], list[list[int]]]:
    """The bins that hold something, neighbours put together until there are `most` at most; no count is lost.

    The first of `counts` says what is empty. Empty lists where everything is.
    """
    filled = [place for place, count in enumerate(counts[0]) if count]
    if not filled:
        return [], [[] for _ in counts]
    first, end = filled[0], filled[-1] + 1
    step = -(-(end - first) // most)
    starts = range(first, end, step)
    thin = [[sum(values[start : min(start + step, end)]) for start in starts] for values in counts]
    return [*(edges[start] for start in starts), edges[end]], thin


def _add_sources(page: Page, by_source: Sequence[Row]) -> None:
    rows = sorted(by_source, key=lambda row: (-row["chosen"], -row["documents"], row["source"]))
    if rows:
        shown = rows[:MOST_SOURCES]
        rest = (
            f" The {len(shown)} sources with most of the choice; the table has all." if len(rows) > len(shown) else ""
        )
        all_documents, all_chosen = (sum(row[key] for row in rows) for key in ("documents", "chosen"))
        shares = {
            "share of the pool": [_of(row["documents"], all_documents) for row in shown],
            "share of the choice": [_of(row["chosen"], all_chosen) for row in shown],
        }
        names = [row["source"] for row in shown]
        figure = bar_chart(names, shares, "% of documents", reference=True)
        caption = "A source whose share of the choice is the larger one is more like the targets than the pool is."
        page.figure(figure, caption + rest, height_px=110 + 38 * len(shown))
        _add_rates(page, names, shown, "source")
    columns = ["source", "documents", "chosen", "chosen, %", "bytes", "chosen bytes", "chosen bytes, %"]
    page.table(
        columns,
        [
            [
                row["source"],
                row["documents"],
                row["chosen"],
                _of(row["chosen"], row["documents"]),
                row["bytes"],
                row["chosen_bytes"],
                _of(row["chosen_bytes"], row["bytes"]),
            ]
            for row in rows
        ],
        "Sources by what was chosen of them",
        align="lrrrrrr",
        digits=3,
    )


def _add_rates(page: Page, names: list[str], rows: Sequence[Row], kind: str, upright: bool = False) -> None:
    """How much of each class was chosen."""
    rates = [_of(row["chosen"], row["documents"]) for row in rows]
    texts = [format_number(rate, 3) for rate in rates]
    figure = bar_chart(names, {"chosen": rates}, "chosen, %", upright=upright, texts=texts)
    page.figure(figure, f"The part of each {kind} that was chosen.", height_px=320 if upright else 90 + 28 * len(rows))


def _add_lengths(page: Page, by_length: Sequence[Row]) -> None:
    names = [_length(row["from_bytes"], row["to_bytes"]) for row in by_length]
    if by_length:
        documents, chosen = ([row[key] for row in by_length] for key in ("documents", "chosen"))
        logarithmic = max(documents) > LOGARITHMIC_FROM * max(chosen)
        figure = bar_chart(
            names,
            {"all documents": documents, "chosen": chosen},
            "documents, logarithmic" if logarithmic else "documents",
            upright=True,
            overlaid=True,
            log=logarithmic,
        )
        page.figure(figure, "Documents by their length, and the part that was chosen.", height_px=320)
        _add_rates(page, names, by_length, "length", upright=True)
    rows = [
        [row["from_bytes"], row["to_bytes"], row["documents"], row["chosen"], _of(row["chosen"], row["documents"])]
        for row in by_length
    ]
    page.table(["from, bytes", "to, bytes", "documents", "chosen", "chosen, %"], rows, align="rrrrr", digits=3)


def _add_examples(page: Page, rows: Sequence[Row], caption: str) -> None:
    several = any(row.get("target") for row in rows)
    page.table(
        ["score", "text", *(["target"] if several else []), "source", "id", "bytes"],
        [
            [
                row["score"],
                row["text"],
                *([row.get("target")] if several else []),
                row["source"],
                str(row["id"]),
                row["bytes"],
            ]
            for row in rows
        ],
        caption,
        align="rplllr" if several else "rpllr",
    )


def _cost(summary: Mapping[str, Any]) -> dict[str, Any]:
    pairs, recall, time = summary["pairs"], summary["recall"], summary["time"]
    audit: dict[str, Any] = {}
    if recall is not None:
        audit = {
            "recall, estimated": f"{format_number(100 * recall['estimate'])} %",
            "recall, at least (95 % confidence)": f"{format_number(100 * recall['lower_95'])} %",
            "rejected documents audited": recall["audited"],
            "of them missed": recall["missed"],
        }
    return {
        "pairs evaluated": pairs["evaluated"],
        "pairs in all": pairs["all"],
        "share evaluated": _percent(pairs["evaluated"], pairs["all"]),
        **audit,
        "time": format_seconds(time["wall_seconds"]),
        "CPU time": format_seconds(time["cpu_seconds"]),
        "worker processes": time["workers"],
    }


def _recall_sentence(recall: Mapping[str, Any] | None) -> str:
    if recall is None:
        return "Every document was scored in full: the choice is exact, and there is nothing to estimate."
    audited, missed = (format_number(recall[key]) for key in ("audited", "missed"))
    estimate, least = (format_number(100 * recall[key]) for key in ("estimate", "lower_95"))
    return (
        f"Most documents were rejected after a few targets. Of these, {audited} drawn at random were scored in full "
        f"afterwards, and {'none' if missed == '0' else missed} of them belonged to the choice. So the choice has an "
        f"estimated {estimate} % of the documents that scoring all pairs would choose, and with 95 % confidence at "
        f"least {least} %."
    )


def _length(start: int, end: int | None) -> str:
    """A class of lengths, without the first unit where it is the second's too."""
    if end is None:
        return f"from {_edge(start)}"
    number, unit = _edge(start).split(" ")
    return (
        f"{number} – {_edge(end)}"
        if unit == _edge(end).split(" ")[1] or not start
        else f"{number} {unit} – {_edge(end)}"
    )


def _edge(count: int) -> str:
    """Powers of two have short names only in units that are."""
    for unit, size in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count and count % size == 0:
            return f"{format_number(count // size)} {unit}"
    return format_bytes(count)


def _of(part: float, whole: float) -> float | None:
    """Per cent; None of nothing."""
    return 100 * part / whole if whole else None


def _percent(part: float, whole: float) -> str:
    share = _of(part, whole)
    return format_number(None) if share is None else f"{format_number(share, 3)} %"


def _count(number: float, unit: str) -> str:
    return f"{format_number(number)} {unit.removesuffix('s') if number == 1 else unit}"
