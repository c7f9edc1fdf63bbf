"""The laws' gradients beside finite differences in higher precision, and known values."""

from __future__ import annotations

import numpy as np
import pytest

from harness.scaling import LAWS, annealing_areas


def columns(name: str, generator: np.random.Generator, points: int = 12) -> dict[str, np.ndarray]:
    draw = {
        "power": lambda: {"x": 10 ** generator.uniform(5, 10, points)},
        "chinchilla": lambda: {
            "parameters": 10 ** generator.uniform(5, 10, points), "tokens": 10 ** generator.uniform(7, 12, points)
        },
        "overtraining": lambda: {
            "parameters": 10 ** generator.uniform(5, 10, points), "tokens": 10 ** generator.uniform(7, 12, points)
        },
        "annealing": lambda: {"s1": generator.uniform(0.1, 4, points), "s2": generator.uniform(0, 0.2, points)},
        "encoder-decoder": lambda: {
            "encoder": 10 ** generator.uniform(5, 9, points), "decoder": 10 ** generator.uniform(5, 9, points)
        },
    }  # fmt: skip
    return draw[name]()


@pytest.mark.parametrize("name", LAWS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    law, generator = LAWS[name], np.random.default_rng()
    x = columns(name, generator)
    for theta in law.grid()[generator.integers(0, len(law.grid()), 8)] + generator.normal(0, 0.05, len(law.parameters)):
        value, gradient = law.value_and_gradient(theta, x)
        assert value.shape == (12,)
        for place in range(len(theta)):
            moved = theta.copy()
            step = 1e-6
            moved[place] += step
            up = law.predict(moved, x)
            moved[place] -= 2 * step
            slope = (up - law.predict(moved, x)) / (2 * step)
            np.testing.assert_allclose(gradient[:, place], slope, rtol=1e-5, atol=1e-7 * np.abs(value).max())


@pytest.mark.parametrize("name", LAWS)
def test_many_parameters_at_once_are_each_by_itself(name: str) -> None:
    law, generator = LAWS[name], np.random.default_rng()
    x, grid = columns(name, generator), LAWS[name].grid()[:6].reshape(2, 3, -1)
    value, gradient = law.value_and_gradient(grid, x)
    assert value.shape == (2, 3, 12)
    assert gradient.shape == (2, 3, 12, grid.shape[-1])
    for row in np.ndindex(2, 3):
        alone = law.value_and_gradient(grid[row], x)
        np.testing.assert_allclose(value[row], alone[0], rtol=1e-12)
        np.testing.assert_allclose(gradient[row], alone[1], rtol=1e-12)


def test_formulas_by_hand() -> None:
    def at(name: str, values: list[float], **x: float) -> float:
        law = LAWS[name]
        theta = law.coordinates(np.array(values))
        np.testing.assert_allclose(law.natural(theta), values)
        return float(law.predict(theta, {key: np.array([value]) for key, value in x.items()})[0])

    assert at("power", [1.7, 1e8, 0.5], x=4e8) == pytest.approx(1.7 + 0.5)
    assert at("chinchilla", [400.0, 2000.0, 1.8, 0.5, 0.25], parameters=1e4, tokens=1e8) == pytest.approx(1.8 + 4 + 20)
    over = at("overtraining", [10.0, 20.0, 1.8, 0.5], parameters=1e4, tokens=1e6)
    assert over == pytest.approx(1.8 + 0.1 + 20 * 6**-0.25 * 1e-3)
    assert at("annealing", [2.6, 0.4, 0.5, 0.5], s1=4.0, s2=0.2) == pytest.approx(2.6 + 0.2 - 0.1)
    pair = at("encoder-decoder", [0.8, 0.5, 0.25, 1.5], encoder=4e6, decoder=16e6, encoder0=1e6, decoder0=1e6)
    assert pair == pytest.approx(1.5 + 0.8 * 0.5 * 0.5)


def test_annealing_areas_are_the_sums_of_their_definition() -> None:
    rates = np.random.default_rng().uniform(0, 3e-4, 300)
    s1, s2 = annealing_areas(rates, 0.99)
    momentum = area = total = 0.0
    for step, rate in enumerate(rates):
        total += rate
        momentum = 0.99 * momentum + ((rates[step - 1] - rate) if step else 0.0)
        area += momentum
        assert s1[step] == pytest.approx(total)
        assert s2[step] == pytest.approx(area, abs=1e-12)


def test_landmarks_of_the_annealing_paper() -> None:
    """20,000 steps, the first 500 counted at the peak of 2e-4; cosine to zero (arXiv 2408.11029)."""
    steps = np.arange(20_001)
    constant = np.full(20_001, 2e-4)
    progress = np.clip((steps - 500) / 19_500, 0, 1)
    s1, s2 = annealing_areas(1e-4 * (1 + np.cos(np.pi * progress)))
    assert annealing_areas(constant)[0][-1] == pytest.approx(4.0002, abs=1e-6)
    assert s1[-1] == pytest.approx(2.0501, abs=1e-4)
    assert s2[-1] == pytest.approx(0.1975, abs=1e-4)
