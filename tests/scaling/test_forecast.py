"""Forecasts of runs whose truth is known: drawn from the law, with drift and noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harness.config import HarnessError
from harness.scaling import Curve, Prior, annealing_areas, condition, forecast, parting
from harness.scaling.residuals import Path as Points
from harness.scaling.residuals import Residuals, noise_of

STEPS, WARM_UP, PEAK = 6000, 200, 1e-3
EVERY = np.arange(1, STEPS + 1)
WARM = np.minimum(EVERY / WARM_UP, 1.0)
FALL = np.clip((EVERY - 4500) / 1500, 0, 1)
SCHEDULES = {
    "constant": PEAK * WARM,
    "cosine": PEAK * WARM * (0.55 + 0.45 * np.cos(np.pi * np.clip((EVERY - WARM_UP) / (STEPS - WARM_UP), 0, 1))),
    "wsd": PEAK * WARM * (1 - 0.9 * FALL),
    "drop": PEAK * WARM * np.where(EVERY > 3000, 0.2, 1.0),
}
LOGGED = np.arange(20, STEPS + 1, 20)
TRUTH = np.array([np.log(0.5), np.log(0.4), 0.5])  # of ln A, ln C, alpha
SCATTER = Residuals(noise=1e-3, drift=1.5e-3, length=0.3)


def made_prior(**changes: object) -> Prior:
    covariance = np.array([[0.01, 0.0, 0.002], [0.0, 0.02, 0.0], [0.002, 0.0, 0.002]])
    return replace(Prior(TRUTH, covariance, SCATTER, 1.5, PEAK, None, None, ()), **changes)


def truth(rates: np.ndarray, floor: float, values: np.ndarray) -> np.ndarray:
    """The law, written out: S1 of the rates, S2 of those with the warm-up at the peak."""
    level = np.where(np.arange(len(rates)) < rates.argmax(), rates.max(), rates)
    return floor + np.exp(values[0]) * np.cumsum(rates) ** -values[2] - np.exp(values[1]) * annealing_areas(level)[1]


def drawn(
    rates: np.ndarray,
    generator: np.random.Generator,
    values: np.ndarray = TRUTH,
    floor: float = 2.7,
    scatter: Residuals = SCATTER,
    name: str = "drawn",
) -> Curve:
    """A run, its drift walked through step by step as the process says, at the steps of LOGGED."""
    drift = scatter.drift * generator.standard_normal()
    drifts = []
    for step, before in zip(LOGGED, np.concatenate([LOGGED[:1], LOGGED[:-1]]), strict=True):
        kept = (before / step) ** (1 / scatter.length)
        drift = kept * drift + scatter.drift * np.sqrt(1 - kept**2) * generator.standard_normal()
        drifts.append(drift)
    noise = scatter.noise * generator.standard_normal(len(LOGGED))
    return Curve(name, rates, LOGGED, truth(rates, floor, values)[LOGGED - 1] * np.exp(np.array(drifts) + noise))


def shares_covered(schedule: str, draws: int, seed: int) -> tuple[float, float]:
    """Of the final points, and of all held-out points, over runs whose A, C and alpha are drawn from the prior."""
    generator, prior = np.random.default_rng(seed), made_prior()
    rates = SCHEDULES[schedule]
    final, every = [], []
    for _ in range(draws):
        curve = drawn(rates, generator, floor=generator.uniform(1.5, 3.5), values=TRUTH)
        mean, covariance, _ = prior.for_run(curve)
        values = generator.multivariate_normal(mean, covariance)
        curve = drawn(rates, generator, values=values, floor=generator.uniform(1.5, 3.5))
        later = curve.steps > STEPS // 5
        found = condition(prior, curve.until(STEPS // 5)).forecast(curve.steps[later])
        inside = (found.low <= curve.losses[later]) & (curve.losses[later] <= found.high)
        final.append(inside[-1])
        every.append(inside.mean())
    return float(np.mean(final)), float(np.mean(every))


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_the_band_covers_what_it_says(schedule: str) -> None:
    """A 95 % band, to the noise of 200 runs (2 sigma: 3 %)."""
    final, every = shares_covered(schedule, draws=200, seed=len(schedule))
    assert 0.90 <= final <= 0.99
    assert 0.90 <= every <= 0.99


def test_it_is_the_conditional_of_one_gaussian() -> None:
    """Prefix and rest as one Gaussian vector, linear about the mode, conditioned by the textbook's formula."""
    curve = drawn(SCHEDULES["wsd"], np.random.default_rng(3))
    prior = made_prior()
    found = condition(prior, curve.until(2000))
    at = np.array([2001, 3333, 5000, 6000])
    points = found.curve.steps
    mean, spread, _ = prior.for_run(curve)
    before = np.zeros((4, 4))
    before[0, 0], before[1:, 1:] = 1.0, spread
    centre = np.concatenate([np.log(found.curve.losses[-1:]), mean])

    def log_law(theta: np.ndarray) -> np.ndarray:
        return np.log(truth(curve.rates, float(np.exp(theta[0])), theta[1:])[np.concatenate([points, at]) - 1])

    slopes = np.stack([(log_law(found.theta + e) - log_law(found.theta - e)) / 2e-6 for e in 1e-6 * np.eye(4)], 1)
    whole = slopes @ before @ slopes.T + SCATTER.drift**2 * np.exp(
        -np.abs(np.subtract.outer(*[np.log(np.concatenate([points, at]))] * 2)) / SCATTER.length
    )
    start = log_law(found.theta) + slopes @ (centre - found.theta)
    own = len(points)
    gain = whole[own:, :own] @ np.linalg.inv(whole[:own, :own] + found.noise**2 * np.eye(own))
    expected = start[own:] + gain @ (np.log(found.curve.losses) - start[:own])
    covariance = whole[own:, own:] - gain @ whole[:own, own:]
    result = found.forecast(at)
    np.testing.assert_allclose(np.log(result.mean), expected, atol=1e-6)
    np.testing.assert_allclose(result.deviation, found.inflation * np.sqrt(np.diag(covariance)), rtol=1e-3)


