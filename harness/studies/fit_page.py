"""The page of a fit: points, law, residuals, the floor's profile, allocation."""

from __future__ import annotations

from typing import Any

import numpy as np

from harness.report import Page, Series, line_chart, scatter
from harness.scaling import Fit, IsoFlop, optimal

from .fitting import BUDGETS_BEYOND, Fitted, draw_profile

CURVES = 5
"""Lines of a law of two sizes: so many values of the second one."""
ACROSS = {
    "power": ("x", None),
    "chinchilla": ("tokens", "parameters"),
    "overtraining": ("tokens", "parameters"),
    "annealing": ("s1", "s2"),
    "encoder-decoder": ("encoder", "decoder"),
}
"""By law: the horizontal axis, and what distinguishes lines."""


def fit_page(found: Fitted, values: dict[str, Any]) -> Page:
    made = Page(f"Fit of the law {found.law}", values["formula"])
    made.text(f"Source: {values['source']}.")
    made.facts({"points": values["points"], "resamples": values["resamples"]})
    rows = [
        [name, value, *values["intervals"][name], values.get("units", {}).get(name, "")]
        for name, value in values["parameters"].items()
    ]
    made.section("Parameters")
    made.table(["parameter", "value", "from", "to", "unit"], rows, caption="with 95 % intervals")
    for text in (*found.notes, *(f"Warning: {warning}" for warning in values["warnings"])):
        made.text(text)
    if isinstance(found.fit, IsoFlop):
        _add_profiles(made, found.fit)
        return made
    _add_law(made, found, found.fit)
    _add_held_out(made, found)
    _add_floor(made, found.fit)
    if found.law == "chinchilla":
        _add_allocation(made, found.fit)
    return made


def _add_law(made: Page, found: Fitted, fitted: Fit) -> None:
    made.section("The law")
    across, beside = ACROSS[found.law]
    x = found.x
    title = f"{across}: {fitted.law.columns[across]}"
    places = np.geomspace(x[across].min(), x[across].max(), 60)
    levels = [0.0] if beside is None else np.quantile(x[beside], np.linspace(0.05, 0.95, CURVES)).tolist()
    levels = list(dict.fromkeys(levels))
    curves, points = [], []
    nearest = None if beside is None else np.abs(x[beside][:, None] - np.array(levels)).argmin(1)
    for place, level in enumerate(levels):
        name = "runs" if beside is None else f"{beside} near {level:.3g}"
        mine = np.ones(len(fitted.loss), dtype=bool) if nearest is None else nearest == place
        points.append(Series(name, x[across][mine].tolist(), x["loss"][mine].tolist()))
        at = {across: places} if beside is None else {across: places, beside: np.full(len(places), level)}
        low, high = fitted.band(at)
        label = "law" if beside is None else f"law at {level:.3g}"
        curves.append(Series(label, places.tolist(), fitted.predict(at).tolist(), low.tolist(), high.tolist()))
    log = found.law != "annealing"
    made.figure(scatter(points, title, "loss, nats a token", curves=curves, log_x=log), "Bands: 95 % of the law.")
    residuals = Series("points", x[across].tolist(), (1e3 * fitted.residuals).tolist())
    made.figure(scatter([residuals], title, "log loss less the law's, x 1,000", log_x=log), "What the law leaves over.")


def _add_held_out(made: Page, found: Fitted) -> None:
    held = found.held_out
    if held is None:
        if found.why_not is not None:
            made.text(f"No size was held out: {found.why_not}")
        return
    made.section("The largest size, predicted from the others")
    rows = [
        [
            float(loss),
            float(predicted),
            float(predicted - loss),
            float(low),
            float(high),
            "yes" if low <= loss <= high else "NO",
        ]
        for loss, predicted, low, high in zip(held.loss, held.predicted, held.low, held.high, strict=True)
    ]
    made.table(["loss", "predicted", "error", "from", "to", "inside"], rows, caption=f"size {held.size:.4g}")


def _add_floor(made: Page, fitted: Fit) -> None:
    """How well the irreducible loss is known: the objective with it held."""
    name = next((p.name for p in fitted.law.parameters if p.name in ("E", "L0")), None)
    if name is None or not len(fitted.resamples):
        return
    values, objective = draw_profile(fitted, name)
    made.section(f"How well {name} is known")
    line = Series("lowest objective", values.tolist(), objective.tolist())
    made.figure(
        line_chart([line], f"{name}, nats a token", "objective", vertical={"fit": fitted.parameters[name]}),
        f"With {name} held and all else fitted again.",
    )


def _add_allocation(made: Page, fitted: Fit) -> None:
    made.section("The best sizes for a budget")
    used = 6 * fitted.x["parameters"] * fitted.x["tokens"]
    budgets = np.geomspace(used.min(), BUDGETS_BEYOND * used.max(), 40)
    found = [optimal(fitted, float(flops)) for flops in budgets]
    for name, title in (("parameters", "parameters N"), ("ratio", "tokens a parameter, D/N")):
        line = Series(
            name,
            budgets.tolist(),
            [getattr(each, name) for each in found],
            [each.intervals[name][0] for each in found],
            [each.intervals[name][1] for each in found],
        )
        chart = line_chart(
            [line], "C = 6 N D, FLOPs", title, log_x=True, log_y=True, vertical={"largest run": float(used.max())}
        )
        made.figure(chart, "Band: 95 %.", height_px=300)


def _add_profiles(made: Page, fitted: IsoFlop) -> None:
    made.section("Profiles")
    points, curves = [], []
    for one in fitted.profiles:
        sizes = np.geomspace(one.parameters.min(), one.parameters.max(), 40)
        name = f"C = {one.flops:.3g}"
        points.append(Series(name, one.parameters.tolist(), one.loss.tolist()))
        curves.append(Series(name, sizes.tolist(), one(sizes).tolist()))
    made.figure(scatter(points, "parameters N", "loss, nats a token", curves=curves, log_x=True))
    made.section("The best sizes for a budget")
    budgets = np.array([one.flops for one in fitted.profiles])
    wide = np.geomspace(budgets.min(), BUDGETS_BEYOND * budgets.max(), 40)
    best, low, high = fitted.best(wide)
    made.figure(
        scatter(
            [Series("minima of the profiles", budgets.tolist(), [one.best for one in fitted.profiles])],
            "C, FLOPs",
            "parameters N",
            curves=[Series("N_opt = k C^a", wide.tolist(), best.tolist(), low.tolist(), high.tolist())],
            log_x=True,
            log_y=True,
        ),
        "Band: 95 %.",
    )
