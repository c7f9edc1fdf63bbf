"""What a selection says of itself: selection.json, which training keeps as provenance, and the report's numbers."""

from __future__ import annotations

import heapq
import math
import re
from typing import Any

import numpy as np

from harness import __version__
from harness.config import dump_yaml
from harness.disk import sha256_of
from harness.text import CHOSEN

from .choice import Choice
from .documents import read_document
from .job import Job, digest_of
from .kept import KeptRecords
from .methods import ScoreSection
from .ranking import ranks
from .sizes import current_implementation
from .work import MEASURE, STAGES, View

MACHINERY = {"workers", "distributed"}
"""Settings that change nothing of the result."""
EXAMPLES = 10
SCORE_BINS = 60


def describe(job: Job, choice: Choice) -> dict[str, Any]:
    """selection.json: the same for the same pool, targets and settings, whenever and however it was made."""
    settings = job.settings
    written = [entry for shard in job.shards for entry in (job.work.facts("final", shard.number) or {})[CHOSEN]]
    pool = settings.pool
    return {
        "format": 1,
        "harness": __version__,
        "method": _method(settings.score),
        "targets": [
            target | {"sha256": digest_of(texts)} for target, texts in zip(_targets(job), job.targets, strict=True)
        ],
        "budget": settings.budget.model_dump(mode="json", exclude_none=True),
        "thresholds": _thresholds(job, choice),
        "pool": [{"file": job.pool.name(file), "bytes": file.size} for file in job.pool.files],
        "text": {"text_field": pool.text_field, "joined_by": pool.joined_by, "separator": pool.separator},
        "files": [
            {**entry, "sha256": sha256_of(job.folder / CHOSEN / entry["file"])}
            for entry in sorted(written, key=lambda entry: str(entry["file"]))
        ],
        "settings": settings.model_dump(mode="json", exclude=MACHINERY),
    }


def summarize(job: Job, choice: Choice) -> dict[str, Any]:
    """The report, as its page documents it."""
    tally = _Tally(job, choice)
    settings = job.settings
    unit = settings.budget.unit
    audits = choice.audits() if job.worker.races else []
    chosen = tally.chosen
    recalls = [(audit, *audit.recall(count)) for audit, count in zip(audits, tally.chosen_by_target, strict=False)]
    worst = min(recalls, key=lambda entry: entry[2], default=None)
    return {
        "title": f"Selection {job.folder.name}",
        "method": _method(settings.score),
        "targets": [
            target | {"share": section.share} for target, section in zip(_targets(job), settings.targets, strict=True)
        ],
        "budget": {
            "unit": "documents" if unit == "share" else unit,
            "wanted": settings.budget.threshold if unit == "threshold" else sum(b or 0 for b in choice.budgets),
            "chosen": chosen["tokens"] if unit == "tokens" else chosen["bytes" if unit == "bytes" else "documents"],
        },
        "pool": tally.pool | {"duplicates_near": choice.near_repeats, "leaks": choice.leaks},
        "chosen": chosen if unit == "tokens" else chosen | {"tokens": None},
        "thresholds": _thresholds(job, choice),
        "histogram": tally.histograms(),
        "by_source": tally.by_source(),
        "by_length": tally.by_length(),
        **tally.examples(),
        "pairs": tally.pairs,
        "recall": None
        if worst is None
        else {
            "estimate": worst[1],
            "lower_95": worst[2],
            "audited": worst[0].audited,
            "missed": worst[0].missed,
        },
        "time": {"implementation": current_implementation().name if settings.score.compressor == "gzip" else None},
        "config": dump_yaml(settings, comments=False),
    }


def _method(section: ScoreSection) -> dict[str, Any]:
    return section.model_dump(mode="json") | {"level": section.effective_level}


def _targets(job: Job) -> list[dict[str, Any]]:
    return [
        {"name": section.name, "documents": len(texts), "bytes": len(texts.buffer)}
        for section, texts in zip(job.settings.targets, job.targets, strict=True)
    ]


