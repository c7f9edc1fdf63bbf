"""The paired bootstrap against closed forms, and how results become rows."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from harness.studies.selection.analysis import bits_per_byte, difference

LN2 = math.log(2)
NORMAL = 1.959964


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng()


def test_bits_per_byte_are_of_all_items_together() -> None:
    nats = np.array([[8 * LN2, 0.0], [16 * LN2, 8 * LN2]])  # 8 and 24 bits over 4 + 12 bytes
    assert bits_per_byte(nats, np.array([4, 12])) == pytest.approx((8 / 16 + 24 / 16) / 2)


def test_one_model_is_the_bootstrap_of_a_mean(generator: np.random.Generator) -> None:
    """Items of one size under one model: a normal interval with the standard error of the mean."""
    items, size = 400, 50
    change = generator.normal(-3.0, 10.0, items)
    baseline = generator.uniform(100, 200, (1, items))
    found = difference(baseline + change, baseline, np.full(items, size), [(0, 0)], 8000, seed=1)
    unit = LN2 * size
    assert found.mean == pytest.approx(change.mean() / unit)
    half = NORMAL * change.std() / math.sqrt(items) / unit
    assert found.low == pytest.approx(found.mean - half, abs=0.1 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.1 * half)


def test_effects_of_draws_seeds_and_items_all_count(generator: np.random.Generator) -> None:
    """Where effects add up, so do variances: sd² = var(draws)/D + var(seeds)/S + var(items)/n."""
    draws, seeds, items = 25, 30, 100
    keys = list(itertools.product(range(draws), range(seeds)))
    effects = [generator.normal(0, scale, n) for scale, n in ((20.0, draws), (15.0, seeds), (60.0, items))]
    change = np.array([[effects[0][draw] + effects[1][seed] + item for item in effects[2]] for draw, seed in keys])
    baseline = generator.uniform(100, 200, (len(keys), items))
    found = difference(baseline + change, baseline, np.full(items, 10), keys, 5000, seed=2)
    error = math.sqrt(sum(effect.var() / len(effect) for effect in effects)) / LN2 / 10
    assert found.mean == pytest.approx(change.mean() / LN2 / 10)
    assert (found.high - found.low) / 2 == pytest.approx(NORMAL * error, rel=0.08)
    expected = [change[[key[0] == draw for key in keys]].mean() / LN2 / 10 for draw in range(draws)]
    assert found.by_draw == pytest.approx(expected)


def test_what_arm_and_baseline_share_takes_no_part(generator: np.random.Generator) -> None:
    """Pairing: items and models that differ wildly, a constant difference of 2 bits a byte, an interval of no width."""
    sizes = generator.integers(5, 500, 60)
    keys = [(draw, seed) for draw in range(3) for seed in range(5)]
    baseline = generator.uniform(0, 5000, (15, 60))
    found = difference(baseline + 2 * LN2 * sizes, baseline, sizes, keys, 500)
    assert [found.mean, found.low, found.high] == pytest.approx([2.0, 2.0, 2.0])


def test_items_count_by_their_bytes() -> None:
    """A large item outweighs a small one: the ratio of sums, and not the mean of ratios."""
    sizes = np.array([1, 99])
    found = difference(np.array([[LN2, 99 * 3 * LN2]]), np.zeros((1, 2)), sizes, [(0, 0)], 4000)
    assert found.mean == pytest.approx((1 + 297) / 100)
    assert (found.low, found.high) == pytest.approx((1.0, 3.0))  # a quarter each is one item twice


def test_a_grid_with_holes(generator: np.random.Generator) -> None:
    """Only what is there counts, and no resample is empty."""
    keys = [(0, 0), (1, 1), (2, 4)]
    change = np.array([1.0, 2.0, 6.0])[:, None] * np.ones(10)
    found = difference(change, np.zeros((3, 10)), np.ones(10), keys, 2000)
    assert found.mean == pytest.approx(3 / LN2)
    assert 1 / LN2 - 1e-9 <= found.low < found.mean < found.high <= 6 / LN2 + 1e-9
    assert found.pairs == 3


def test_the_same_seed_gives_the_same_interval(generator: np.random.Generator) -> None:
    arm, baseline = generator.normal(size=(2, 6, 30))
    keys = [(draw, seed) for draw in range(2) for seed in range(3)]
    first, second, other = (difference(arm, baseline, np.ones(30), keys, 300, seed=seed) for seed in (5, 5, 6))
    assert first == second != other
