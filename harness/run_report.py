"""The report of one run: a page that needs no network, made of what the run has recorded so far.

In: a run folder. Out: report.html in it, or where it is asked for. Long curves are drawn as means over equal parts of
the steps, with the lowest and highest value of each part as a band.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from harness.config import HarnessError, dump_yaml, validate
from harness.report import Page, Series, format_bytes, format_seconds, line_chart, scatter
from harness.runs import Run, RunError, read
from harness.scaling import LAWS, Fit, annealing_areas, fit
from harness.settings import Settings

POINTS = 400
"""Of a curve, at most."""
FITTED = 120
"""Points of the law's fit: means over equal parts of the steps after the warm-up, whose noise is independent."""
LONGEST_EVENTS = 200
NAMES = {
    "validation_loss": "validation loss, nats a token",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens a second",
    "utilisation": "utilisation",
    "memory_bytes": "memory, bytes",
    "data_wait_seconds": "data wait, s a step",
    "norm_sites_left": "norm sites left",
}
"""Metrics that have a figure of their own, where they were recorded."""


def write_run_report(run: Path, target: Path | None = None) -> Path:
    """The page of `run`, written to `target` or to report.html in it. RunError where there is no run, or nothing in it
    yet."""
    log = read(run)
    if not log.metrics:
        raise RunError(f"{run}: no step is recorded yet; there is nothing to report")
    path = target or run / "report.html"
    page_of(log).write(path)
    return path


def page_of(log: Run) -> Page:
    last, total = log.metrics[-1], log.config.get("train", {}).get("steps")
    made = Page(f"Run {log.path.resolve().name}", f"Step {last['step']:,} of {total:,}." if total else "")
    made.facts(facts(log))
    _add_losses(made, log)
    _add_law(made, log)
    made.section("Beside the loss")
    for name, title in NAMES.items():
        if name in log.columns and name != "validation_loss":
            made.figure(line_chart([curve(log, name, title)], "step", title), height_px=260)
    made.section("Events")
    events = log.events[-LONGEST_EVENTS:]
    rows = [[event.get("time", ""), event["event"], event.get("step", ""), _rest(event)] for event in events]
    more = f" (the last {LONGEST_EVENTS} of {len(log.events):,})" if len(log.events) > LONGEST_EVENTS else ""
    made.table(["time", "event", "step", "more"], rows, caption=f"What happened{more}")
    made.section("Configuration")
    made.code(_configuration(log), "the resolved configuration of the newest start")
    made.section("Where it ran")
    made.facts({name: value for name, value in log.environment.items() if isinstance(value, str | int | float)})
    return made


def facts(log: Run) -> dict[str, Any]:
    """What people ask first."""
    last, counts = log.metrics[-1], log.environment.get("parameters", {})
    found: dict[str, Any] = {"loss, last step, nats a token": last["loss"]}
    validated = [record for record in log.metrics if "validation_loss" in record]
    if validated:
        found[f"validation loss, step {validated[-1]['step']:,}"] = validated[-1]["validation_loss"]
        if "validation_bits_per_byte" in validated[-1]:
            found["validation bits per byte"] = validated[-1]["validation_bits_per_byte"]
    for name, key in (("parameters", "total"), ("of them in blocks", "blocks")):
        if key in counts:
            found[name] = counts[key]
    found["tokens seen"] = last.get("tokens_seen")
    flops = log.environment.get("model_flops_per_token")
    if flops and last.get("tokens_seen"):
        found["training FLOPs"] = f"{flops * last['tokens_seen']:.3g}"
    if "step_seconds" in log.columns:
        found["time in steps"] = format_seconds(float(np.nansum(log.column("step_seconds"))))
    if "tokens_per_second" in log.columns:
        found["tokens a second, median"] = float(np.nanmedian(log.column("tokens_per_second")))
    if "memory_bytes" in log.columns:
        found["peak memory"] = format_bytes(float(np.nanmax(log.column("memory_bytes"))))
    found["layout"] = log.environment.get("layout")
    return {name: value for name, value in found.items() if value is not None}


def curve(log: Run, name: str, title: str) -> Series:
    """A metric over the steps, where it was recorded."""
    values = log.column(name)
    there = np.isfinite(values)
    steps, values = log.steps[there], values[there]
    if len(steps) <= POINTS:
        return Series(title, steps.tolist(), values.tolist())
    parts = [(s, v) for s, v in zip(np.array_split(steps, POINTS), np.array_split(values, POINTS), strict=True)]
    return Series(
        title,
        [float(s[-1]) for s, _ in parts],
        [float(v.mean()) for _, v in parts],
        [float(v.min()) for _, v in parts],
        [float(v.max()) for _, v in parts],
    )


