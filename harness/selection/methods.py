"""The `score` section of a selection, and the scorer that it describes: whole batches, windows, cheap predictors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from harness.config import HarnessError, Section

from .codecs import DEFAULT_LEVELS, Codec, Compressor, check_compressor_level
from .scores import exact_mean, gains, pair_scores, pair_terms
from .sketch import Sketch
from .targets import Targets
from .windows import cut_windows

PROBES, TARGETS_A_PROBE = 4, 8
"""How many targets features are taken with: one in so many, and so many at most."""


class ScoreSection(Section):
    """How a document is scored against the targets."""

    method: Literal["ncd", "coverage", "gain"] = "coverage"
    """coverage (shared bytes over the smaller compressed size), ncd (ZIP-FIT's alignment: over the larger one) or gain
    (by how much a sample of the targets before a document makes it smaller). docs/selection_study.md is why."""

    compressor: Compressor = "gzip"
    """gzip (the paper's), lz4 (needs the package lz4) or zstd."""

    level: int | None = None
    """The compressor's level; null takes its own default: gzip 9, lz4 0, zstd 3. gzip has 1 to 9, lz4 0 to 12, zstd 1
    to 22. The level changes the order, not only the speed: the paper's ablation favours gzip 1 and lz4 over gzip 9."""

    window_bytes: int | None = Field(8192, ge=64)
    """Longer documents are cut into equal windows of at most this many bytes, each of which is scored; null cuts none.
    gzip sees 32 KiB back, so of a document beyond that only the end would be compared with the targets."""

    windows: Literal["mean", "max"] = "mean"
    """A document's score: the mean over its windows, or its best window's."""

    context_bytes: int = Field(30_000, ge=1)
    """For gain: bytes from the beginning of the targets, one behind the other, that go before each document."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            check_compressor_level(self.compressor, self.effective_level)
        except HarnessError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def effective_level(self) -> int:
        """The level that is used."""
        return DEFAULT_LEVELS[self.compressor] if self.level is None else self.level


class Scorer:
    """Scores of whole batches of texts against fixed targets. Pickles as its section and targets.

    `probes` and `pairs` are what `features` and `scores` cost for each window, in compressions of a text with a
    target.
    """

    def __init__(self, section: ScoreSection, targets: Targets) -> None:
        self.section = section
        self.targets = targets
        self.codec = Codec(section.compressor, section.effective_level)

    def __getstate__(self) -> dict[str, Any]:
        return {"section": self.section, "targets": self.targets}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def pairs(self) -> int:
        """Pairs that a window's exact score takes."""
        return len(self.targets) if self.can_race else 1

    @property
    def probes(self) -> int:
        """Pairs that a window's features take."""
        return len(self._probe_targets)

    @property
    def can_race(self) -> bool:
        """Whether features cost less than scores: not for gain, which compresses a text once."""
        return self.section.method != "gain"

    @property
    def can_sketch(self) -> bool:
        """Whether the sketch may discard texts unseen by any compressor: for ncd over gzip and lz4.

        There the best hundredth of 24,000 real documents all lay in the best 0.06 by a regression on the sketch; for
        zstd, and for coverage of documents of several windows, a quarter to a half had to be kept for the last few.
        """
        return self.section.method == "ncd" and self.section.compressor != "zstd"

    def count_windows(self, texts: Sequence[bytes]) -> np.ndarray:
        """Into how many windows every text is cut: int64 [texts]."""
        return self._cut(texts)[1]

    def scores(self, texts: Sequence[bytes]) -> np.ndarray:
        """The exact score of every text: float64 [texts], higher is more alike.

        Sums over targets and over windows are correctly rounded: the same on every machine, in every order.
        """
        windows, counts = self._cut(texts)
        if self.section.method == "gain":
            each = gains(self.codec, windows, self.targets.buffer[: self.section.context_bytes])
        else:
            each = pair_scores(self.section.method, self.codec, windows, self.targets, self._target_sizes)
        if len(windows) == len(texts):
            return each
        combine = max if self.section.windows == "max" else exact_mean
        parts = np.split(each, np.cumsum(counts)[:-1])
        return np.array([combine(part) for part in parts], dtype=np.float64)

    def sketch(self, texts: Sequence[bytes]) -> np.ndarray:
        """The cheapest predictors of the exact score, for a linear regression: float32 [texts, 4], see sketch.py.

        No compression, so nothing in `probes`. Over a text's windows as `features` are. HarnessError for gain.
        """
        windows, counts = self._cut_to_race(texts)
        return self._combine(self._sketch(windows), counts)

    def features(self, texts: Sequence[bytes]) -> np.ndarray:
        """Cheap predictors of the exact score, for a linear regression: float32 [texts, features].

        The score over each of a few targets, spread over the range of C(y), and two columns of the sketch with C(x)
        known: each one's mean or largest over a text's windows, as `windows` says of the score. HarnessError for gain.
        """
        windows, counts = self._cut_to_race(texts)
        alone, together = self.codec.pair_sizes(windows, self._probe_targets)
        terms = pair_terms(self.section.method, alone[:, None], self._probe_sizes, together)
        if self.section.method == "ncd":
            terms = 1 - terms  # so that a better window has the larger one
        return self._combine(np.concatenate([terms, self._sketch.columns(windows, alone)], axis=1), counts)

    def _cut_to_race(self, texts: Sequence[bytes]) -> tuple[list[bytes], np.ndarray]:
        if not self.can_race:
            raise HarnessError("gain takes one compression a text: there is nothing cheaper to predict it by")
        return self._cut(texts)

    def _combine(self, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Over each text's windows: float32 [texts, columns] of float64 [windows, columns]."""
        if len(rows) != len(counts):
            starts = np.cumsum(counts) - counts
            if self.section.windows == "max":
                rows = np.maximum.reduceat(rows, starts, axis=0)
            else:
                rows = np.add.reduceat(rows, starts, axis=0) / counts[:, None]
        return rows.astype(np.float32)

    def _cut(self, texts: Sequence[bytes]) -> tuple[list[bytes], np.ndarray]:
        """All windows of all texts, and how many each text has."""
        cut = [cut_windows(text, self.section.window_bytes) for text in texts]
        return [window for windows in cut for window in windows], np.array([len(windows) for windows in cut], np.int64)

    @functools.cached_property
    def _target_sizes(self) -> np.ndarray:
        return self.codec.sizes(list(self.targets))

    @functools.cached_property
    def _sketch(self) -> Sketch:
        return Sketch(self.section.method, self.codec, self.targets, self._target_sizes)

    @functools.cached_property
    def _probe_indices(self) -> np.ndarray:
        """Targets at the middles of equal parts of all, in the order of C(y)."""
        order = np.argsort(self._target_sizes, kind="stable")
        count = max(1, min(PROBES, len(order) // TARGETS_A_PROBE))
        return order[[(2 * i + 1) * len(order) // (2 * count) for i in range(count)]]

    @functools.cached_property
    def _probe_targets(self) -> Targets:
        return self.targets.take(self._probe_indices)

    @functools.cached_property
    def _probe_sizes(self) -> np.ndarray:
        return self._target_sizes[self._probe_indices]


def open_scorer(section: ScoreSection, targets: Targets) -> Scorer:
    """A scorer of this process. HarnessError where the compressor's package is not installed."""
    return Scorer(section, targets)