def test_annealing_is_learnt_where_there_is_some() -> None:
    generator = np.random.default_rng(4)
    values = TRUTH + np.array([0.0, 0.3, 0.0])
    curve = drawn(SCHEDULES["drop"], generator, values=values)
    before = condition(made_prior(), curve.until(3000))
    assert before.told["C"] < 0.01
    assert before.theta[2] == pytest.approx(TRUTH[1], abs=1e-3), "C stays at the prior's"
    after = condition(made_prior(), curve)
    assert after.told["C"] > 0.8
    assert after.theta[2] == pytest.approx(values[1], abs=0.1)


def test_a_prior_of_curves_finds_the_law() -> None:
    """Each curve with a floor of its own; the truth within three standard deviations, and these not endless."""
    away = []
    for seed in range(6):
        generator = np.random.default_rng(seed)
        names = ["constant", "drop", "wsd"][: 2 + seed % 2]
        curves = [drawn(SCHEDULES[name], generator, floor=2 + 0.3 * place) for place, name in enumerate(names)]
        prior = Prior.from_curves(curves)
        off = prior.mean - TRUTH
        away.append(off @ np.linalg.solve(prior.covariance, off) / 3)
        assert prior.covariance[1, 1] ** 0.5 < 0.2
        assert prior.residuals.noise == pytest.approx(SCATTER.noise / 3**0.5, rel=0.3), "of bins of three"
        assert SCATTER.drift / 3 < prior.residuals.drift < 3 * SCATTER.drift
        assert [one["points"] for one in prior.origin] == [285] * len(names), "those behind 5 % of the run"
    assert 0.1 < np.mean(away) < 3, "chi squared of three, a degree"


def test_curves_without_any_noise_are_fitted() -> None:
    curves = [
        Curve(name, SCHEDULES[name], LOGGED, truth(SCHEDULES[name], floor, TRUTH)[LOGGED - 1])
        for name, floor in (("constant", 2.5), ("wsd", 2.8), ("drop", 2.2))
    ]
    for count in (2, 3):
        np.testing.assert_allclose(Prior.from_curves(curves[:count]).mean, TRUTH, atol=0.02)
    found = condition(Prior.from_curves(curves), curves[1].until(2000)).forecast(np.array([STEPS]))
    assert found.mean[0] == pytest.approx(curves[1].losses[-1], rel=5e-3)


def test_without_annealing_there_is_no_prior() -> None:
    curve = drawn(SCHEDULES["constant"], np.random.default_rng(0))
    with pytest.raises(HarnessError, match="no run anneals"):
        Prior.from_curves([curve, drawn(SCHEDULES["constant"], np.random.default_rng(1))])


