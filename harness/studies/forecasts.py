"""`harness study prior` and `whatif`: what earlier runs say, and what another schedule would have given."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.config import HarnessError, plain
from harness.forecast import Kind, planned_rates, read_curve
from harness.scaling import Conditioned, Curve, Prior, UnknownAnnealingError, condition, parting
from harness.settings import Settings

DEVIATIONS = 1.959964
"""Half a 95 % interval."""
SCHEDULE_KEYS = ("schedule.", "train.steps")


def prior(runs: Sequence[Path], out: Path, *, kind: Kind = "auto") -> None:
    """Make a prior of earlier runs, one of which at least has annealed, write it to `out` and print it."""
    made = Prior.from_curves(read_curves(runs, kind))
    made.save(out)
    print("\n".join([*prior_lines(made), f"written to {out}; name it in forecast.prior, or by --prior"]))


def whatif(
    run: Path,
    configured: Settings,
    changed: Settings,
    *,
    overrides: Sequence[str] = (),
    prior_file: Path | None = None,
    earlier: Sequence[Path] = (),
    anneal_at: int | None = None,
    over: int | None = None,
    kind: Kind = "auto",
    as_json: bool = False,
) -> None:
    """Predict the final loss of a run under its own schedule and under another one, and the difference; print it.

    The other schedule is `changed`'s from step 1 on, or (`anneal_at`) the run's own until that step and from there a
    fall to schedule.final_fraction of the peak, of the shape schedule.decay_shape, over so many steps. Raises
    HarnessError, one line, where nothing says what annealing gains, or other keys than the schedule's are changed.
    """
    if prior_file is not None and earlier:
        raise HarnessError("--prior and --from: one of the two; a prior is made of earlier runs already")
    check_keys(overrides)
    curve = read_curve(run, kind if prior_file is None or kind != "auto" else _kind_of(Prior.load(prior_file), run))
    found, source = believe(curve, prior_file, earlier)
    other = _other_rates(curve.rates, configured, changed, anneal_at, over)
    answer = compare(found, other)
    name = f"annealed at step {anneal_at} over {over} steps" if anneal_at is not None else " ".join(overrides)
    values = {
        "run": str(run),
        "last_step": int(curve.steps[-1]),
        "of": curve.kind,
        "points": len(found.curve.steps),
        "prior": source,
        "told_by_the_run": found.told,
        "widened": found.inflation,
        "configured": _ends(answer.finals[0], len(curve.rates)),
        "other": _ends(answer.finals[1], len(other)) | {"schedule": name},
        "difference": _ends(answer.difference),
        "parts_after_step": None if np.isinf(answer.parting) else int(answer.parting),
    }
    print(json.dumps(values, indent=2) if as_json else "\n".join(_lines(values)))


@dataclass(frozen=True)
class Comparison:
    """Losses: mean, and half the 95 % interval in nats."""

    finals: tuple[tuple[float, float], tuple[float, float]]
    difference: tuple[float, float]
    parting: float
    """The last step up to which both schedules are one."""


def compare(found: Conditioned, other: np.ndarray) -> Comparison:
    """Mean loss at the last step of the run's own schedule and of another one, and by how much the other is higher:
    the run's floor and drift are in both, so that alike schedules can be told apart by less than each is known to."""
    own = found.curve.rates
    log, covariance = found.joint([(rates, np.array([len(rates)])) for rates in (own, other)])
    losses = np.exp(log)
    in_nats = covariance * np.outer(losses, losses)
    reach = DEVIATIONS * np.sqrt(np.maximum(np.diag(in_nats), 0))
    apart = DEVIATIONS * np.sqrt(max(in_nats[0, 0] + in_nats[1, 1] - 2 * in_nats[0, 1], 0.0))
    first, second = ((float(loss), float(half)) for loss, half in zip(losses, reach, strict=True))
    return Comparison((first, second), (float(losses[1] - losses[0]), float(apart)), parting(own, other))


def believe(curve: Curve, prior_file: Path | None, earlier: Sequence[Path]) -> tuple[Conditioned, str]:
    """The run's curve with what is known besides, and where that came from."""
    if prior_file is not None:
        return condition(Prior.load(prior_file), curve), str(prior_file)
    if earlier:
        if any(path.resolve() == Path(curve.name).resolve() for path in earlier):
            raise HarnessError(f"--from {curve.name}: is the run itself, whose own losses count anyway; leave it out")
        kind: Kind = "training" if curve.kind == "training" else "validation"
        made = Prior.from_curves([read_curve(path, kind) for path in earlier])
        return condition(made, curve), ", ".join(map(str, earlier))
    try:
        made = Prior.from_curves([curve])
    except UnknownAnnealingError:
        raise HarnessError(
            f"{curve.name}: its learning rate has not fallen far enough to tell what annealing gains; give --prior "
            f"FILE (`harness study prior RUN... --out FILE` makes one), or --from RUN... of runs that have annealed"
        ) from None
    return condition(made, curve, vague=True), "none: the run itself has annealed"


