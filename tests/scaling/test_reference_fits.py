"""Published fits, from published data."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize

from harness.scaling import LAWS, Fit, annealing_areas, fit, profile
from harness.scaling.objective import Objective
from harness.scaling.search import GRADIENT, relative_gradient

DATA = Path(os.environ.get("HARNESS_TEST_DATA", "absent")) / "scaling"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="HARNESS_TEST_DATA names no folder with scaling data")


def chinchilla_points(drop: int) -> dict[str, np.ndarray]:
    with (DATA / "epoch-research_analyzing-chinchilla" / "svg_extracted_data.csv").open() as file:
        rows = list(csv.DictReader(file))
    size, flops, loss = (np.array([float(row[key]) for row in rows]) for key in ("Model Size", "Training FLOP", "loss"))
    kept = np.sort(np.argsort(loss)[: len(loss) - drop])
    return {"parameters": size[kept], "tokens": (flops / (6 * size))[kept], "loss": loss[kept]}


@pytest.fixture(scope="module")
def chinchilla() -> Fit:
    return fit(LAWS["chinchilla"], chinchilla_points(5), resamples=1000)


def test_chinchilla_is_reproduced(chinchilla: Fit) -> None:
    found = chinchilla
    values = found.parameters
    assert found.minimum.objective <= 0.00101828
    assert values["E"] == pytest.approx(1.81722, abs=2e-4)
    assert values["alpha"] == pytest.approx(0.34731, abs=5e-4)
    assert values["beta"] == pytest.approx(0.36717, abs=5e-4)
    assert values["A"] == pytest.approx(477.83, rel=5e-3)
    assert values["B"] == pytest.approx(2143.42, rel=1e-2)
    assert found.minimum.converged
    assert found.minimum.agreeing > 1


def test_its_bootstrap_intervals_are_the_published_ones(chinchilla: Fit) -> None:
    """To the noise of 1,000 resamples of 240 points."""
    intervals = chinchilla.intervals
    for name, (low, high), tolerance in (
        ("A", (290, 740), 0.08),
        ("B", (1050, 5850), 0.15),
        ("E", (1.770, 1.872), 0.003),
        ("alpha", (0.318, 0.373), 0.01),
        ("beta", (0.332, 0.416), 0.02),
    ):
        assert intervals[name][0] == pytest.approx(low, rel=tolerance), name
        assert intervals[name][1] == pytest.approx(high, rel=tolerance), name


def test_the_published_parameters_minimise_another_objective(chinchilla: Fit) -> None:
    """482.01, 2085.43, 1.8172, 0.3478, 0.3658 (arXiv 2404.10102) are of a Huber density whose scale is free."""
    found, law = chinchilla, LAWS["chinchilla"]
    objective = Objective(law, found.x, found.loss)

    def less_log_density(values: np.ndarray) -> tuple[float, np.ndarray]:
        """exp(-Huber(r / scale)) / scale, of θ and the log of the scale."""
        residual, jacobian = objective.residuals(values[:-1])
        scaled = residual * np.exp(-values[-1])
        size = np.abs(scaled)
        huber = np.where(size <= 1e-3, 0.5 * size**2, 1e-3 * (size - 0.5e-3))
        slope = np.clip(scaled, -1e-3, 1e-3)
        gradient = np.append((slope * np.exp(-values[-1])) @ jacobian, len(size) - slope @ scaled)
        return float(huber.sum() + len(size) * values[-1]), gradient

    start = np.append(found.minimum.theta, np.log(3e-6))
    ends = [
        minimize(
            less_log_density, start + np.append(shift * np.ones(5), 0), jac=True, method="BFGS", options={"gtol": 1e-6}
        )
        for shift in (0.0, 1e-3, -1e-3, 1e-2)
    ]
    values = law.natural(min(ends, key=lambda end: end.fun).x[:-1])
    np.testing.assert_allclose(values, [482.01, 2085.43, 1.8172, 0.3478, 0.3658], rtol=0.01)
    assert values[3] == pytest.approx(0.3478, abs=4e-4)
    assert abs(values[3] - found.parameters["alpha"]) > 2e-4, "and not the other one's"


def test_the_outliers_matter(chinchilla: Fit) -> None:
    every = fit(LAWS["chinchilla"], chinchilla_points(0), resamples=20).parameters
    for name, value, tolerance in (("A", 495.7, 0.01), ("B", 12846, 0.03), ("E", 1.891, 1e-3), ("beta", 0.453, 5e-3)):
        assert every[name] == pytest.approx(value, rel=tolerance), name


def test_a_search_that_stops_early_is_not_converged(chinchilla: Fit) -> None:
    """The mean objective, numeric gradients and default tolerances: the published trap."""
    found, law = chinchilla, LAWS["chinchilla"]
    objective = Objective(law, found.x, found.loss)
    ends = [
        minimize(lambda theta: float(objective(theta)) / 240, start, method="L-BFGS-B")
        for start in law.grid()[:: len(law.grid()) // 40]
    ]
    best = min(ends, key=lambda end: end.fun)
    assert best.fun * 240 > 1.02 * found.minimum.objective
    assert relative_gradient(objective, best.x) > 100 * GRADIENT
    assert found.minimum.gradient < GRADIENT


def test_the_profile_of_the_floor_has_its_minimum_at_the_fit(chinchilla: Fit) -> None:
    found = chinchilla
    floor = found.parameters["E"]
    values = profile(found, "E", np.array([floor - 0.05, floor - 0.01, floor, floor + 0.01, floor + 0.05]))
    assert values[2] == pytest.approx(found.minimum.objective, rel=1e-6)
    assert values[0] > values[1] > values[2] < values[3] < values[4]


def tissue_points() -> dict[str, np.ndarray]:
    """20,000 steps at a peak of 2e-4, the 500 of the warm-up counted at the peak."""
    steps = np.arange(20_001)
    progress = np.clip((steps - 500) / 19_500, 0, 1)
    rates = {"constant": np.full(20_001, 2e-4), "cosine": 1e-4 * (1 + np.cos(np.pi * progress))}
    areas = {name: annealing_areas(rate) for name, rate in rates.items()}
    with (DATA / "tissue-2408.11029" / "points.csv").open() as file:
        rows = list(csv.DictReader(file))
    places = [(areas[row["schedule"]], int(row["step"])) for row in rows]
    return {
        "s1": np.array([area[0][step] for area, step in places]),
        "s2": np.array([area[1][step] for area, step in places]),
        "loss": np.array([float(row["loss"]) for row in rows]),
    }


def test_annealing_is_reproduced() -> None:
    found = fit(LAWS["annealing"], tissue_points(), resamples=200)
    values = found.parameters
    assert values["L0"] == pytest.approx(2.628, abs=2e-3)
    assert values["A"] == pytest.approx(0.430, abs=5e-3)
    assert values["C"] == pytest.approx(0.411, abs=5e-3)
    assert values["alpha"] == pytest.approx(0.550, abs=2e-3)
    assert found.minimum.objective == pytest.approx(1.629e-5, rel=1e-3)
    assert found.r_squared == pytest.approx(0.99963, abs=2e-5)
    assert found.minimum.converged


MULTIPOWER = "thu-yao-01-luo_MultiPowerLaw/loss_curve_repo/csv_25"


def curve(name: str) -> dict[str, np.ndarray]:
    """A logged run: 2,160 steps of linear warm-up to 3e-4, counted as they are, and then its own rates: between logged
    steps on a straight line, but where the rate falls at once (wsdcon), the last one."""
    with (DATA / MULTIPOWER / f"{name}.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    steps = np.array([row["step"] for row in rows])
    every = np.arange(int(steps[-1]) + 1)
    logged = np.array([row["lr"] for row in rows])
    between = np.interp(every, steps, logged)
    if name.startswith("wsdcon"):
        between = logged[np.clip(np.searchsorted(steps, every, side="right") - 1, 0, None)]
    rates = np.where(every < 2160, 3e-4 * every / 2160, between)
    s1, s2 = annealing_areas(rates)
    places = steps.astype(int)
    return {"s1": s1[places], "s2": s2[places], "loss": np.array([row["loss"] for row in rows]), "step": steps}


def joined(names: list[str], before: int) -> dict[str, np.ndarray]:
    curves = [curve(name) for name in names]
    kept = [one["step"] < before for one in curves]
    return {
        key: np.concatenate([one[key][keep] for one, keep in zip(curves, kept, strict=True)])
        for key in ("s1", "s2", "loss")
    }


def test_annealing_predicts_other_schedules() -> None:
    found = fit(LAWS["annealing"], joined(["cosine_24000", "constant_24000", "wsdcon_9"], 24_000), resamples=50)
    values = found.parameters
    assert values["L0"] == pytest.approx(3.0680, abs=2e-3)
    assert values["A"] == pytest.approx(0.4913, abs=5e-3)
    assert values["C"] == pytest.approx(0.3977, abs=5e-3)
    assert values["alpha"] == pytest.approx(0.5715, abs=2e-3)
    assert found.minimum.objective == pytest.approx(2.263e-4, rel=1e-3)
    others = ["constant_72000", "cosine_72000", "wsd_20000_24000", "wsdcon_18", "wsdcon_3", "wsdld_20000_24000"]
    errors = [(curve(name)["loss"], found.predict(curve(name)) - curve(name)["loss"]) for name in others]
    assert np.mean([np.abs(error).mean() for _, error in errors]) == pytest.approx(0.00516, rel=0.01)
    assert np.mean([np.sqrt((error**2).mean()) for _, error in errors]) == pytest.approx(0.00661, rel=0.01)
    explained = [1 - (error**2).sum() / ((loss - loss.mean()) ** 2).sum() for loss, error in errors]
    assert np.mean(explained) == pytest.approx(0.9976, abs=1e-4)
