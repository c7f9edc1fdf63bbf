"""The report of a study: report.json with every number, report.md with the tables, report.html with plots."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness.config import HarnessError, dump_yaml, plain
from harness.disk import write_whole

from .config import SelectionStudySection

PACKAGES = ("torch", "numpy", "sentencepiece", "datasketch", "lz4")


def write_report(config: SelectionStudySection, analysis: dict[str, Any]) -> list[Path]:
    """The paths written. HarnessError where no run is done yet."""
    if not analysis["rows"]:
        raise HarnessError(f"{config.folder}: no run of this study is done yet; `run` does them")
    pool = json.loads((config.path / "pool.json").read_text())
    settings = plain(config) | {"folder": None, "data_folder": None}  # where it ran says nothing of what it was
    whole = {"machine": machine(), "settings": settings, "pool": pool["sources"], **analysis}
    paths = [config.path / f"report.{ending}" for ending in ("json", "md", "html")]
    write_whole(paths[0], (json.dumps(whole, indent=1, allow_nan=False) + "\n").encode())
    write_whole(paths[1], markdown(config, analysis).encode())
    _write_page(config, whole, paths[2])
    return paths


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    versions = {package: version(package) for package in PACKAGES}
    return {"system": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version(), **versions}


def markdown(config: SelectionStudySection, analysis: dict[str, Any]) -> str:
    """A table for every target and mode, best arm first."""
    parts = [f"# Which selection score helps training?\n\n{_extent(config, analysis)}\n"]
    for (target, mode), rows in _groups(analysis).items():
        heads, lines = table(config, rows)
        parts.append(f"\n## {target}, {mode}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n")
        parts += [f"| {' | '.join(_text(value) for value in line)} |\n" for line in lines]
    return "".join(parts)


def table(config: SelectionStudySection, rows: list[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Column heads and lines, the lowest bits per byte first."""
    baselines = [name for name in (config.arms[0].name, config.second_baseline) if name is not None]
    heads = ["arm", "bits per byte"]
    for name in baselines:
        heads += [f"minus {name}", "95 % interval", "by draw"]
    heads += ["in domain", "window bytes", "runs"]
    lines = []
    for row in sorted(rows, key=lambda row: row["bits_per_byte"]):
        line: list[Any] = [row["arm"], f"{row['bits_per_byte']:.4f}"]
        for name in baselines:
            found = row.get(f"minus_{name}")
            if found is None:
                line += ["", "", ""]
            else:
                by_draw = ", ".join(f"{value:+.3f}" for value in found["by_draw"])
                line += [f"{found['mean']:+.4f}", f"{found['low']:+.4f} to {found['high']:+.4f}", by_draw]
        share = row["in_domain"]
        line += ["" if share is None else f"{100 * share:.0f} %", round(row["window_bytes"]), row["runs"]]
        lines.append(line)
    return heads, lines


def _groups(analysis: dict[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in analysis["rows"]:
        groups.setdefault((row["target"], row["mode"]), []).append(row)
    return groups


def _extent(config: SelectionStudySection, analysis: dict[str, Any]) -> str:
    cells = analysis["cells"]
    said = (
        f"{cells['done']} of {cells['expected']} runs: {len(config.arms)} arms, {config.draws} draws of the pool, "
        f"{config.seeds} seeds; {config.budget_tokens:,} unique tokens an arm; {analysis['cpu_seconds'] / 3600:.1f} "
        f"core-hours. Bits per byte of held-out items (lower is better); differences are paired by draw, seed and "
        f"item, with 95 % bootstrap intervals over all three."
    )
    if cells["done"] < cells["expected"]:
        said += (
            " The study is not complete. Compare differences, which are of the same draws and seeds, and not the bits "
            "per byte of arms with other numbers of runs."
        )
    return said


def _write_page(config: SelectionStudySection, whole: dict[str, Any], path: Path) -> None:
    from harness.report import Page

    page = Page("Which selection score helps training?", _extent(config, whole))
    baseline = config.arms[0].name
    for target in dict.fromkeys(row["target"] for row in whole["rows"]):
        rows = [row for row in whole["rows"] if row["target"] == target]
        page.section(target)
        page.figure(_differences(rows, baseline), f"Bits per byte minus {baseline}'s, with 95 % intervals.")
        if any(row["in_domain"] is not None for row in rows):
            page.figure(_shares(rows), "What was chosen, and what came of it.")
        for (name, mode), some in _groups(whole).items():
            if name == target:
                page.table(*table(config, some), caption=mode)
    page.section("Pool")
    columns = list(next(iter(whole["pool"].values())))
    page.table(["source", *columns], [[name, *counts.values()] for name, counts in whole["pool"].items()])
    page.section("Origin")
    page.facts(whole["machine"])
    page.code(dump_yaml(config, comments=False), "configuration")
    page.write(path)


def _differences(rows: list[dict[str, Any]], baseline: str) -> Any:
    """A point with its interval for each arm; the modes side by side."""
    from harness.report import Series, scatter

    key = f"minus_{baseline}"
    compared = [row for row in rows if key in row]
    mean: dict[str, list[float]] = {}
    for row in compared:
        mean.setdefault(row["arm"], []).append(row[key]["mean"])
    arms = sorted(mean, key=lambda arm: sum(mean[arm]) / len(mean[arm]))
    points = []
    modes = list(dict.fromkeys(row["mode"] for row in compared))
    for place, mode in enumerate(modes):
        some = [row for row in compared if row["mode"] == mode]
        points.append(
            Series(
                mode,
                [arms.index(row["arm"]) + 0.12 * (place - (len(modes) - 1) / 2) for row in some],
                [row[key]["mean"] for row in some],
                [row[key]["low"] for row in some],
                [row[key]["high"] for row in some],
                [row["arm"] for row in some],
            )
        )
    figure = scatter(points, "", f"bits per byte minus {baseline}'s", horizontal={baseline: 0.0})
    figure.update_xaxes(tickmode="array", tickvals=list(range(len(arms))), ticktext=arms, zeroline=False)
    return figure


def _shares(rows: list[dict[str, Any]]) -> Any:
    """Bits per byte over the share of in-domain windows."""
    from harness.report import Series, scatter

    points = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        some = [row for row in rows if row["mode"] == mode and row["in_domain"] is not None]
        shares = [100 * row["in_domain"] for row in some]
        bits = [row["bits_per_byte"] for row in some]
        points.append(Series(mode, shares, bits, hover=[row["arm"] for row in some]))
    return scatter(points, "windows of the target's own domain (%)", "bits per byte")


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
