"""What a budget takes of random scores, beside a plain sort of all of them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from harness.selection.ranking import BINS, Cut, cut_at, to_bins
from harness.selection.work import PART_ROWS, View

Row = tuple[float, int, int, int, int, int]


def draw_views(rng: np.random.Generator, scores: str) -> list[View]:
    """Parts of three shards; digests from so few that scores, contents and ids all tie."""
    views = []
    for shard in range(3):
        for part in range(int(rng.integers(1, 3))):
            count = int(rng.integers(0, 60))
            drawn = {
                "random": rng.normal(0.1, 0.2, count),
                "equal": np.full(count, 0.25),
                "few": rng.choice([0.5, 0.5 + 1e-12, -0.0, 0.0, -3.0, 7.0], count),
                "one bin": 0.3 + rng.random(count) / BINS / 4,
            }[scores]
            measured = {
                "scores": np.where(rng.random(count) < 0.1, np.nan, drawn)[:, None],
                "digest": rng.integers(0, 3, (count, 2)).astype(np.uint64) + np.uint64(2**64 - 4),
                "id_digest": rng.integers(0, 3, count).astype(np.uint64) + np.uint64(2**63 - 1),
                "bytes": rng.integers(0 if scores == "few" else 1, 50, count),
                "open": rng.random(count) < 0.8,
            }
            views.append(View(shard, part, measured))
    return views


def rows_of(views: Iterable[View]) -> list[tuple[Row, int]]:
    """Open rows of known score with what they weigh, best first."""
    rows = []
    for view in views:
        measured = view.measured
        for index in range(len(view)):
            score = float(measured["scores"][index, 0])
            if measured["open"][index] and score == score:
                digest = [int(number) for number in measured["digest"][index]]
                place = (view.shard, view.part * PART_ROWS + index)
                row = (-score, digest[0], digest[1], int(measured["id_digest"][index]), *place)
                rows.append((row, int(measured["bytes"][index])))
    return sorted(rows)


def cut(views: list[View], budget: int) -> Cut:
    def scores(view: View) -> np.ndarray:
        return view.scores[:, 0]

    return cut_at(
        lambda: views, scores, lambda view: view.measured["open"], lambda view: view.measured["bytes"], budget
    )


@pytest.mark.parametrize("scores", ["random", "equal", "few", "one bin"])
def test_a_budget_takes_the_longest_prefix_that_fits(scores: str) -> None:
    rng = np.random.default_rng()
    for _ in range(25):
        views = draw_views(rng, scores)
        rows = rows_of(views)
        total = sum(weight for _, weight in rows)
        for budget in {0, 1, total - 1, total, total + 1, *rng.integers(0, total + 2, 4).tolist()}:
            expected, left = [], budget
            for row, weight in rows:
                if weight > left:
                    break
                expected.append(row)
                left -= weight
            found = cut(views, budget)
            taken = {
                (view.shard, view.first_row + int(index))
                for view in views
                for index in np.flatnonzero(found.takes(view, view.scores[:, 0]) & view.measured["open"])
            }
            assert taken == {row[-2:] for row in expected}
            assert (found.documents, found.amount) == (len(expected), budget - left)
            behind = rows[len(expected)][0] if len(expected) < len(rows) else None
            assert found.next == behind


def test_bins_keep_the_order_and_leave_out_what_is_unknown() -> None:
    rng = np.random.default_rng()
    scores = np.concatenate([rng.normal(0, 1, 1000), [-1.0, 1.0, 1e9, -1e9, 0.0, -0.0]])
    bins = to_bins(scores)
    assert (np.diff(bins[np.argsort(scores)]) >= 0).all()
    assert bins.min() >= 0
    assert bins.max() < BINS
    assert len(set(bins.tolist())) > 500
    assert to_bins(np.array([np.nan, 0.5])).tolist() == [-1, int(to_bins(np.array([0.5]))[0])]


def test_a_pool_without_rows() -> None:
    found = cut([], 5)
    assert (found.documents, found.amount, found.next) == (0, 0, None)
