"""The race: exact scores only for documents that a cheap estimate does not rule out.

Each document has a sketch, which costs no compression, or features, which cost few pairs (see methods.py). A linear
regression of the exact scores on them, fitted to a random sample and to the documents near the top, estimates the rest;
whose estimate falls short of the last chosen score by more than a margin is out. The margin is a multiple of the
largest shortfall seen among documents near there, and is measured again after each round, until no document that is
still unscored could be missed by this rule. Those that a sketch leaves in the race get features first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from .config import RacingSection
from .ranking import Column, cut_at
from .work import STAGES, View

Parts = Callable[[], Iterable[View]]
ESTIMATED = 8
"""Documents whose features are looked at for each one that is scored, at most in one round."""
HELD_PARTS = 64
"""Parts whose estimates are kept in memory, 1 MB each; those of a larger pool are computed anew each time."""
FITTED_ROWS = 1 << 16
"""Most rows that a regression is fitted to."""
FEWEST_FITTED = 24
"""Of fewer documents the whole pool was scored, or all but some that are the same."""
RANK_TOLERANCE = 1e-9
"""Of the largest singular value: what is smaller is no direction of its own."""
MOST_LEVERAGE = 0.999
"""A document that decides its own estimate alone says little of how far off estimates are; but not nothing."""
ROUNDING = 1e-6
"""How far an estimate may be off for the float32 of the features alone."""


@dataclass(frozen=True)
class Estimator:
    """Exact scores of one set of targets from features: a regression, and how far it falls short."""

    weights: np.ndarray
    """float64 [features + 1], the constant last."""
    shortfall: float
    """The largest (exact − estimate) near the last chosen score, of documents left out of the fit one at a time."""

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """float64 [rows]."""
        estimate: np.ndarray = features.astype(np.float64) @ self.weights[:-1] + self.weights[-1]
        return estimate


@dataclass(frozen=True)
class Audit:
    """What random documents that were scored all the same say of the ones left out."""

    audited: int
    """Documents of the sample that were out of the race."""
    unscored: int
    """Documents out of the race of which only the estimate is known."""
    missed: int
    """Documents of the sample that should have been chosen."""

    def recall(self, chosen: int) -> tuple[float, float]:
        """Of `chosen` documents, the part of the right ones that is among them: an estimate, and the lower end of its
        95 % interval (Clopper and Pearson's, one-sided, for the rate of missed ones in the sample). Where nothing was
        audited, both are what they would be if all unscored ones were missed."""
        rate = self.missed / self.audited if self.audited else 1.0
        missed = rate * self.unscored, _upper_rate(self) * self.unscored
        estimate, least = (chosen / (chosen + count) if count else 1.0 for count in missed)
        return estimate, least


def first_round(parts: Parts, targets: int, budgets: list[int | None], weights: Column, section: RacingSection) -> Rows:
    """Whom to score at first: a random sample; and where all have features, the best by the mean of these. Where all
    have sketches, features of the best are looked at before more are scored."""
    rows = Rows()
    sample = audit_limit(parts, section.audited_documents)
    for view in parts():
        rows.add(view, view.eligible & is_drawn(view, sample))
    for target in range(targets):

        def rough(view: View, target: int = target) -> np.ndarray:
            return view.predictors(STAGES[-1], target).mean(axis=1, dtype=np.float64)

        budget = budgets[target]
        if budget is not None and all(view.predictors(STAGES[-1], target).shape[1] for view in parts()):
            cut = cut_at(parts, rough, lambda view: view.eligible, weights, math.ceil(budget * section.headroom))
            for view in parts():
                rows.add(view, view.eligible & cut.takes(view, rough(view)))
    return rows


class Race:
    """What is known of one set of targets: an estimator for each stage, and who is still in the race by them."""

    def __init__(self, parts: Parts, target: int, focus: float, section: RacingSection) -> None:
        """`focus`: the score near which estimates have to be good."""
        self._parts = parts
        self._target = target
        self._section = section
        sample = audit_limit(parts, section.audited_documents)
        fits = {stage: fit(parts, stage, target, focus, sample) for stage in STAGES}
        self.estimators = {stage: found for stage, found in fits.items() if found is not None}
        self._held: dict[tuple[int, int], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def _estimate(self, view: View) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of every record the estimate of the last stage that it has reached, the margin that it needs (float64), and
        whether that is the last stage of all (bool)."""
        place = (view.shard, view.part)
        if place in self._held:
            return self._held[place]
        estimates, margins = np.full(len(view), np.nan), np.zeros(len(view))
        final = np.zeros(len(view), dtype=bool)
        for stage, estimator in self.estimators.items():
            predictors = view.predictors(stage, self._target)
            if not predictors.shape[1]:
                continue
            reached = ~np.isnan(predictors[:, 0])
            estimates[reached] = estimator(predictors[reached])
            margins[reached] = max(self._section.margin * estimator.shortfall, ROUNDING)
            if stage == STAGES[-1]:
                final = reached
        if len(self._held) < HELD_PARTS:
            self._held[place] = estimates, margins, final
        return estimates, margins, final

    def estimates(self, view: View) -> np.ndarray:
        """float64 [records]."""
        return self._estimate(view)[0]

    def _in(self, view: View, limit: float) -> np.ndarray:
        estimates, margins, _ = self._estimate(view)
        inside: np.ndarray = view.eligible & (estimates >= limit - margins)
        return inside

    def to_score(self, limit: float, weights: Column, most: int | None) -> Rows:
        """Whom to score next: documents at the last stage whose score may reach `limit`, the best by their estimates
        where they weigh more than `most`."""
        return self._pick(limit, weights, most, at_last_stage=True)

    def to_estimate(self, limit: float, weights: Column, most: int | None) -> Rows:
        """Whose features to look at next, likewise: documents of which only a sketch is known."""
        return self._pick(limit, weights, None if most is None else most * ESTIMATED, at_last_stage=False)

    def _pick(self, limit: float, weights: Column, most: int | None, *, at_last_stage: bool) -> Rows:
        def candidates(view: View) -> np.ndarray:
            waiting = self._in(view, limit) & np.isnan(view.scores[:, self._target])
            return waiting & (self._estimate(view)[2] == at_last_stage)

        cut = None if most is None else cut_at(self._parts, self.estimates, candidates, weights, most)
        rows = Rows()
        for view in self._parts():
            mask = candidates(view)
            rows.add(view, mask if cut is None else mask & cut.takes(view, self.estimates(view)))
        return rows

    def audit(self, limit: float) -> Audit:
        """How the random sample fared among those out of the race; `limit` is the last chosen score."""
        sample = audit_limit(self._parts, self._section.audited_documents)
        audited = unscored = missed = 0
        for view in self._parts():
            out = view.eligible & ~self._in(view, limit)
            drawn = out & is_audited(view, sample)
            audited += int(drawn.sum())
            unscored += int((out & np.isnan(view.scores[:, self._target])).sum())
            missed += int((drawn & (view.scores[:, self._target] >= limit)).sum())
        return Audit(audited, unscored, missed)


class Rows:
    """A set of records: bool [records] by shard, in parts."""

    def __init__(self) -> None:
        self._masks: dict[tuple[int, int], np.ndarray] = {}

    def add(self, view: View, mask: np.ndarray) -> None:
        key = (view.shard, view.part)
        self._masks[key] = self._masks[key] | mask if key in self._masks else mask

    def join(self, other: Rows) -> None:
        for key, mask in other._masks.items():
            self._masks[key] = self._masks[key] | mask if key in self._masks else mask

    def __len__(self) -> int:
        return sum(int(mask.sum()) for mask in self._masks.values())

    def by_shard(self, shards: int) -> dict[int, np.ndarray]:
        """bool [records] of every shard."""
        return {
            shard: np.concatenate(
                [np.zeros(0, dtype=bool), *(self._masks[key] for key in sorted(self._masks) if key[0] == shard)]
            )
            for shard in range(shards)
        }


def audit_limit(parts: Parts, documents: int) -> np.uint64:
    """The hash up to which a document is in the random sample, the same whatever the order of the files."""
    lowest = np.zeros(0, dtype=np.uint64)
    for view in parts():
        lowest = np.sort(np.concatenate([lowest, view.measured["digest"][view.eligible, 0]]))[:documents]
    return lowest[-1] if len(lowest) else np.uint64(0)


def is_drawn(view: View, limit: np.uint64) -> np.ndarray:
    """bool [records]: in the random sample."""
    drawn: np.ndarray = view.measured["digest"][:, 0] <= limit
    return drawn


def is_audited(view: View, limit: np.uint64) -> np.ndarray:
    """bool [records]: in the half of the sample that no estimate is fitted to, so that it can be measured there."""
    return is_drawn(view, limit) & (view.measured["digest"][:, 1] % np.uint64(2) == 1)


def fit(parts: Parts, stage: str, target: int, threshold: float, limit: np.uint64) -> Estimator | None:
    """A regression on what was scored on all targets, most of which stands near the threshold or above; without what
    is audited (`limit` as of `audit_limit`), unless there is hardly anything else. None where no document that was
    scored has been at this stage."""
    features, scores, audited = [], [], []
    for view in parts():
        predictors = view.predictors(stage, target)
        if predictors.shape[1]:
            known = np.flatnonzero(view.eligible & ~np.isnan(view.scores[:, target]) & ~np.isnan(predictors[:, 0]))
            features.append(predictors[known])
            scores.append(view.scores[known, target])
            audited.append(is_audited(view, limit)[known])
    if not sum(map(len, scores)):
        return None
    x, y, own = np.concatenate(features).astype(np.float64), np.concatenate(scores), ~np.concatenate(audited)
    if own.sum() >= FEWEST_FITTED:
        x, y = x[own], y[own]
    keep = np.sort(np.argsort(np.abs(y - threshold), kind="stable")[:FITTED_ROWS])
    x, y = x[keep], y[keep]
    # The documents in question are those near the threshold, so there the estimate has to be good.
    spread = max(float(np.std(y)), 1e-12)
    emphasis = 1 / (1 + ((y - threshold) / (spread / 4)) ** 2)
    design = np.column_stack([x, np.ones(len(x))]) * np.sqrt(emphasis)[:, None]
    left, sizes, right = np.linalg.svd(design, full_matrices=False)
    kept = sizes > RANK_TOLERANCE * sizes[0]
    left, sizes, right = left[:, kept], sizes[kept], right[kept]
    weights = right.T @ (left.T @ (y * np.sqrt(emphasis)) / sizes)
    # How far off each document's estimate would be had the fit not seen it: residual / (1 - leverage). Of few documents
    # a regression passes close to all, and says nothing of the others.
    leverage = np.minimum((left * left).sum(axis=1), MOST_LEVERAGE)
    residual = (y - (x @ weights[:-1] + weights[-1])) / (1 - leverage)
    near = np.argsort(np.abs(y - threshold), kind="stable")[: max(200, len(y) // 4)]
    return Estimator(weights, max(float(residual[near].max()), 0.0))


def _upper_rate(audit: Audit) -> float:
    """Upper end of the one-sided 95 % interval of missed / audited."""
    count = audit.audited
    if audit.missed == count:
        return 1.0
    ways = [math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in range(audit.missed + 1)]
    low, high = audit.missed / count, 1.0
    for _ in range(60):  # the rate at which so few misses have a chance of 5 %
        rate = (low + high) / 2
        chance = sum(math.exp(way + k * math.log(rate) + (count - k) * math.log1p(-rate)) for k, way in enumerate(ways))
        low, high = (rate, high) if chance > 0.05 else (low, rate)
    return high
