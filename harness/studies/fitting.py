"""`harness study fit LAW DATA`: a law fitted to files or runs, printed, and written as JSON and as a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from harness.config import ConfigError, HarnessError
from harness.disk import write_whole
from harness.scaling import (
    LAWS,
    Fit,
    Given,
    HeldOut,
    IsoFlop,
    Table,
    annealing_areas,
    check_repeated,
    fit,
    fit_isoflop,
    hold_out,
    optimal,
    profile,
    read_tables,
)

SUDDEN = 0.1
FEW_CURVES = 5
"""With fewer, resampling whole curves says nothing: points are resampled."""
ISOFLOP = "isoflop"
LAW_NAMES = ("power", "chinchilla", ISOFLOP, "overtraining", "annealing", "encoder-decoder")
X_OF_RUNS = ("parameters", "tokens", "flops")
BUDGETS_BEYOND = 30.0
"""Allocations are drawn up to so many times the largest budget of the data."""


@dataclass(frozen=True)
class FitOptions:
    """What the command line says beside law and data."""

    columns: tuple[str, ...] = ()
    """`name=formula`."""
    count: str = "non-embedding"
    """Of run folders' parameters: see harness.scaling.COUNTS."""
    group: str | None = None
    """A column whose equal values are resampled together: a run's name."""
    drop_highest: int = 0
    """Losses to leave out."""
    delta: float = 1e-3
    decay: float = 0.999
    """Of the annealing law's momentum."""
    warmup: str | None = None
    """`steps,peak`: for curves whose record begins later, the linear warm-up that they had."""
    flops: tuple[float, ...] = ()
    """Budgets to share out, chinchilla."""
    held_out: bool = True
    resamples: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Fitted:
    """Everything that was found."""

    law: str
    fit: Fit | IsoFlop
    held_out: HeldOut | None = None
    why_not: str | None = None
    """Why nothing was held out."""
    whole: Fit | None = None
    """With what --drop-highest left out."""
    flops: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()
    x: Mapping[str, np.ndarray] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        found = {"notes": list(self.notes), **self.fit.as_json()}
        if self.held_out is not None:
            found["held_out"] = self.held_out.as_json()
        elif self.why_not is not None:
            found["held_out"] = {"cannot": self.why_not}
        if self.whole is not None:
            found["with_what_was_dropped"] = {
                "parameters": self.whole.parameters,
                "objective": self.whole.minimum.objective,
            }
        if isinstance(self.fit, Fit) and self.law == "chinchilla":
            found["allocations"] = [optimal(self.fit, flops).as_json() for flops in self.flops]
        return found


def fit_data(law: str, paths: Sequence[Path], options: FitOptions) -> Fitted:
    """HarnessError, one line, for data that cannot be fitted."""
    if law not in LAW_NAMES:
        raise ConfigError(f"{law!r} is no law; known: {', '.join(LAW_NAMES)}")
    if options.flops and law != "chinchilla":
        raise ConfigError(f"--flops: the law {law} shares no compute between parameters and tokens; chinchilla does")
    if options.group is not None and law in (ISOFLOP, "annealing"):
        raise ConfigError(f"--group: {law} resamples by its own budgets or curves; leave it out")
    if law == "annealing":
        return _fit_annealing(paths, options)
    table = read_tables(paths, options.count)
    wanted = _wanted(options.columns)
    if law == "power" and "x" not in wanted and "x" not in table.columns:
        raise HarnessError(
            f"power: what is x? Say --column x=NAME, such as "
            f"x={next((n for n in X_OF_RUNS if n in table.columns), 'N')}; columns: {', '.join(table.columns)}"
        )
    required = ("parameters", "flops", "loss") if law == ISOFLOP else tuple(LAWS[law].columns)
    columns = table.choose(wanted, required)
    check_repeated(table, columns)
    kept, notes = _kept(columns["loss"], options.drop_highest)
    groups = _groups(table, options.group)
    chosen = {name: values[kept] for name, values in columns.items()}
    notes = (*table.notes, *_described(wanted), *notes)
    if law == ISOFLOP:
        found = fit_isoflop(**chosen, resamples=options.resamples, seed=options.seed)
        return Fitted(law, found, notes=notes, x=chosen)
    settings: dict[str, Any] = {"delta": options.delta, "resamples": options.resamples, "seed": options.seed}
    some = None if groups is None else [groups[row] for row in kept]
    fitted = fit(LAWS[law], chosen, groups=some, **settings)
    whole = fit(LAWS[law], columns, groups=groups, **settings | {"resamples": 0}) if len(kept) < len(table) else None
    held, why_not = None, None
    if options.held_out:
        try:
            held = hold_out(LAWS[law], chosen, groups=some, **settings)
        except HarnessError as error:
            why_not = str(error)
    return Fitted(law, fitted, held, why_not, whole, options.flops, notes, chosen)


