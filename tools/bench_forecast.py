"""Forecasts of the published 25M curves from their first fifth: final loss and band, beside two simpler ways.

    python tools/bench_forecast.py --data DATA/scaling/thu-yao-01-luo_MultiPowerLaw/loss_curve_repo/csv_25 \\
        --out benchmarks/forecast_25m.json

The curves (Luo et al. 2025, arXiv 2503.12811) are of one model of 25 M parameters under nine schedules. The prior is
made of constant_24000 and wsdcon_9 (a drop to 30 % at step 8000) alone. wsdcon_9, the wsd curves and constant_72000
have their first 8,000 steps in common, as the files show: only the cosine curves are runs of which the prior has seen
nothing. Beside it: a power law of the step fitted to the same first fifth, and the last loss of the fifth.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from harness.scaling import LAWS, Curve, Prior, condition, fit

EARLIER = ("constant_24000", "wsdcon_9")
PREDICTED = ("cosine_24000", "wsd_20000_24000", "wsdld_20000_24000")
LONGER = ("constant_72000", "cosine_72000")
"""Beyond the contract: three times as long as any run of the prior."""
ANNEALED = ("cosine_24000", "wsd_20000_24000", "wsdld_20000_24000", "wsdcon_3", "wsdcon_9", "wsdcon_18", "cosine_72000")
"""Of which other priors are made: each of these alone, and each with constant_24000."""
SHARE = 0.2
WARM_UP, PEAK = 2160, 3e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder csv_25")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = {
        "command": "python tools/bench_forecast.py --data DATA/.../csv_25 --out benchmarks/forecast_25m.json",
        "machine": platform.platform(),
        "versions": {name: version(name) for name in ("harness", "numpy", "scipy")},
        **measure(options.data),
    }
    for name, row in result["curves"].items():
        errors = "  ".join(f"{way} {error:+.4f}" for way, error in row["final_error"].items())
        print(f"{name:18} final {row['final']:.4f}  errors: {errors}  covered {row['covered']:.3f}")
    others = {name: value for name, value in result["other_priors"].items() if name != "rows"}
    print("other priors:", others)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(folder: Path) -> dict[str, Any]:
    """The prior's parameters, and of every curve: errors of the final loss in nats (predicted less measured), the
    share of the later points in the 95 % band, the band's width."""
    started = time.process_time()
    prior = Prior.from_curves([read_curve(folder, name) for name in EARLIER])
    seconds = time.process_time() - started
    return {
        "earlier": EARLIER,
        "prefix_share": SHARE,
        "prior": {**prior.as_json(), "cpu_seconds": round(seconds, 2)},
        "contract": PREDICTED,
        "curves": {name: score(prior, read_curve(folder, name)) for name in (*PREDICTED, *LONGER)},
        "other_priors": other_priors(folder),
    }


def other_priors(folder: Path) -> dict[str, Any]:
    """The same with every prior of one annealed curve, alone or with constant_24000, and every curve that is not in
    it: was it luck?"""
    predicted = ("constant_24000", *PREDICTED, *LONGER)
    curves = {name: read_curve(folder, name) for name in {*predicted, *ANNEALED}}
    rows = []
    for earlier in [*([name] for name in ANNEALED), *(["constant_24000", name] for name in ANNEALED)]:
        prior = Prior.from_curves([curves[name] for name in earlier])
        for name in predicted:
            if name not in earlier:
                found = score(prior, curves[name])
                inside = found["final_interval"][0] <= found["final"] <= found["final_interval"][1]
                better = min(abs(found["final_error"][way]) for way in ("power_law", "last_value"))
                error = found["final_error"]["forecast"]
                rows.append(
                    {"earlier": earlier, "predicted": name, "final_error": error, "final_inside": inside}
                    | {"covered": found["covered"], "simpler_error": better}
                )
    return {
        "forecasts": len(rows),
        "mean_covered": float(np.mean([row["covered"] for row in rows])),
        "finals_inside": float(np.mean([row["final_inside"] for row in rows])),
        "mean_absolute_final_error": float(np.mean([abs(row["final_error"]) for row in rows])),
        "better_than_simpler": float(np.mean([abs(row["final_error"]) < row["simpler_error"] for row in rows])),
        "rows": rows,
    }


def score(prior: Prior, curve: Curve) -> dict[str, Any]:
    last = int(SHARE * len(curve.rates))
    begun, later = curve.until(last), curve.steps > last
    started = time.process_time()
    found = condition(prior, begun)
    forecast = found.forecast(curve.steps[later])
    seconds = time.process_time() - started
    losses = curve.losses[later]
    finals = {"forecast": forecast.final[0], **simpler_finals(curve.name, begun, int(curve.steps[-1]))}
    return {
        "final": float(losses[-1]),
        "final_error": {way: value - float(losses[-1]) for way, value in finals.items()},
        "final_interval": list(forecast.final[1:]),
        "covered": float(((forecast.low <= losses) & (losses <= forecast.high)).mean()),
        "mean_absolute_error": float(np.abs(forecast.mean - losses).mean()),
        "mean_width": float((forecast.high - forecast.low).mean()),
        "points": {"before": len(found.curve.steps), "after": int(later.sum())},
        "told": found.told,
        "cpu_seconds": round(seconds, 4),
    }


SIMPLER: dict[str, dict[str, float]] = {}
"""By curve: the fits of power laws take most of the time."""


def simpler_finals(name: str, begun: Curve, last: int) -> dict[str, float]:
    """The loss at step `last` by a power law of the step, and by standing still."""
    if name not in SIMPLER:
        with np.errstate(over="ignore"):  # far from the minimum
            power = fit(LAWS["power"], {"x": begun.steps.astype(float), "loss": begun.losses}, resamples=2)
        value = float(power.predict({"x": np.array([float(last)])})[0])
        SIMPLER[name] = {"power_law": value, "last_value": float(begun.losses[-1])}
    return SIMPLER[name]


def read_curve(folder: Path, name: str) -> Curve:
    """A logged run: 2,160 steps of linear warm-up to 3e-4, and then its own rates: between logged steps on a straight
    line, but where the rate falls at once (wsdcon), the last one."""
    with (folder / f"{name}.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    steps, logged, losses = (np.array([row[key] for row in rows]) for key in ("step", "lr", "loss"))
    every = np.arange(1, int(steps[-1]) + 1)
    between = np.interp(every, steps, logged)
    if name.startswith("wsdcon"):
        between = logged[np.clip(np.searchsorted(steps, every, side="right") - 1, 0, None)]
    rates = np.where(every < WARM_UP, PEAK * every / WARM_UP, between)
    return Curve(name, rates, steps.astype(np.int64), losses)


if __name__ == "__main__":
    main()