def run_curve(log: Run) -> dict[str, np.ndarray]:
    """The columns of the annealing law: means of at most FITTED equal parts of the recorded steps after the warm-up,
    areas counted from the first step on. HarnessError where too little is recorded."""
    steps, losses, rates = log.steps, log.column("loss"), log.column("learning_rate")
    if list(steps) != list(range(1, len(steps) + 1)):
        raise HarnessError("steps are missing in the record, and the law needs the learning rate of every one")
    s1, s2 = annealing_areas(rates)
    warmup = int(log.config.get("schedule", {}).get("warmup_steps", 0))
    kept = np.flatnonzero((np.arange(len(steps)) >= max(warmup, len(steps) // 20)) & np.isfinite(losses))
    if len(kept) < 40:
        raise HarnessError(f"{len(kept)} steps after the warm-up; a curve needs 40")
    parts = np.array_split(kept, min(FITTED, len(kept) // 4))
    means = {"step": steps, "s1": s1, "s2": s2, "loss": losses}
    return {name: np.array([values[part].mean() for part in parts]) for name, values in means.items()}


def _add_losses(made: Page, log: Run) -> None:
    made.section("Loss")
    lines = [curve(log, "loss", "training loss")]
    if "validation_loss" in log.columns:
        lines.append(curve(log, "validation_loss", "validation loss"))
    made.figure(line_chart(lines, "step", "nats a token"))
    if "forecast_final" in log.columns:
        lines = [_between(log, "final loss, as forecast at this step", "forecast_final", "forecast")]
        lines.append(_between(log, "band of the loss, as first forecast", None, "forecast_band"))
        made.figure(
            line_chart(
                [*lines, *(curve(log, name, NAMES[name]) for name in ("validation_loss",) if name in log.columns)],
                "step",
                "nats a token",
            ),
            "Forecasts, with 95 % intervals.",
        )


def _between(log: Run, title: str, middle: str | None, prefix: str) -> Series:
    """Columns PREFIX_low and PREFIX_high as a band, around another column or their own middle."""
    low, high = log.column(f"{prefix}_low"), log.column(f"{prefix}_high")
    there = np.isfinite(low)
    values = (low + high) / 2 if middle is None else log.column(middle)
    return Series(title, *(part[there].tolist() for part in (log.steps, values, low, high)))


def _add_law(made: Page, log: Run) -> None:
    """The annealing law on this run's own curve, as far as it can be known from one run."""
    law = LAWS["annealing"]
    made.section("Along a law")
    try:
        points = run_curve(log)
        fitted = fit(law, points, resamples=200)
    except HarnessError as error:
        made.text(f"No fit of {law.formula}: {error}.")
        return
    made.text(
        f"{law.formula} ({law.source}), fitted to means of the training loss after the warm-up. Neighbouring steps of "
        f"one run are not independent: intervals and band are too narrow, and one run says little of another schedule."
    )
    rates = log.column("learning_rate")
    if rates[-1] > 0.99 * rates.max():
        made.text("The learning rate has not fallen yet: C is only what the warm-up says of it.")
    _draw_fit(made, fitted, points)


def _draw_fit(made: Page, fitted: Fit, points: dict[str, np.ndarray]) -> None:
    rows = [
        [parameter.name, fitted.parameters[parameter.name], *fitted.intervals[parameter.name], parameter.unit]
        for parameter in fitted.law.parameters
    ]
    made.table(["parameter", "value", "from", "to", "unit"], rows)
    for warning in fitted.warnings:
        made.text(f"Warning: {warning}")
    x = {name: points[name] for name in ("s1", "s2")}
    low, high = fitted.band(x)
    steps = points["step"].tolist()
    made.figure(
        scatter(
            [Series("means of the training loss", steps, points["loss"].tolist())],
            "step",
            "nats a token",
            curves=[Series("law", steps, fitted.predict(x).tolist(), low.tolist(), high.tolist())],
        )
    )
    residuals = Series("residuals", steps, (1e3 * fitted.residuals).tolist())
    made.figure(scatter([residuals], "step", "log loss less the law's, x 1,000"), height_px=260)


def _rest(event: dict[str, Any]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in event.items() if name not in ("time", "event", "step"))


def _configuration(log: Run) -> str:
    """With its comments where today's settings read it, else as it lies there."""
    try:
        return dump_yaml(validate(Settings, log.config, str(log.path)), comments=False)
    except HarnessError:
        return (log.path / "config.yaml").read_text()