def show_given(text: str, budgets: Sequence[float], as_json: bool = False) -> None:
    """Print where parameters that somebody published put the best sizes, and what their rounding does to that."""
    given = Given.parse(text)
    if not budgets:
        raise HarnessError("--given needs --flops: the budgets to share out")
    found = [
        given.allocation(flops).as_json()
        | {"ratio_by_rounding": given.rounding(flops), "warning": given.warning(flops)}
        for flops in budgets
    ]
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for each in found:
        print(
            f"{each['flops']:.4g} FLOPs: N = {each['parameters']:.4g}, D = {each['tokens']:.4g}, D/N = "
            f"{each['ratio']:.3g}, loss {each['loss']:.4f}"
        )
        if each["warning"]:
            print(f"warning: {each['warning']}")


def show_fit(law: str, paths: Sequence[Path], options: FitOptions, out: Path | None, as_json: bool) -> None:
    """Fit, print, and with `out` write fit.json and fit.html there."""
    found = fit_data(law, paths, options)
    values = found.as_json()
    if as_json:
        print(json.dumps(values, indent=2))
    else:
        print("\n".join(lines(found)))
    if out is not None:
        from .fit_page import fit_page

        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "fit.json", (json.dumps(values, indent=1) + "\n").encode())
        fit_page(found, values).write(out / "fit.html")
        if not as_json:
            print(f"written: {out / 'fit.json'}, {out / 'fit.html'}")


def lines(found: Fitted) -> list[str]:
    """For people."""
    fitted = found.fit
    values = fitted.as_json()
    said = [f"{values['formula']}", f"source: {values['source']}"]
    units = values.get("units", {})
    for name, value in values["parameters"].items():
        low, high = values["intervals"][name]
        said.append(f"  {name:>6} = {value:<12.6g} 95 %: {low:.4g} to {high:.4g}  {units.get(name, '')}".rstrip())
    if isinstance(fitted, Fit):
        starts = values["starts"]
        said += [
            f"{values['points']} points, {values['resamples']} resamples; objective {fitted.minimum.objective:.6g} "
            f"(sum of Huber's loss at {fitted.delta:g} of log losses), R² {fitted.r_squared:.5f}",
            f"residuals of log losses: standard deviation {fitted.residuals.std():.2g}, largest "
            f"{np.abs(fitted.residuals).max():.2g}",
            f"{'converged' if fitted.minimum.converged else 'NOT CONVERGED'}: gradient {fitted.minimum.gradient:.2g}; "
            f"{starts['at_the_minimum']} of {starts['searched']} searches, the best of {starts['looked_at']} starts, "
            f"ended there",
        ]
        said += [f"{name} is held at {value:.6g}" for name, value in values["constants"].items()]
    else:
        said += [
            f"  C = {one['flops']:.3g}: N_opt {one['parameters']:.4g}, D_opt {one['tokens']:.4g}, loss "
            f"{one['loss']:.4f} ({one['points']} points)"
            for one in values["profiles"]
        ]
    if found.held_out is not None:
        said.append(_said_of(found.held_out))
    elif found.why_not is not None:
        said.append(f"no size could be held out: {found.why_not}")
    if found.whole is not None:
        shown = ", ".join(f"{name} = {value:.5g}" for name, value in found.whole.parameters.items())
        said.append(f"with what was dropped: {shown}")
    for each in found.as_json().get("allocations", []):
        ends = each["intervals"]["ratio"]
        said.append(
            f"{each['flops']:.4g} FLOPs: N = {each['parameters']:.4g}, D = {each['tokens']:.4g}, D/N = "
            f"{each['ratio']:.3g} ({ends[0]:.3g} to {ends[1]:.3g}), loss {each['loss']:.4f}"
        )
    said += [f"note: {note}" for note in found.notes]
    said += [f"warning: {warning}" for warning in values["warnings"]]
    return said


def _said_of(held: HeldOut) -> str:
    error = held.predicted - held.loss
    if len(held.rows) == 1:
        return (
            f"held out, the largest size ({held.size:.4g}): predicted {held.predicted[0]:.4f} ({held.low[0]:.4f} to "
            f"{held.high[0]:.4f}), was {held.loss[0]:.4f}: error {error[0]:+.4f}"
        )
    return (
        f"held out, the largest size ({held.size:.4g}), {len(held.rows)} points: mean error {error.mean():+.4f}, root "
        f"mean square {np.sqrt((error**2).mean()):.4f}; {held.inside} inside of their 95 % intervals"
    )