def _thresholds(job: Job, choice: Choice) -> dict[str, float | None]:
    return {
        section.name: ending.threshold if math.isfinite(ending.threshold) else None
        for section, ending in zip(job.settings.targets, choice.endings, strict=True)
    }


class _Tally:
    """One pass over everything known, counted."""

    def __init__(self, job: Job, choice: Choice) -> None:
        self._job = job
        self._choice = choice
        count = len(job.settings.targets)
        self.chosen = {"documents": 0, "bytes": 0, "tokens": 0}
        self.chosen_by_target = [0] * count
        self.pool: dict[str, Any] = {
            "files": len(job.pool.files), "documents": 0, "bytes": 0, "tokens": None, "empty": 0,
            "duplicates_exact": 0, "without_id": 0,
        }  # fmt: skip
        self.pairs = {"evaluated": 0, "all": 0}
        self._sources: dict[str, list[int]] = {}
        self._lengths = np.zeros((64, 2), dtype=np.int64)
        self._best: list[Any] = []
        self._last: list[Any] = []
        self._first_out: list[Any] = []
        self._reasons: dict[str, int] = {}
        self._rows = [0] * len(job.shards)
        for view in choice.parts():
            self._add(view)
        for shard in job.shards:
            for problem in (job.work.facts(MEASURE, shard.number) or {})["unreadable"]:
                self._count_reason(problem)
        self.pool["skipped"] = self._reasons
        if job.settings.pool.id_field is None:
            self.pool["without_id"] = None  # nobody asked

    def _add(self, view: View) -> None:
        measured, chosen = view.measured, self._choice.chosen(view)
        usable, size = measured["usable"], measured["bytes"]
        taken = chosen >= 0
        self._rows[view.shard] += len(view)
        self.pool["documents"] += int(usable.sum())
        self.pool["bytes"] += int(size[usable].sum())
        self.pool["empty"] += int((~usable & ~measured["unusable"]).sum())
        self.pool["duplicates_exact"] += int((usable & ~view.eligible).sum())
        self.pool["without_id"] += int((usable & ~measured["has_id"]).sum())
        for reason in measured["reasons"]:
            self._count_reason(str(reason))
        self.chosen["documents"] += int(taken.sum())
        self.chosen["bytes"] += int(size[taken].sum())
        self.chosen["tokens"] += int(view.inspection("tokens")[taken].sum())
        for target in range(len(self.chosen_by_target)):
            self.chosen_by_target[target] += int((chosen == target).sum())
        windows = measured["windows"]
        scored = ~np.isnan(view.scores).all(axis=1)
        for target, (probes, pairs) in enumerate(self._job.worker.pairs):
            features = view.predictors(STAGES[-1], target)
            looked_at = usable & ~np.isnan(features[:, 0]) if features.shape[1] else np.zeros(len(view), dtype=bool)
            self.pairs["all"] += int(windows[usable].sum()) * pairs
            self.pairs["evaluated"] += int(windows[looked_at].sum()) * probes
            self.pairs["evaluated"] += int(windows[usable & scored].sum()) * pairs
        for code, name in enumerate(measured["groups"]):
            mine = usable & (measured["group"] == code)
            entry = self._sources.setdefault(str(name), [0, 0, 0, 0])
            for place, mask in ((0, mine), (2, mine & taken)):
                entry[place] += int(mask.sum())
                entry[place + 1] += int(size[mask].sum())
        exponent = np.clip(np.ceil(np.log2(np.maximum(size, 1))), 0, 63).astype(np.int64)
        self._lengths[:, 0] += np.bincount(exponent[usable], minlength=64)
        self._lengths[:, 1] += np.bincount(exponent[taken], minlength=64)
        self._rank(view, chosen)

    def _rank(self, view: View, chosen: np.ndarray) -> None:
        """Keep the best and the last chosen, and the first that are not."""
        known = np.where(np.isnan(view.scores), -np.inf, view.scores)
        score = np.where(chosen >= 0, known[np.arange(len(view)), np.maximum(chosen, 0)], known.max(axis=1))
        taken = np.flatnonzero(chosen >= 0)
        others = np.flatnonzero((chosen < 0) & view.eligible & np.isfinite(score))
        for indices, kept, lowest in (
            (taken, "_best", False),
            (taken, "_last", True),
            (others, "_first_out", False),
        ):
            order = np.argsort(score[indices] if lowest else -score[indices], kind="stable")[: 2 * EXAMPLES]
            near = indices[order]
            rows = [
                (rank, view.shard, view.first_row + int(index), float(score[index]), int(view.measured["bytes"][index]))
                for rank, index in zip(ranks(view, score, near), near, strict=True)
            ]
            pick = heapq.nlargest if lowest else heapq.nsmallest
            setattr(self, kept, pick(EXAMPLES, [*getattr(self, kept), *rows]))

    def _count_reason(self, problem: str) -> None:
        reason = re.sub(r"^.*?: (line|row|part) \d+: ", "", problem)
        self._reasons[reason] = self._reasons.get(reason, 0) + 1

    def by_source(self) -> list[dict[str, Any]]:
        """Sources with documents, those with most chosen bytes first."""
        found = [(name, counts) for name, counts in self._sources.items() if counts[0]]
        ordered = sorted(found, key=lambda item: (-item[1][3], -item[1][1], item[0]))
        names = ("documents", "bytes", "chosen", "chosen_bytes")
        return [{"source": name, **dict(zip(names, counts, strict=True))} for name, counts in ordered]

    def by_length(self) -> list[dict[str, int]]:
        """Classes of lengths that double."""
        return [
            {
                "from_bytes": (1 << exponent - 1) + 1 if exponent else 0,
                "to_bytes": 1 << exponent,
                "documents": int(documents),
                "chosen": int(chosen),
            }
            for exponent, (documents, chosen) in enumerate(self._lengths)
            if documents
        ]

    def histograms(self) -> dict[str, Any]:
        """Of each set of targets; documents out of the race by their estimates."""
        found = {}
        for target, section in enumerate(self._job.settings.targets):
            low, high = math.inf, -math.inf
            for view in self._choice.parts():
                scores = self._choice.estimates(view, target)[view.eligible]
                low, high = min(low, scores.min(initial=np.inf)), max(high, scores.max(initial=-np.inf))
            if low > high:
                low, high = 0.0, 1.0
            edges = np.linspace(low, max(high, low + 1e-9), SCORE_BINS + 1)
            counts = np.zeros((2, SCORE_BINS), dtype=np.int64)
            for view in self._choice.parts():
                scores = self._choice.estimates(view, target)
                counts[0] += np.histogram(scores[view.eligible], edges)[0]
                counts[1] += np.histogram(scores[self._choice.chosen(view) == target], edges)[0]
            found[section.name] = {
                "edges": edges.tolist(), "documents": counts[0].tolist(), "chosen": counts[1].tolist()
            }  # fmt: skip
        return found

    def examples(self) -> dict[str, list[dict[str, Any]]]:
        """Rows with the beginnings of their texts."""
        kinds = {"best": self._best, "last_chosen": sorted(self._last), "first_rejected": self._first_out}
        wanted = {(shard, row) for rows in kinds.values() for _, shard, row, _, _ in rows}
        texts = self._texts(wanted)
        return {
            kind: [
                {"score": score, "bytes": size, **texts.get((shard, row), {})} for _, shard, row, score, size in rows
            ]
            for kind, rows in kinds.items()
        }

    def _texts(self, wanted: set[tuple[int, int]]) -> dict[tuple[int, int], dict[str, Any]]:
        pool = self._job.pool
        found = {}
        for shard in pool.shards:
            rows = [row for number, row in wanted if number == shard.number]
            mask = np.zeros(self._rows[shard.number], dtype=bool)
            mask[rows] = True
            for record in KeptRecords(pool, self._job.work, shard).read(mask) if rows else ():
                document = read_document(pool.unit_of(record), pool.section)
                found[(shard.number, record.row)] = {
                    "id": document.id,
                    "source": document.group,
                    "text": document.text[:300] if isinstance(document.text, str) else "",
                }
        return found
