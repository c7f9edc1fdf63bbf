"""Which documents a budget takes: by score, then content hash, then id, without ever sorting all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from .work import View

BINS = 1 << 16
LOWEST, HIGHEST = -1.0, 1.0
"""Scores outside fall into the first and the last bin."""

Rank = tuple[float, int, int, int, int, int]
Column = Callable[[View], np.ndarray]
"""An array of a view, a row a record."""


@dataclass(frozen=True)
class Cut:
    """The end of a choice: everything in a better bin of scores is in it, and of its own bin what ranks no later than
    its last document."""

    bin: int
    last: Rank | None
    """Rank of the last document of the bin that is in; None: none of the bin."""
    documents: int
    amount: int
    """Documents, tokens or bytes, as the budget counts."""
    next: Rank | None = None
    """Rank of the first document that did not fit; None where all did."""

    def takes(self, view: View, scores: np.ndarray) -> np.ndarray:
        """bool [records]; False where a score is unknown (NaN)."""
        bins = to_bins(scores)
        taken: np.ndarray = bins > self.bin
        if self.last is not None:
            border = np.flatnonzero(bins == self.bin)
            taken[border] = [rank <= self.last for rank in ranks(view, scores, border)]
        return taken


def to_bins(scores: np.ndarray) -> np.ndarray:
    """int64: higher for higher scores, -1 for unknown ones (NaN)."""
    place = (np.nan_to_num(scores, nan=LOWEST) - LOWEST) / (HIGHEST - LOWEST)
    bins = np.clip(np.floor(place * BINS), 0, BINS - 1).astype(np.int64)
    return np.where(np.isnan(scores), -1, bins)


def ranks(view: View, scores: np.ndarray, indices: np.ndarray) -> list[Rank]:
    """Keys that sort records best first: score, hash of the content, of the id, then place."""
    digest, ids = view.measured["digest"], view.measured["id_digest"]
    return [
        (
            -float(scores[index]),
            int(digest[index, 0]),
            int(digest[index, 1]),
            int(ids[index]),
            view.shard,
            view.first_row + int(index),
        )
        for index in indices
    ]


def cut_at(parts: Callable[[], Iterable[View]], scores: Column, open_to: Column, weights: Column, budget: int) -> Cut:
    """The longest prefix of the ranking whose weights add up to `budget` or less.

    Only records in `open_to` (bool) with a known score are ranked; `weights` are int64. Two passes over the parts: a
    histogram that finds the bin in which the budget ends, then the records of that bin alone.
    """
    amounts, counts = np.zeros(BINS, dtype=np.int64), np.zeros(BINS, dtype=np.int64)
    for view in parts():
        bins = np.where(open_to(view), to_bins(scores(view)), -1)
        known = bins >= 0
        np.add.at(amounts, bins[known], weights(view)[known])
        np.add.at(counts, bins[known], 1)
    above = np.cumsum(amounts[::-1])
    full = np.flatnonzero(above > budget)
    if not len(full):  # everything fits
        return Cut(-1, None, int(counts.sum()), int(amounts.sum()))
    border = BINS - 1 - int(full[0])
    better = int(above[full[0]] - amounts[border])
    found: list[tuple[Rank, int]] = []
    for view in parts():
        values = scores(view)
        indices = np.flatnonzero((to_bins(values) == border) & open_to(view))
        if len(indices):
            found += zip(ranks(view, values, indices), weights(view)[indices].tolist(), strict=True)
    found.sort()
    last, documents, amount = None, int(counts[border + 1 :].sum()), better
    for rank, weight in found:
        if amount + weight > budget:
            return Cut(border, last, documents, amount, rank)
        last, documents, amount = rank, documents + 1, amount + weight
    raise AssertionError("the histogram and the records of its bin disagree")
