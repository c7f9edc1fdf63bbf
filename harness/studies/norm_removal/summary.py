"""The report of a study of norm removal: report.json with every number, report.md with tables, report.html with
curves."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness.config import dump_yaml, plain
from harness.disk import write_whole
from harness.report import Page, Series, line_chart

from .analysis import analyse
from .config import NormRemovalStudySection

TITLE = "What does it cost to take the norms away?"
SOURCE_HEADS = [
    "family", "parameters", "tokens a parameter", "epochs", "loss", "largest sigma ratio", "median ratio",
    "freezing costs",
]  # fmt: skip


def write_report(config: NormRemovalStudySection) -> list[Path]:
    """The paths written. HarnessError where nothing is done yet."""
    analysis = analyse(config)
    machine = {"system": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version()}
    machine["torch"] = version("torch")
    whole = {"machine": machine, "settings": plain(without_places(config)), **analysis}
    paths = [config.path / f"report.{ending}" for ending in ("json", "md", "html")]
    write_whole(paths[0], (json.dumps(whole, indent=1, allow_nan=False) + "\n").encode())
    write_whole(paths[1], markdown(config, analysis).encode())
    page(config, whole).write(paths[2])
    return paths


def markdown(config: NormRemovalStudySection, analysis: dict[str, Any]) -> str:
    """The tables of sources and of gaps."""
    parts = [f"# {TITLE}\n\n{extent(analysis)}\n"]
    for title, (heads, lines) in tables(config, analysis).items():
        parts.append(f"\n## {title}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n")
        parts += [f"| {' | '.join(map(str, line))} |\n" for line in lines]
    return "".join(parts)


def tables(config: NormRemovalStudySection, analysis: dict[str, Any]) -> dict[str, tuple[list[str], list[list[Any]]]]:
    sources = []
    for family, source in analysis["sources"].items():
        ratios = sorted(site["ratio"] for site in source["sites"].values() if site["ratio"] is not None)
        sources.append(
            [
                family,
                f"{source['parameters']['total']:,}",
                f"{source['tokens_a_parameter']:.1f}",
                f"{source['epochs']:.2f}",
                f"{source['quality']['mean']:.4f}",
                f"{ratios[-1]:.1f}",
                f"{ratios[len(ratios) // 2]:.1f}",
                f"{source['freezing_cost']:.3f}",
            ]
        )
    heads = ["family", "arm", "seeds", "loss", "less original"]
    heads += [f"less {control.name}" for control in config.controls]
    heads += ["proofs hold", "rollbacks", "99.9 %", "calibration error", "rare bytes", "diverged"]
    lines = []
    for row in analysis["rows"]:
        diverged = ", ".join(f"after step {step}" for step in row["failed_after"])
        if not row["seeds"]:
            lines.append([row["family"], row["arm"], 0, *[""] * (len(heads) - 4), diverged])
            continue
        gaps = [gap(row["gaps"].get(control.name)) for control in config.controls]
        lines.append(
            [
                row["family"], row["arm"], row["seeds"], f"{row['loss']:.4f}", gap(row["minus_original"]), *gaps,
                f"{row['proofs_hold']} of {row['seeds']}", row["rollbacks"], f"{row['p999']:.2f}",
                f"{row['calibration_error']:.4f}", f"{row['rare_bytes']:.3f}", diverged,
            ]
        )  # fmt: skip
    return {"Sources": (SOURCE_HEADS, sources), "Removals": (heads, lines)}


def gap(value: dict[str, Any] | None) -> str:
    """+0.0123 ± 0.0004 (over seeds), or without the spread where there is one seed."""
    if value is None:
        return ""
    spread = value["over_seeds"]
    return f"{value['nats']:+.4f}" + ("" if spread is None else f"\u00a0±\u00a0{spread:.4f}")


def without_places(config: NormRemovalStudySection) -> NormRemovalStudySection:
    """Where it ran says nothing of what it was."""
    data = config.data.model_copy(update={"folder": "..."})
    return config.model_copy(update={"folder": "...", "data": data})


def extent(analysis: dict[str, Any]) -> str:
    seconds = sum(run["cpu_seconds"] for run in analysis["runs"])
    said = (
        f"{len(analysis['runs'])} fine-tunings, {seconds / 3600:.1f} core-hours. Losses in nats a token on the same "
        f"validation windows; differences are paired by seed and window, ± is the standard deviation over seeds. A "
        f"control reads as many tokens as its removal consumed, rollbacks included. The outlier of sigma at first "
        f"positions was injected in training the sources."
    )
    weak = [family for family, source in analysis["sources"].items() if source["freezing_cost"] < 0.2]
    if weak:
        said += (
            f" Freezing all norms of {' and '.join(weak)} without training costs less than 0.2 nats: the gaps there "
            f"are no result."
        )
    return said


def page(config: NormRemovalStudySection, whole: dict[str, Any]) -> Page:
    made = Page(TITLE, extent(whole))
    for title, (heads, lines) in tables(config, whole).items():
        made.section(title)
        made.table(heads, lines)
    for family, source in whole["sources"].items():
        made.section(family)
        runs = [run for run in whole["runs"] if run["family"] == family and run["seed"] == 0]
        losses = [
            Series(run["arm"], [point[0] for point in run["curve"]], [point[1] for point in run["curve"]])
            for run in runs
        ]
        made.figure(line_chart(losses, "step", "training loss, nats a token"), "Fine-tunings of seed 0.")
        left = [
            Series(run["arm"], [point[0] for point in run["curve"]], [point[2] for point in run["curve"]])
            for run in runs
            if run["control"] == "none"
        ]
        made.figure(line_chart(left, "step", "norm sites left"), "How many sites were still there.")
        curve = source["curve"]
        course = Series("source", [point[0] for point in curve], [point[1] for point in curve])
        made.figure(line_chart([course], "step", "training loss, nats a token"), "The source.")
        heads = ["site", "ordinary tokens", "first tokens and ends", "ratio"]
        sites = [[name, site["ordinary"], site["others"], site["ratio"]] for name, site in source["sites"].items()]
        made.table(heads, sites, caption="sigma of the source")
    made.section("Origin")
    made.facts(whole["machine"])
    made.code(dump_yaml(without_places(config), comments=False), "configuration")
    return made
