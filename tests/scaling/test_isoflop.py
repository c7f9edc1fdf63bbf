"""Profiles of known parabolas, the best allocation against a search, and rounded parameters."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from harness.config import HarnessError
from harness.scaling import LAWS, Given, best_sizes, fit, fit_isoflop, optimal

HOFFMANN = "A=406.4,B=410.7,E=1.69,alpha=0.34,beta=0.28"
BUDGET = 5.88e23


def profiles(a: float, k: float, noise: float, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Seven sizes around the best one at each of six budgets."""
    flops = np.repeat(np.geomspace(1e18, 1e21, 6), 7)
    sizes = k * flops**a * np.tile(np.geomspace(0.3, 3, 7), 6) * np.exp(0.05 * generator.standard_normal(42))
    loss = 2 + 30 / flops**0.05 + 0.08 * np.log(sizes / (k * flops**a)) ** 2
    return {"parameters": sizes, "flops": flops, "loss": loss + noise * generator.standard_normal(42)}


def test_known_exponents_come_back() -> None:
    generator = np.random.default_rng()
    a = float(generator.uniform(0.4, 0.6))
    exact = fit_isoflop(**profiles(a, 0.1, 0.0, generator), resamples=10)
    assert exact.a == pytest.approx(a, abs=1e-9)
    assert exact.k == pytest.approx(0.1, rel=1e-6)
    assert exact.warnings == ()
    held = 0
    for _ in range(20):
        found = fit_isoflop(**profiles(a, 0.1, 0.003, generator), resamples=200)
        low, high = found.intervals["a"]
        held += low <= a <= high
    assert held >= 15  # of 20 at 95 %: fewer come once in 3,000 times


def test_the_best_size_is_between_its_ends() -> None:
    found = fit_isoflop(**profiles(0.5, 0.1, 0.003, np.random.default_rng()), resamples=100)
    best, low, high = found.best(np.array([1e19, 1e23]))
    assert (low < best).all()
    assert (best < high).all()
    assert high[1] / low[1] > high[0] / low[0], "beyond the data less is known"


def test_what_profiles_cannot_tell() -> None:
    data = profiles(0.5, 0.1, 0.0, np.random.default_rng())
    one = data["flops"] < 2e18
    with pytest.raises(HarnessError, match="all 7 rows are of one budget"):
        fit_isoflop(**{name: values[one] for name, values in data.items()})
    few = np.arange(42) % 7 < 3
    with pytest.raises(HarnessError, match="has 3 sizes; a profile needs 4"):
        fit_isoflop(**{name: values[few] for name, values in data.items()})
    with pytest.raises(HarnessError, match="no lowest point"):
        fit_isoflop(data["parameters"], data["flops"], 10 - data["loss"])
    with pytest.raises(HarnessError, match="row 3 has nan"):
        fit_isoflop(np.where(np.arange(42) == 2, np.nan, data["parameters"]), data["flops"], data["loss"])


def test_a_minimum_outside_of_the_sizes_is_no_measurement() -> None:
    flops = np.repeat([1e18, 1e19], 5)
    best = 0.1 * flops**0.5
    sizes = best * np.concatenate([np.geomspace(1.5, 6, 5), np.geomspace(0.3, 3, 5)])
    found = fit_isoflop(sizes, flops, 2 + 0.1 * np.log(sizes / best) ** 2, resamples=5)
    assert [("1e+18" in text, "outside of those" in text) for text in found.warnings] == [(True, True), (False, False)]
    assert found.profiles[0].best == pytest.approx(best[0])


@pytest.mark.parametrize("budget", [1e18, BUDGET])
def test_the_best_sizes_are_where_a_search_finds_them(budget: float) -> None:
    generator = np.random.default_rng()
    a, b = np.exp(generator.uniform(2, 8, size=2))
    floor, alpha, beta = generator.uniform(1, 2), *generator.uniform(0.25, 0.5, size=2)

    def loss(log_size: float) -> float:
        size = np.exp(log_size)
        return float(floor + a / size**alpha + b / (budget / 6 / size) ** beta)

    found = minimize_scalar(loss, bounds=(5, 45), method="bounded", options={"xatol": 1e-10})
    parameters, tokens, lowest = best_sizes(np.array([a, b, floor, alpha, beta]), budget)
    assert np.log(parameters) == pytest.approx(found.x, abs=1e-4)
    assert lowest == pytest.approx(found.fun)
    assert 6 * parameters * tokens == pytest.approx(budget)


def test_rounded_parameters_say_nothing_of_the_ratio() -> None:
    """Hoffmann's printed values give 93 tokens a parameter, the unrounded ones 59, the refit 18."""
    printed = Given.parse(HOFFMANN)
    assert printed.allocation(BUDGET).ratio == pytest.approx(93, abs=0.5)
    assert Given.parse("A=406.4,B=410.7,E=1.69,alpha=0.3392,beta=0.2849").allocation(BUDGET).ratio == pytest.approx(
        59, abs=0.5
    )
    refit = Given.parse("A=477.83,B=2143.42,E=1.81722,alpha=0.34731,beta=0.36717")
    assert refit.allocation(BUDGET).ratio == pytest.approx(18, abs=0.5)
    low, high = printed.rounding(BUDGET)
    assert low < 59 < 93 < high
    assert "the parameters are rounded" in (printed.warning(BUDGET) or "")
    assert refit.warning(BUDGET) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A=1,B=2,E=3,alpha=0.3", "beta is missing"),
        (HOFFMANN + ",gamma=1", "'gamma=1': should be one of A, B"),
        (HOFFMANN + ",A=1", "each once"),
        (HOFFMANN.replace("1.69", "much"), "E=much: should be a positive number"),
        (HOFFMANN.replace("1.69", "-1"), "E=-1: should be a positive number"),
    ],
)
def test_given_parameters_that_are_none(text: str, message: str) -> None:
    with pytest.raises(HarnessError, match=message):
        Given.parse(text)


def test_the_interval_of_an_allocation_holds_the_truth() -> None:
    generator = np.random.default_rng()
    sizes, tokens = (grid.ravel() for grid in np.meshgrid(np.geomspace(1e6, 1e9, 6), np.geomspace(1e8, 1e11, 6)))
    true = np.array([480.0, 2100.0, 1.8, 0.35, 0.37])
    expected = best_sizes(true, 1e21)[0]
    held = 0
    for _ in range(4):
        clean = LAWS["chinchilla"].predict(
            LAWS["chinchilla"].coordinates(true), {"parameters": sizes, "tokens": tokens}
        )
        loss = clean * np.exp(2e-3 * generator.standard_normal(len(clean)))
        found = optimal(
            fit(LAWS["chinchilla"], {"parameters": sizes, "tokens": tokens, "loss": loss}, resamples=150), 1e21
        )
        low, high = found.intervals["parameters"]
        held += low <= expected <= high
        assert found.parameters * found.tokens * 6 == pytest.approx(1e21)
    assert held >= 1
