"""Do 95 % intervals hold the truth? Every law fitted to made-up data of known parameters, again and again.

    python tools/check_coverage.py --out benchmarks/scaling_coverage.json [--repetitions 200] [--workers 2]

Noise: losses times exp(0.002 z), as two seeds of a run differ. Sizes as studies have them: 42 runs (24 of one quantity,
60 points along runs). The goal is that each parameter's interval holds its true value in at least 90 % of repetitions.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from harness.scaling import LAWS, fit, fit_isoflop

NOISE = 2e-3
GOAL = 0.90
TRUE: dict[str, dict[str, float]] = {
    "power": {"E": 1.7, "x0": 3e7, "alpha": 0.3},
    "chinchilla": {"A": 480.0, "B": 2100.0, "E": 1.8, "alpha": 0.35, "beta": 0.37},
    "overtraining": {"A": 50.0, "B": 90.0, "E": 1.7, "k": 0.3},
    "annealing": {"L0": 2.6, "A": 0.45, "C": 0.4, "alpha": 0.5},
    "encoder-decoder": {"a": 0.9, "pe": 0.2, "pd": 0.3, "E": 1.4},
    "isoflop": {"a": 0.5, "b": 0.5, "k": 0.1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--resamples", type=int, default=300)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    laws = {}
    started = time.perf_counter()
    with multiprocessing.Pool(options.workers) as pool:
        for name in TRUE:
            jobs = [(name, seed, options.resamples) for seed in range(options.repetitions)]
            found = pool.starmap(repeat, jobs, chunksize=4)
            laws[name] = summary(name, found)
            print(name, laws[name], flush=True)
    result = {
        "command": f"python tools/check_coverage.py --out {options.out} --repetitions {options.repetitions} "
        f"--resamples {options.resamples}",
        "machine": {"system": platform.platform(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), "numpy": version("numpy"), "scipy": version("scipy")},
        "noise_of_log_loss": NOISE,
        "goal": GOAL,
        "seconds": round(time.perf_counter() - started),
        "laws": laws,
        "goal_met": all(share >= GOAL for law in laws.values() for share in law["covered"].values()),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def repeat(name: str, seed: int, resamples: int) -> tuple[list[bool], list[float], bool]:
    """Whether each interval holds the truth, how wide it is as a share of it, and whether the fit converged."""
    generator = np.random.default_rng([seed, sorted(TRUE).index(name)])
    columns = data(name, generator)
    if name == "isoflop":
        found: Any = fit_isoflop(**columns, resamples=resamples, seed=seed)
        converged = True
    else:
        found = fit(LAWS[name], columns, resamples=resamples, seed=seed)
        converged = found.minimum.converged
    ends = [found.intervals[parameter] for parameter in TRUE[name]]
    held = [low <= true <= high for true, (low, high) in zip(TRUE[name].values(), ends, strict=True)]
    widths = [(high - low) / true for true, (low, high) in zip(TRUE[name].values(), ends, strict=True)]
    return held, widths, converged


def data(name: str, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """The columns of a law, with noise."""
    if name == "isoflop":
        flops = np.repeat(np.geomspace(1e18, 1e21, 6), 7)
        best = TRUE[name]["k"] * flops ** TRUE[name]["a"]
        sizes = best * np.tile(np.geomspace(0.3, 3, 7), 6) * np.exp(0.05 * generator.standard_normal(42))
        loss = 2 + 30 / flops**0.05 + 0.08 * np.log(sizes / best) ** 2
        return {"parameters": sizes, "flops": flops, "loss": loss * np.exp(NOISE * generator.standard_normal(42))}
    law, x = LAWS[name], design(name)
    constants = {f"{side}0": np.exp(np.log(x[side]).mean()) for side in ("encoder", "decoder") if side in x}
    clean = law.predict(law.coordinates(np.array(list(TRUE[name].values()))), {**x, **constants})
    return {**x, "loss": clean * np.exp(NOISE * generator.standard_normal(len(clean)))}


def design(name: str) -> dict[str, np.ndarray]:
    sizes, tokens = (grid.ravel() for grid in np.meshgrid(np.geomspace(1e6, 1e9, 7), np.geomspace(1e8, 1e11, 6)))
    if name == "power":
        return {"x": np.geomspace(1e5, 1e10, 24)}
    if name == "annealing":
        s1, s2 = np.meshgrid(np.linspace(0.2, 4, 12), np.linspace(0, 0.2, 5))
        return {"s1": s1.ravel(), "s2": s2.ravel()}
    if name == "encoder-decoder":
        return {"encoder": sizes, "decoder": tokens / 100}
    return {"parameters": sizes, "tokens": tokens}


def summary(name: str, found: list[tuple[list[bool], list[float], bool]]) -> dict[str, Any]:
    held = np.array([each[0] for each in found])
    widths = np.array([each[1] for each in found])
    names = list(TRUE[name])
    return {
        "covered": dict(zip(names, held.mean(0).round(4).tolist(), strict=True)),
        "median_width": {k: float(f"{v:.3g}") for k, v in zip(names, np.median(widths, axis=0), strict=True)},
        "converged": sum(each[2] for each in found),
        "repetitions": len(found),
    }


if __name__ == "__main__":
    main()