def annealed_early(rates: np.ndarray, at: int, over: int, settings: Settings) -> np.ndarray:
    """A run's rates up to step `at`, and a fall from there to schedule.final_fraction of the peak in `over` steps."""
    schedule = settings.schedule
    progress = np.arange(1, over + 1) / over
    remaining = 1 - (np.sqrt(progress) if schedule.decay_shape == "sqrt" else progress)
    last = schedule.final_fraction * rates.max()
    return np.concatenate([rates[:at], last + (rates[at - 1] - last) * remaining])


def read_curves(runs: Sequence[Path], kind: Kind) -> list[Curve]:
    """Of one kind of loss: validation only where all have enough of it."""
    curves = [read_curve(path, kind) for path in runs]
    if len({curve.kind for curve in curves}) > 1:
        curves = [read_curve(path, "training") for path in runs]
    return curves


def check_keys(overrides: Sequence[str]) -> None:
    for override in overrides:
        key = override.partition("=")[0]
        if not key.startswith(SCHEDULE_KEYS[0]) and key != SCHEDULE_KEYS[1]:
            raise HarnessError(
                f"{key}: another run, not another schedule of this one; whatif takes schedule.* and train.steps"
            )


def prior_lines(made: Prior) -> list[str]:
    """For people."""
    deviations = np.sqrt(np.diag(made.covariance))
    lines = [
        f"{one['name']}: {one['points']} {one['kind']} losses up to step {one['last_step']}" for one in made.origin
    ]
    for place, name in enumerate(("A", "C")):
        value, spread = np.exp(made.mean[place]), np.exp(DEVIATIONS * deviations[place])
        lines.append(f"{name} = {value:.4g} (95 %: {value / spread:.4g} to {value * spread:.4g})")
    half = DEVIATIONS * deviations[2]
    lines.append(f"alpha = {made.mean[2]:.4g} (95 %: {made.mean[2] - half:.4g} to {made.mean[2] + half:.4g})")
    left = made.residuals
    lines.append(
        f"the law leaves a drift of {left.drift:.2%} (correlated over {left.length:.2g} e-foldings of the step) and a "
        f"noise of {left.noise:.2%} a point"
    )
    return lines


def _other_rates(
    rates: np.ndarray, configured: Settings, changed: Settings, anneal_at: int | None, over: int | None
) -> np.ndarray:
    if anneal_at is None and over is None:
        if plain(changed.schedule) == plain(configured.schedule) and changed.train.steps == configured.train.steps:
            raise HarnessError(
                "nothing is changed: give keys of the schedule (schedule.kind=wsd, train.steps=20000), or --anneal-at "
                "STEP --over STEPS"
            )
        return planned_rates(changed.schedule, changed.optimizer.learning_rate, changed.train.steps)
    if anneal_at is None or over is None:
        raise HarnessError("--anneal-at STEP and --over STEPS belong together")
    if plain(changed.schedule) != plain(configured.schedule) and changed.schedule.kind != configured.schedule.kind:
        raise HarnessError("--anneal-at keeps the run's own schedule until then; leave schedule.kind out")
    if not 1 <= anneal_at <= len(rates) or over < 1:
        raise HarnessError(
            f"--anneal-at {anneal_at} --over {over}: the fall must begin within the run's {len(rates)} steps, and take "
            f"at least one"
        )
    return annealed_early(rates, anneal_at, over, changed)


def _kind_of(made: Prior, run: Path) -> Kind:
    """The prior's kind of loss, if the run has any of it."""
    kind: Kind = made.origin[0]["kind"] if made.origin else "auto"
    return kind if kind != "validation" or len(read_curve(run, "validation").settled().steps) >= 8 else "training"


def _ends(value: tuple[float, float], steps: int | None = None) -> dict[str, Any]:
    mean, half = value
    found: dict[str, Any] = {"loss": mean, "low": mean - half, "high": mean + half}
    return found if steps is None else {"steps": steps, **found}


def _lines(values: dict[str, Any]) -> list[str]:
    configured, other = values["configured"], values["other"]
    apart, last = values["parts_after_step"], values["last_step"]
    rows = [
        (f"as configured, {configured['steps']} steps", configured, ""),
        (f"{other['schedule']}, {other['steps']} steps", other, ""),
        ("difference", values["difference"], "+"),
    ]
    width = max(len(name) for name, _, _ in rows)
    lines = [
        f"{values['run']}: at step {last}; {values['points']} points of the {values['of']} loss; prior: "
        f"{values['prior']}",
        *(
            f"  {name:<{width}}  {ends['loss']:{sign}.4f}   95 %: {ends['low']:{sign}.4f} to {ends['high']:{sign}.4f}"
            for name, ends, sign in rows
        ),
    ]
    if apart is not None:
        lines.append(f"  one schedule up to step {apart}" + ("" if apart >= last else ", which the run is past"))
    if values["widened"] > 1.05:
        lines.append(
            f"  the run scatters more about the law than the earlier ones: bands are {values['widened']:.2f} times as "
            f"wide"
        )
    return lines
