"""Box arithmetic against numpy: a box is a region of a grid of cells that can be counted."""

from __future__ import annotations

import numpy as np
import pytest

from harness.checkpoint.boxes import Box, cover_problem


def random_box(rng: np.random.Generator, shape: tuple[int, ...]) -> Box:
    starts = [int(rng.integers(0, size + 1)) for size in shape]
    return Box(
        tuple(starts), tuple(int(rng.integers(0, size - start + 1)) for size, start in zip(shape, starts, strict=True))
    )


def cells(box: Box, shape: tuple[int, ...]) -> np.ndarray:
    grid = np.zeros(shape, dtype=int)
    grid[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.shape, strict=True))] = 1
    return grid


@pytest.mark.parametrize("dimensions", [0, 1, 2, 3, 4])
def test_intersection_is_that_of_the_cells(dimensions: int) -> None:
    rng = np.random.default_rng()
    for _ in range(200):
        shape = tuple(int(size) for size in rng.integers(1, 7, dimensions))
        first, second = random_box(rng, shape), random_box(rng, shape)
        both = cells(first, shape) & cells(second, shape)
        common = first.intersect(second)
        if common is None:
            assert both.sum() == 0
            continue
        np.testing.assert_array_equal(cells(common, shape), both)
        values = rng.normal(size=shape)
        within_first = values[first.slices_in(Box((0,) * dimensions, shape))]
        np.testing.assert_array_equal(
            within_first[common.slices_in(first)], values[common.slices_in(Box((0,) * dimensions, shape))]
        )


def test_cover_is_each_cell_once() -> None:
    rng = np.random.default_rng()
    verdicts = set()
    for _ in range(3000):
        shape = tuple(int(size) for size in rng.integers(1, 4, rng.integers(1, 4)))
        boxes = [random_box(rng, shape) for _ in range(rng.integers(0, 5))]
        if rng.random() < 0.5:
            cut = int(rng.integers(0, shape[0] + 1))
            boxes = [
                Box((0,) * len(shape), (cut, *shape[1:])),
                Box((cut, *(0,) * (len(shape) - 1)), (shape[0] - cut, *shape[1:])),
            ]
        tiles = bool((sum((cells(box, shape) for box in boxes), np.zeros(shape, dtype=int)) == 1).all())
        assert (cover_problem(shape, boxes) is None) == tiles, (shape, boxes)
        verdicts.add(tiles)
    assert verdicts == {True, False}


def test_cover_names_the_reason() -> None:
    assert cover_problem((4, 3), [Box((0, 0), (2, 3))]) == "only 6 of its 12 elements are there"
    assert "overlap" in str(cover_problem((4,), [Box((0,), (3,)), Box((2,), (2,))]))
    assert "does not lie inside" in str(cover_problem((4,), [Box((2,), (3,))]))
    assert "does not lie inside" in str(cover_problem((4, 1), [Box((0,), (4,))]))
    assert cover_problem((), [Box((), ())]) is None
    assert cover_problem((), []) == "only 0 of its 1 elements are there"
    assert "overlap" in str(cover_problem((), [Box((), ()), Box((), ())]))
    assert cover_problem((0, 5), []) is None
