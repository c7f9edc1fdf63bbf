"""The race on synthetic scores of known noise: who is scored, who is missed, and what is said of it."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from harness.selection.config import RacingSection
from harness.selection.racing import Audit, Race, Rows, audit_limit, first_round, fit
from harness.selection.work import View


class Field:
    """Documents whose exact scores are known here, and in the race only once they are asked for."""

    def __init__(self, count: int, noise: float, *, sketched: bool = False, seed: int | None = None) -> None:
        """`sketched`: at first there are sketches of ten times the noise; features have to be asked for."""
        self.rng = np.random.default_rng(seed)
        self.truth = self.rng.beta(2, 12, count)
        self.known = np.full(count, np.nan)
        slopes = self.truth[:, None] * self.rng.uniform(0.5, 2, 4)
        self.features = (slopes + self.rng.normal(0, noise, (count, 4))).astype(np.float32)
        sketch = (slopes + self.rng.normal(0, 10 * noise, (count, 4))).astype(np.float32)
        self.estimated = np.full(count, not sketched)
        self.measured: dict[str, Any] = {
            "bytes": np.ones(count, dtype=np.int64),
            "usable": self.rng.random(count) < 0.95,
            "digest": self.rng.integers(0, 2**64, (count, 2), dtype=np.uint64),
            "id_digest": self.rng.integers(0, 2**64, count, dtype=np.uint64),
            **({"sketch-0": sketch} if sketched else {"features-0": self.features}),
        }
        self.eligible = self.measured["usable"]

    def parts(self) -> list[View]:
        cut = len(self.truth) // 3
        views = []
        for part, place in enumerate((slice(0, cut), slice(cut, None))):
            columns = {name: values[place] for name, values in self.measured.items()}
            found = np.flatnonzero(~np.isnan(self.known[place])) + part * (1 << 16)
            later: dict[str, Any] = {"rows": found, "scores": self.known[place][found - part * (1 << 16)][:, None]}
            rows = np.flatnonzero(self.estimated[place])
            looked_at: dict[str, Any] = {"rows": rows + part * (1 << 16), "features-0": self.features[place][rows]}
            views.append(View(0, part, columns, [("score", later), ("estimate", looked_at)]))
        return views

    def score(self, rows: Rows) -> int:
        asked = rows.by_shard(1)[0]
        assert not (asked & ~self.eligible).any()
        self.known[asked] = self.truth[asked]
        self.estimated |= asked
        return int(asked.sum())

    def last_chosen(self, budget: int) -> float:
        known = np.sort(self.known[~np.isnan(self.known) & self.eligible])
        return float(known[-budget]) if len(known) >= budget else -math.inf

    def run(self, budget: int, section: RacingSection) -> tuple[float, Audit]:
        """The whole race; the part that was scored of the documents that reach the last chosen score, and the audit."""
        self.score(first_round(self.parts, 1, [budget], ones, section))
        for _ in range(200):
            limit = self.last_chosen(budget)
            race = Race(self.parts, 0, limit, section)
            rows = race.to_score(limit, ones, math.ceil(budget * section.headroom))
            if len(rows):
                assert self.estimated[rows.by_shard(1)[0]].all()
                self.score(rows)
                continue
            rows = race.to_estimate(limit, ones, math.ceil(budget * section.headroom))
            if not len(rows):
                break
            asked = rows.by_shard(1)[0]
            assert not (asked & self.estimated).any()
            self.estimated |= asked
        else:
            pytest.fail("the race does not end")
        right = self.eligible & (self.truth >= limit)
        return float((~np.isnan(self.known[right])).mean()), race.audit(limit)


def ones(view: View) -> np.ndarray:
    return np.ones(len(view), dtype=np.int64)


@pytest.mark.parametrize("noise", [0.0, 0.003, 0.02])
def test_no_winner_is_missed_and_most_are_never_scored(noise: float) -> None:
    field = Field(20_000, noise)
    recall, audit = field.run(200, RacingSection())
    assert recall == 1
    assert audit.missed == 0
    assert audit.unscored == int((np.isnan(field.known) & field.eligible).sum())
    scored = float((~np.isnan(field.known)).mean())
    assert scored < {0.0: 0.08, 0.003: 0.15, 0.02: 0.5}[noise]
    assert abs(audit.audited - 512) < 150, "half of the sample"


def test_a_sketch_leaves_few_for_the_features() -> None:
    field = Field(20_000, 0.002, sketched=True)
    recall, audit = field.run(200, RacingSection())
    assert recall == 1
    assert audit.missed == 0
    assert float((~np.isnan(field.known)).mean()) < 0.2
    assert float(field.estimated.mean()) < 0.6


def test_equal_scores_all_stay_in_the_race() -> None:
    """Ties are broken by hashes, so none of them may be left out for the rounding of an estimate."""
    field = Field(3000, 0.0)
    field.truth[:] = np.where(np.arange(3000) % 3 == 0, 0.2, 0.05)
    field.measured["features-0"] = (field.truth[:, None] * [1 / 3, 0.7]).astype(np.float32)
    recall, _ = field.run(100, RacingSection(audited_documents=64))
    assert recall == 1
    assert not np.isnan(field.known[field.eligible & (field.truth == 0.2)]).any()


def test_a_larger_margin_scores_more() -> None:
    counts = []
    for margin in (1.0, 4.0):
        field = Field(5000, 0.01, seed=7)
        field.run(50, RacingSection(margin=margin))
        counts.append(int((~np.isnan(field.known)).sum()))
    assert counts[0] < counts[1]


def test_the_regression_is_the_weighted_one_near_the_threshold() -> None:
    field = Field(2000, 0.01)
    field.known[:] = field.truth
    limit = audit_limit(field.parts, 500)
    estimator = fit(field.parts, "features", 0, 0.3, limit)
    assert estimator is not None
    audited = (field.measured["digest"][:, 0] <= limit) & (field.measured["digest"][:, 1] % np.uint64(2) == 1)
    mine = field.eligible & ~audited
    x = field.measured["features-0"][mine].astype(np.float64)
    y = field.truth[mine]
    weights = 1 / (1 + ((y - 0.3) / (y.std() / 4)) ** 2)
    design = np.column_stack([x, np.ones(len(x))])
    normal = np.linalg.solve(design.T @ (design * weights[:, None]), design.T @ (weights * y))
    np.testing.assert_allclose(estimator.weights, normal, rtol=1e-6, atol=1e-9)
    near = np.argsort(np.abs(y - 0.3))[: max(200, len(y) // 4)]
    gram, moment = design.T @ (design * weights[:, None]), design.T @ (weights * y)
    unseen = []
    for row, weight, score in zip(design[near], weights[near], y[near], strict=True):  # fitted anew without it
        others = np.linalg.solve(gram - weight * np.outer(row, row), moment - weight * row * score)
        unseen.append(score - row @ others)
    assert estimator.shortfall == pytest.approx(max(unseen), rel=1e-6)


def test_the_margin_of_few_documents_is_of_those_that_the_fit_has_not_seen() -> None:
    """Of as many documents as a regression has coefficients, it passes through all: they say nothing of the others."""
    shortfalls = []
    for seed in range(20):
        field = Field(40, 0.02, seed=seed)
        field.measured["usable"][:] = True
        field.known[:8] = field.truth[:8]
        estimator = fit(field.parts, "features", 0, 0.15, np.uint64(0))
        assert estimator is not None
        missed = (field.truth - estimator(field.measured["features-0"]))[8:].max()
        shortfalls.append(missed <= 2 * estimator.shortfall)
    assert sum(shortfalls) >= 12


def test_the_sample_does_not_depend_on_the_order() -> None:
    field = Field(500, 0.0)
    limit = audit_limit(field.parts, 100)
    lowest = np.sort(field.measured["digest"][field.eligible, 0])
    assert limit == lowest[99]
    assert audit_limit(lambda: field.parts()[::-1], 100) == limit
    assert audit_limit(field.parts, 10**6) == lowest[-1]
    assert audit_limit(list, 100) == 0


def test_misses_are_found_where_the_features_say_nothing_of_some() -> None:
    """The best fifth of the winners look like the worst, far from the threshold, where the margin is measured: the
    audit, which no estimate was fitted to, finds their rate."""
    estimates, right, bounds = [], [], []
    for _ in range(5):
        field = Field(20_000, 0.001)
        field.measured["features-0"][field.truth > np.quantile(field.truth, 0.98)] = 0.0
        recall, audit = field.run(2000, RacingSection(audited_documents=4000))
        estimate, least = audit.recall(2000)
        bounds.append(least <= recall)
        estimates.append(estimate)
        right.append(recall)
    assert max(right) < 0.95
    assert abs(np.mean(estimates) - np.mean(right)) < 0.05
    assert sum(bounds) >= 3, "each holds in 19 cases of 20"


def test_recall_is_clopper_and_pearsons() -> None:
    stats = pytest.importorskip("scipy.stats")
    for _ in range(60):
        audited = random.choice([1, 2, 30, 512, 20_000])
        missed = random.choice([0, 0, 1, audited // 2, audited, random.randint(0, audited)])
        audit = Audit(audited, random.randint(1, 10**6), missed)
        chosen = random.randint(1, 10**5)
        upper = 1.0 if missed == audited else stats.beta.ppf(0.95, missed + 1, audited - missed)
        estimate, least = audit.recall(chosen)
        assert estimate == pytest.approx(chosen / (chosen + missed / audited * audit.unscored), rel=1e-9)
        assert least == pytest.approx(chosen / (chosen + upper * audit.unscored), rel=1e-6)
    audit = Audit(200, 5000, 3)
    assert replace(audit, unscored=0).recall(10) == (1, 1)
    assert replace(audit, audited=0, missed=0).recall(10) == (10 / 5010, 10 / 5010)
    assert replace(audit, missed=0).recall(0) == (1, 0)