def test_what_is_no_prior_is_refused(tmp_path: Path) -> None:
    curve = drawn(SCHEDULES["drop"], np.random.default_rng(0))
    with pytest.raises(HarnessError, match="at least one"):
        Prior.from_curves([])
    with pytest.raises(HarnessError, match="2 losses"):
        Prior.from_curves([curve.with_points(LOGGED[-2:], curve.losses[-2:])])
    with pytest.raises(HarnessError, match="differ in peak"):
        Prior.from_curves([curve, replace(curve, rates=2 * curve.rates)])
    with pytest.raises(HarnessError, match="differ in parameters"):
        Prior.from_curves([curve, replace(curve, parameters=1e6)])
    with pytest.raises(HarnessError, match="no prior to read"):
        Prior.load(tmp_path / "absent.json")
    (tmp_path / "other.json").write_text('{"format": 1, "law": "power"}')
    with pytest.raises(HarnessError, match=r"other\.json: is no prior"):
        Prior.load(tmp_path / "other.json")
    (tmp_path / "torn.json").write_text('{"format": 1,')
    with pytest.raises(HarnessError, match="is no prior"):
        Prior.load(tmp_path / "torn.json")


def test_a_curve_is_checked() -> None:
    good = drawn(SCHEDULES["wsd"], np.random.default_rng(0))
    for changes, message in (
        ({"losses": good.losses[:-1]}, "299 losses"),
        ({"losses": np.where(LOGGED == 40, np.nan, good.losses)}, "positive"),
        ({"steps": good.steps[::-1]}, "must rise"),
        ({"rates": good.rates[:-1]}, "by the last rate's, 5999"),
        ({"rates": 0 * good.rates}, "not all 0"),
    ):
        with pytest.raises(HarnessError, match=message):
            replace(good, **changes)
    with pytest.raises(HarnessError, match="needs at least 8"):
        condition(made_prior(), good.until(400))


def test_a_prior_survives_its_file(tmp_path: Path) -> None:
    prior = made_prior(parameters=2.5e7, tokens_per_step=1e5)
    prior.save(tmp_path / "prior.json")
    back = Prior.load(tmp_path / "prior.json")
    assert back.as_json() == prior.as_json()
    np.testing.assert_array_equal(back.covariance, prior.covariance)


def test_another_peak_means_the_same_run_and_a_wider_band() -> None:
    curve = drawn(SCHEDULES["cosine"], np.random.default_rng(5)).until(1500)
    prior = made_prior()
    same = forecast(prior, curve.rates, curve.steps, curve.losses)
    assert len(same.mean) == 4500
    double = forecast(prior, 2 * curve.rates, curve.steps, curve.losses)
    assert abs(np.log(double.final[0] / same.final[0])) < double.deviation[-1]
    assert double.deviation[-1] > 1.5 * same.deviation[-1]
    # The other reading, of absolute rates, is a factor of the parameters: inside the widened prior.
    mean, spread, scale = prior.for_run(replace(curve, rates=2 * curve.rates))
    assert scale == 0.5
    # A S1^-alpha of S1 = 2 s1 as A' s1^-alpha, and C S2 of S2 = 2 s2 as C' s2.
    off = TRUTH + np.array([-TRUTH[2] * np.log(2), np.log(2), 0.0]) - mean
    assert off @ np.linalg.solve(spread, off) < 2


def test_runs_agree_on_the_power_terms_size_where_they_were() -> None:
    """What is added between runs: 5 % of A S1^-alpha at the pivot, and alpha about it, not about S1 = 1."""
    curve = drawn(SCHEDULES["cosine"], np.random.default_rng(5))
    none = np.zeros((3, 3))
    for pivot in (0.1, 30.0):
        added = made_prior(pivot=pivot, covariance=none).for_run(curve)[1]
        for s1 in (pivot, 10 * pivot):
            direction = np.array([1.0, 0.0, -np.log(s1)])
            size = float(direction @ added @ direction) ** 0.5
            assert size == pytest.approx(np.hypot(0.05, 0.02 * np.log(s1 / pivot)))
        alone = made_prior(pivot=pivot, covariance=none, origin=({"name": "one"},)).for_run(curve)[1]
        np.testing.assert_allclose(alone, 4 * added)


