"""The report of a study of tokenization: report.json with every number, report.md with the table, report.html with the
curves."""

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
from harness.report import Page, Series, line_chart

from .config import TokenizationStudySection
from .runs import cells

TITLE = "What does a tokenizer do for a transformer on Markov text?"
HEADS = (
    "source", "tokenizer", "model", "seeds", "symbols a token", "loss", "over seeds", "unigram loss", "entropy rate",
    "share of the way", "steps to half", "unigram of tokens",
)  # fmt: skip


def write_report(config: TokenizationStudySection) -> list[Path]:
    """The paths written. HarnessError where nothing is done yet."""
    results = [result for cell in cells(config) if (result := cell.result(config)) is not None]
    if not results:
        raise HarnessError(f"{config.path}: no run of this study is done yet; `harness study run` does them")
    machine = {"system": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version()}
    machine["torch"] = version("torch")
    settings = config.model_copy(update={"folder": "..."})
    whole = {"machine": machine, "settings": plain(settings), "rows": rows(results), "runs": results}
    paths = [config.path / f"report.{ending}" for ending in ("json", "md", "html")]
    write_whole(paths[0], (json.dumps(whole, indent=1, allow_nan=False) + "\n").encode())
    write_whole(paths[1], markdown(whole).encode())
    page(settings, whole).write(paths[2])
    return paths


def rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By source, tokenizer and model, over seeds.

    share: of the way from the unigram loss (0) to the entropy rate (1), at the end; half: the first validated step at
    which half of it was gone, null where it never was.
    """
    found = []
    for key in dict.fromkeys((r["source"], r["tokenizer"], r["model"]) for r in results):
        mine = [r for r in results if (r["source"], r["tokenizer"], r["model"]) == key]
        first = mine[0]
        losses = np.array([r["loss"] for r in mine])
        curves = np.array([[loss for _, loss in r["curve"]] for r in mine])
        gap = first["unigram_loss"] - first["entropy_rate"]
        half = curves.mean(0) <= first["unigram_loss"] - gap / 2
        found.append(
            {
                "source": key[0],
                "tokenizer": key[1],
                "model": key[2],
                "seeds": len(mine),
                "loss": float(losses.mean()),
                "over_seeds": float(losses.std(ddof=1)) if len(mine) > 1 else None,
                "share": float((first["unigram_loss"] - losses.mean()) / gap),
                "half": first["curve"][int(half.argmax())][0] if half.any() else None,
                "steps": [step for step, _ in first["curve"]],
                "mean": curves.mean(0).tolist(),
                "low": curves.min(0).tolist(),
                "high": curves.max(0).tolist(),
                **{
                    name: first[name]
                    for name in ("entropy_rate", "unigram_loss", "token_unigram_loss", "symbols_a_token")
                },
            }
        )
    return found


def table(whole: dict[str, Any]) -> list[list[Any]]:
    return [
        [
            row["source"], row["tokenizer"], row["model"], row["seeds"], f"{row['symbols_a_token']:.2f}",
            f"{row['loss']:.4f}", "" if row["over_seeds"] is None else f"{row['over_seeds']:.4f}",
            f"{row['unigram_loss']:.4f}", f"{row['entropy_rate']:.4f}", f"{row['share']:.3f}",
            "never" if row["half"] is None else row["half"], f"{row['token_unigram_loss']:.4f}",
        ]
        for row in whole["rows"]
    ]  # fmt: skip


def extent(whole: dict[str, Any]) -> str:
    hours = sum(run["cpu_seconds"] for run in whole["runs"]) / 3600
    return (
        f"{len(whole['runs'])} runs, {hours:.2f} core-hours. Losses of validation text in nats a symbol, whatever the "
        f"tokens are. Unigram loss: the best model without a context; entropy rate: the best of all. Share of the way: "
        f"0 at the unigram loss, 1 at the entropy rate."
    )


def markdown(whole: dict[str, Any]) -> str:
    lines = [f"| {' | '.join(map(str, line))} |\n" for line in table(whole)]
    return f"# {TITLE}\n\n{extent(whole)}\n\n| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}\n{''.join(lines)}"


def page(config: TokenizationStudySection, whole: dict[str, Any]) -> Page:
    made = Page(TITLE, extent(whole))
    made.section("Results")
    made.table(HEADS, table(whole))
    for source in dict.fromkeys(row["source"] for row in whole["rows"]):
        mine = [row for row in whole["rows"] if row["source"] == source]
        curves = [
            Series(f"{row['tokenizer']}, {row['model']}", row["steps"], row["mean"], row["low"], row["high"])
            for row in mine
        ]
        bounds = {"unigram loss": mine[0]["unigram_loss"], "entropy rate": mine[0]["entropy_rate"]}
        made.section(source)
        made.figure(
            line_chart(curves, "step", "validation loss, nats a symbol", horizontal=bounds),
            "Means over seeds; bands from the lowest to the highest.",
        )
    made.section("Origin")
    made.facts(whole["machine"])
    made.code(dump_yaml(config, comments=False), "configuration")
    return made