def _fit_annealing(paths: Sequence[Path], options: FitOptions) -> Fitted:
    """Curves: a file each, or a run folder each; areas of each by itself, resampled by curve where there are three."""
    wanted = _wanted(options.columns)
    parts: dict[str, list[np.ndarray]] = {"s1": [], "s2": [], "loss": []}
    groups: list[str] = []
    for path in paths:
        steps, rates, losses, logged = _curve(path, wanted, options)
        s1, s2 = annealing_areas(rates, options.decay)
        parts["s1"].append(s1[steps - 1][logged])
        parts["s2"].append(s2[steps - 1][logged])
        parts["loss"].append(losses[logged])
        groups += [str(path)] * int(logged.sum())
    columns = {name: np.concatenate(values) for name, values in parts.items()}
    kept, notes = _kept(columns["loss"], options.drop_highest)
    chosen = {name: values[kept] for name, values in columns.items()}
    some = [groups[row] for row in kept] if len(paths) > FEW_CURVES else None
    if some is None:
        notes = (
            *notes,
            "points are resampled by themselves, though neighbours of one curve are alike: intervals are narrow",
        )
    fitted = fit(
        LAWS["annealing"], chosen, groups=some, delta=options.delta, resamples=options.resamples, seed=options.seed
    )
    return Fitted("annealing", fitted, notes=notes, x=chosen, why_not="along runs, use `harness study whatif`")


def _curve(
    path: Path, wanted: Mapping[str, str], options: FitOptions
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Recorded steps [n], the rate of every step from 1 on, the losses [n] and which of them count (after the
    warm-up)."""
    if path.is_dir():
        from harness.runs import read

        log = read(path)
        if not log.metrics:
            raise HarnessError(f"{path}: no step is recorded yet")
        steps, rates, losses = log.steps, log.column("learning_rate"), log.column("loss")
        after = int(log.config.get("schedule", {}).get("warmup_steps", 0))
    else:
        table = read_tables([path])
        names = {"step": "step", "learning_rate": "lr" if "lr" in table.columns else "learning_rate", **wanted}
        found = table.choose(names, ("step", "learning_rate", "loss"))
        order = np.argsort(found["step"], kind="stable")
        steps, rates, losses = (found[name][order] for name in ("step", "learning_rate", "loss"))
        steps, after = steps.astype(np.int64), 0
        if len(np.unique(steps)) < len(steps):
            raise HarnessError(f"{path}: has a step twice; a file has one curve")
    counts = (steps >= max(after, 1)) & np.isfinite(losses)
    every = np.arange(1, int(steps[-1]) + 1)
    whole = _rates(np.maximum(steps, 1), rates, every)
    if options.warmup is not None:
        length, peak = _warmup(options.warmup)
        early = every <= min(length, len(every))
        whole[early] = peak * every[early] / length
    elif steps[0] > 1 and not path.is_dir():
        whole[every < steps[0]] = rates[0]
    return np.maximum(steps, 1), whole, losses, counts


def _rates(steps: np.ndarray, rates: np.ndarray, every: np.ndarray) -> np.ndarray:
    """Of every step, between recorded ones: on a straight line, but a rate that falls by more than SUDDEN of the peak
    from one record to the next falls at the later one."""
    before = np.clip(np.searchsorted(steps, every, side="right") - 1, 0, None)
    after = np.minimum(before + 1, len(steps) - 1)
    sudden = np.abs(rates[after] - rates[before]) > SUDDEN * rates.max()
    return np.asarray(np.where(sudden, rates[before], np.interp(every, steps, rates)))


def _warmup(text: str) -> tuple[int, float]:
    length, _, peak = text.partition(",")
    try:
        return int(length), float(peak)
    except ValueError:
        raise HarnessError(f"--warmup: {text!r}: should be STEPS,PEAK: 2160,3e-4") from None


def _wanted(columns: Sequence[str]) -> dict[str, str]:
    found = {}
    for text in columns:
        name, sign, formula = text.partition("=")
        if not sign or not formula.strip():
            raise HarnessError(f"--column: {text!r}: should be NAME=COLUMN or NAME=FORMULA")
        found[name.strip()] = formula.strip()
    return found


def _described(wanted: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(f"{name} is {formula}" for name, formula in wanted.items())


def _kept(loss: np.ndarray, drop_highest: int) -> tuple[np.ndarray, tuple[str, ...]]:
    if not 0 <= drop_highest < len(loss):
        raise HarnessError(f"--drop-highest {drop_highest}: there are {len(loss)} points")
    if not drop_highest:
        return np.arange(len(loss)), ()
    order = np.argsort(loss, kind="stable")
    dropped = loss[order[-drop_highest:]]
    note = f"the {drop_highest} highest losses are left out, {dropped.min():.4g} to {dropped.max():.4g}"
    return np.sort(order[:-drop_highest]), (note,)


def _groups(table: Table, group: str | None) -> list[Any] | None:
    if group is None:
        return None
    if group not in table.texts:
        raise HarnessError(f"--group {group}: there is no such column; columns: {', '.join(table.texts)}")
    return [str(value) for value in table.texts[group]]


def draw_profile(fitted: Fit, name: str, points: int = 25) -> tuple[np.ndarray, np.ndarray]:
    """Values of a parameter around its estimate, over twice its interval, and the lowest objective at each."""
    value, (low, high) = fitted.parameters[name], fitted.intervals[name]
    reach = max(high - value, value - low, 1e-3 * abs(value))
    values = np.linspace(max(value - 2 * reach, 0.2 * value), value + 2 * reach, points)
    return values, profile(fitted, name, values)