def test_other_sizes_and_batches_widen() -> None:
    curve = drawn(SCHEDULES["cosine"], np.random.default_rng(5)).until(1500)
    prior = made_prior(parameters=1e7, tokens_per_step=1e5)
    widths = [
        condition(prior, replace(curve, parameters=size, tokens_per_step=batch)).forecast(np.array([STEPS])).deviation
        for size, batch in ((1e7, 1e5), (1e8, 1e5), (1e9, 1e5), (1e7, 4e5), (None, None))
    ]
    assert widths[0] < widths[1] < widths[2]
    assert widths[0] < widths[3]
    assert widths[0] == widths[4]


def test_a_run_that_scatters_more_has_a_wider_band() -> None:
    wild = Residuals(noise=3e-3, drift=1.5e-2, length=0.05)
    quiet = condition(made_prior(), drawn(SCHEDULES["cosine"], np.random.default_rng(6)).until(2000))
    found = condition(made_prior(), drawn(SCHEDULES["cosine"], np.random.default_rng(6), scatter=wild).until(2000))
    assert quiet.inflation < 1.3
    assert found.inflation > 1.4
    assert found.noise > 2 * quiet.noise


def test_a_spike_that_is_over_changes_little() -> None:
    generator = np.random.default_rng(11)
    curve = drawn(SCHEDULES["wsd"], generator)
    losses = curve.losses.copy()
    losses[[30, 31, 70, 95, 99]] += generator.uniform(0.5, 30, 5)
    spiked = replace(curve, losses=losses)
    found, expected = (
        condition(made_prior(), each.until(2000)).forecast(np.array([STEPS])) for each in (spiked, curve)
    )
    np.testing.assert_allclose(found.mean, expected.mean, rtol=3e-3)
    np.testing.assert_allclose(found.high - found.low, expected.high - expected.low, rtol=0.1)
    earlier = [drawn(SCHEDULES["drop"], generator)]
    made = [Prior.from_curves([*earlier, each]) for each in (curve, spiked)]
    np.testing.assert_allclose(made[0].mean, made[1].mean, atol=0.05)
    assert made[1].residuals.noise < 1.5 * made[0].residuals.noise
    smooth = replace(curve, losses=truth(curve.rates, 2.7, TRUTH)[LOGGED - 1])
    assert len(smooth.settled().without_spikes().steps) == len(smooth.settled().steps)


def test_runs_that_part_share_their_drift_until_then() -> None:
    """Against walks: two runs of one beginning, many times."""
    generator, scatter = np.random.default_rng(7), Residuals(0.0, 1.0, 0.5)
    steps = np.array([100.0, 200.0, 400.0, 800.0])
    walks = []
    for _ in range(40_000 // 4):
        walk = [generator.standard_normal()]
        for _ in range(3):
            walk.append(walk[-1] * 2**-2.0 + np.sqrt(1 - 2**-4.0) * generator.standard_normal())
        other = [*walk[:2]]  # they part at step 200
        for _ in range(2):
            other.append(other[-1] * 2**-2.0 + np.sqrt(1 - 2**-4.0) * generator.standard_normal())
        walks.append(walk + other)
    both = [Points(0, steps), Points(1, steps)]
    found = scatter.drifts(both, both, np.array([[np.inf, 200.0], [200.0, np.inf]]))
    np.testing.assert_allclose(np.cov(np.array(walks).T), found, atol=0.05)
    apart = scatter.drifts(both[:1], both[1:], np.array([[np.inf, 0.0], [0.0, np.inf]]))
    assert not apart.any()


def test_where_schedules_part() -> None:
    constant, wsd = SCHEDULES["constant"], SCHEDULES["wsd"]
    assert parting(constant, wsd) == 4500
    assert parting(constant, constant[:3000]) == np.inf
    assert parting(constant, 2 * constant) == 0


def test_a_difference_of_schedules_is_known_better_than_each() -> None:
    curve = drawn(SCHEDULES["wsd"], np.random.default_rng(8)).until(3000)
    found = condition(made_prior(), curve)
    last, later = np.array([STEPS]), PEAK * WARM * (1 - 0.9 * np.clip((EVERY - 4800) / 1200, 0, 1))
    _, covariance = found.joint([(SCHEDULES["wsd"], last), (later, last)])
    np.testing.assert_allclose(covariance, covariance.T)
    difference = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    assert 0 < difference < 0.1 * covariance[0, 0]


def test_noise_is_what_does_not_go_on() -> None:
    generator = np.random.default_rng(9)
    slope = np.linspace(3, 2, 400)
    assert noise_of(slope + 0.01 * generator.standard_normal(400)) == pytest.approx(0.01, rel=0.15)
