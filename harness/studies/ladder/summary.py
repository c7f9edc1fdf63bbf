"""The report of a ladder: report.json with every number, report.md with tables, report.html with figures, runs.jsonl
with a row a run for `harness study fit`."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from harness.config import HarnessError, dump_yaml, plain
from harness.disk import write_whole
from harness.report import Page, Series, line_chart, scatter
from harness.scaling import Fit, optimal

from .analysis import analyse, columns, fit_rows
from .config import COUNTS, LadderSection

TITLE = "A ladder of models, and what it predicts"
RUN_HEADS = (
    "size", "tokens a parameter", "parameters", "non-embedding", "tokens", "steps", "batch", "rate", "FLOPs", "seeds",
    "loss", "over seeds",
)  # fmt: skip
HELD_HEADS = ("law", "tokens a parameter", "loss", "predicted", "error", "95 % interval", "inside")
TEXT = "Losses are of validation text, in nats a token."


def write_report(config: LadderSection) -> list[Path]:
    """The paths written. HarnessError where nothing is done yet."""
    analysis = analyse(config)
    machine = {"system": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version()}
    machine["torch"] = version("torch")
    whole = {"machine": machine, "settings": plain(without_places(config)), **analysis}
    paths = {name: config.path / name for name in ("report.json", "report.md", "report.html", "runs.jsonl")}
    write_whole(paths["report.json"], (json.dumps(whole, indent=1, allow_nan=False) + "\n").encode())
    write_whole(paths["report.md"], markdown(config, analysis).encode())
    page(config, whole).write(paths["report.html"])
    table = [{name: value for name, value in row.items() if name != "validation"} for row in analysis["runs"]]
    write_whole(paths["runs.jsonl"], "".join(json.dumps(row) + "\n" for row in table).encode())
    return list(paths.values())


def without_places(config: LadderSection) -> LadderSection:
    """Where it ran says nothing of what it was."""
    corpora = tuple(corpus.model_copy(update={"source": ("...",)}) for corpus in config.data.corpora)
    data = config.data.model_copy(update={"folder": "...", "corpora": corpora})
    return config.model_copy(update={"folder": "...", "data": data})


def tables(config: LadderSection, analysis: dict[str, Any]) -> dict[str, tuple[tuple[str, ...], list[list[Any]]]]:
    runs = [
        [
            cell["size"], f"{cell['ratio']:g}", f"{cell['total']:,}", f"{cell['non_embedding']:,}",
            f"{cell['tokens']:,}", f"{cell['steps']:,}", cell["sequences"], f"{cell['learning_rate']:.2e}",
            f"{cell['flops']:.2e}", cell["seeds"], f"{cell['loss']:.4f}",
            "" if cell["over_seeds"] is None else f"{cell['over_seeds']:.4f}",
        ]
        for cell in analysis["cells"]
    ]  # fmt: skip
    fits = []
    names = [parameter for fitted in analysis["fits"].values() for parameter in fitted.get("parameters", {})]
    names = list(dict.fromkeys(names))
    for count, fitted in analysis["fits"].items():
        if "cannot" not in fitted:
            shown = [
                f"{fitted['parameters'][name]:.4g} ({fitted['intervals'][name][0]:.3g} to "
                f"{fitted['intervals'][name][1]:.3g})"
                for name in names
            ]
            fits.append([count, *shown, "yes" if fitted["converged"] else "NO", f"{fitted['r_squared']:.5f}"])
    held = [
        [
            entry["law"], f"{entry['ratio']:g}", f"{entry['loss']:.4f}", f"{entry['predicted']:.4f}",
            f"{entry['error']:+.4f}", f"{entry['low']:.4f} to {entry['high']:.4f}", "yes" if entry["inside"] else "NO",
        ]
        for entry in analysis["held_out"]
        if "cannot" not in entry
    ]  # fmt: skip
    found: dict[str, tuple[tuple[str, ...], list[list[Any]]]] = {"Runs": (RUN_HEADS, runs)}
    if fits:
        found["Fits of L(N, D) = E + A / N^alpha + B / D^beta"] = (("count", *names, "converged", "R²"), fits)
    if held:
        found[f"The largest size, {analysis['held_out'][0]['size']}, predicted from the others"] = (HELD_HEADS, held)
    return found


def notes(analysis: dict[str, Any]) -> list[str]:
    """What the fits warn of, and why others are missing."""
    found = []
    for count, fitted in analysis["fits"].items():
        said = [fitted["cannot"]] if "cannot" in fitted else fitted["warnings"]
        found += [f"{count}: {text}" for text in said]
    for entry in analysis["held_out"]:
        said = [entry["cannot"]] if "cannot" in entry else entry["warnings"]
        found += [f"held out, {entry['law']}, {entry['ratio']:g} tokens a parameter: {text}" for text in said]
    return list(dict.fromkeys(found))


def markdown(config: LadderSection, analysis: dict[str, Any]) -> str:
    parts = [f"# {TITLE}\n\n{extent(analysis)}\n"]
    for title, (heads, lines) in tables(config, analysis).items():
        parts.append(f"\n## {title}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n")
        parts += [f"| {' | '.join(map(str, line))} |\n" for line in lines]
    said = notes(analysis)
    if said:
        parts.append("\n## Warnings\n\n" + "".join(f"- {text}\n" for text in said))
    return "".join(parts)


def extent(analysis: dict[str, Any]) -> str:
    rows = analysis["runs"]
    hours = sum(row["cpu_seconds"] for row in rows) / 3600
    most = max(row["epochs"] for row in rows)
    return (
        f"{len(rows)} runs, {hours:.1f} core-hours, at most {most:.2f} epochs of the text. {TEXT} Intervals are 95 %: "
        f"of parameters by resampling sizes and lengths; of predictions for one new run."
    )


def page(config: LadderSection, whole: dict[str, Any]) -> Page:
    made = Page(TITLE, extent(whole))
    for title, (heads, lines) in tables(config, whole).items():
        made.section(title)
        made.table(heads, lines)
    for text in notes(whole):
        made.text(f"Warning: {text}")
    made.text("Counts: " + "; ".join(f"{name}: {meaning}" for name, meaning in COUNTS.items()) + ".")
    _add_curves(made, whole["runs"])
    _add_fit(made, config, whole["runs"])
    made.section("Origin")
    made.facts(whole["machine"])
    made.code(dump_yaml(without_places(config), comments=False), "configuration")
    return made


def _add_curves(made: Page, rows: list[dict[str, Any]]) -> None:
    made.section("Curves")
    first = [row for row in rows if row["seed"] == 0]
    length = {row["name"]: row["tokens"] / row["steps"] for row in first}
    curves = [
        Series(
            f"{row['size']}, {row['ratio']:g} tokens a parameter",
            [step * length[row["name"]] for step, _ in row["validation"]],
            [loss for _, loss in row["validation"]],
        )
        for row in first
    ]
    made.figure(line_chart(curves, "tokens", "validation loss, nats a token", log_x=True), "Runs of seed 0.")


def _add_fit(made: Page, config: LadderSection, rows: list[dict[str, Any]]) -> None:
    made.section("The fit")
    try:
        fitted = fit_rows(rows, "chinchilla", config.count, config.resamples)
    except HarnessError as error:
        made.text(f"No fit: {error}")
        return
    x = columns(rows, config.count)
    ratios = sorted({row["ratio"] for row in rows})
    points, curves, residuals = [], [], []
    sizes = np.geomspace(x["parameters"].min() / 1.2, x["parameters"].max() * 2.0, 60)
    for ratio in ratios:
        mine = np.array([row["ratio"] == ratio for row in rows])
        name = f"{ratio:g} tokens a parameter"
        points.append(Series(name, x["parameters"][mine].tolist(), x["loss"][mine].tolist()))
        at = {"parameters": sizes, "tokens": sizes * ratio}
        low, high = fitted.band(at)
        curves.append(Series(name, sizes.tolist(), fitted.predict(at).tolist(), low.tolist(), high.tolist()))
        residuals.append(Series(name, x["parameters"][mine].tolist(), (1e3 * fitted.residuals[mine]).tolist()))
    label = f"parameters ({config.count.replace('_', ' ')})"
    made.figure(
        scatter(points, label, "validation loss, nats a token", curves=curves, log_x=True),
        "Runs, the law, and its 95 % band, beyond the largest size too.",
    )
    made.figure(scatter(residuals, label, "log loss less the law's, x 1,000", log_x=True), "What the law leaves over.")
    _add_allocation(made, fitted)


def _add_allocation(made: Page, fitted: Fit) -> None:
    """Where the law says that compute is spent best."""
    used = 6 * fitted.x["parameters"] * fitted.x["tokens"]
    budgets = np.geomspace(used.min(), 30 * used.max(), 40)
    best = [optimal(fitted, float(flops)) for flops in budgets]
    line = Series(
        "parameters",
        budgets.tolist(),
        [each.parameters for each in best],
        [each.intervals["parameters"][0] for each in best],
        [each.intervals["parameters"][1] for each in best],
    )
    made.figure(
        line_chart([line], "C = 6 N D, FLOPs", "parameters", log_x=True, log_y=True),
        "The best size for a budget, with its 95 % band.",
    )
