"""From what is known of the documents to which are chosen, and to what has to be known yet."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from harness.config import HarnessError

from .config import SelectSettings
from .racing import Audit, Race, Rows, first_round
from .ranking import Cut, cut_at, ranks
from .signatures import find_repeats
from .work import Arrays, View, WorkFolder, views

FEW = 300
"""Documents that are scored at once rather than estimated first."""
SLACK = 0.05
"""Part of the chosen that is inspected beyond the cut, for those that inspection leaves out."""


@dataclass(frozen=True)
class Ending:
    """Where the choice for one set of targets ends."""

    cut: Cut
    wanted: int | None
    """What the budget asks for, in its unit; None for a threshold."""
    threshold: float
    """The lowest chosen score; infinity where nothing is chosen."""


class Choice:
    """The choice by the state of a working folder. Made anew after each round."""

    def __init__(self, settings: SelectSettings, work: WorkFolder, shards: int, repeated: Arrays, races: bool) -> None:
        self._settings = settings
        self._work = work
        self._shards = shards
        self._repeated = repeated
        self._races = races
        self._count = len(settings.targets)
        self._dropped: dict[tuple[int, int], np.ndarray] = {}
        self.near_repeats = 0
        self.leaks = 0
        if any(task == "inspect" for _, task in work.rounds(shards)):
            self._drop_inspected()

    def parts(self) -> Iterable[View]:
        """Everything known, part by part."""
        return views(self._work, self._shards, self._repeated)

    # What a document counts as.

    @cached_property
    def _tokens_a_byte(self) -> float:
        """Of the inspected documents; 1/3 before there are any."""
        tokens = size = 0
        for view in self.parts():
            tokens += int(view.inspection("tokens")[view.inspected].sum())
            size += int(view.measured["bytes"][view.inspected].sum())
        return tokens / size if size else 1 / 3

    def weights(self, view: View) -> np.ndarray:
        """int64 [records]: what each counts in the budget; tokens of documents not inspected are estimated."""
        unit = self._settings.budget.unit
        if unit == "bytes":
            return view.measured["bytes"]
        if unit != "tokens":
            return np.ones(len(view), dtype=np.int64)
        estimate = (view.measured["bytes"] * self._tokens_a_byte).astype(np.int64) + 1
        return np.where(view.inspected, view.inspection("tokens").astype(np.int64), estimate)

    @cached_property
    def budgets(self) -> list[int | None]:
        """Of each set of targets, by its share; None for a threshold."""
        budget = self._settings.budget
        if budget.unit == "threshold":
            return [None] * self._count
        if budget.unit == "share":
            assert budget.share is not None
            total = max(1, int(budget.share * sum(int(view.eligible.sum()) for view in self.parts())))
        else:
            total = getattr(budget, budget.unit)
        shares = [target.share for target in self._settings.targets]
        ends = [round(total * sum(shares[: index + 1]) / sum(shares)) for index in range(self._count)]
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]

    # Who is chosen.

    def open_to(self, view: View, earlier: list[Ending]) -> np.ndarray:
        """bool [records]: may still be chosen after the sets of targets before."""
        free = view.eligible.copy()
        dropped = self._dropped.get((view.shard, view.part))
        if dropped is not None:
            free &= ~dropped
        for target, ending in enumerate(earlier):
            free &= ~self._takes(ending, view, target)
        return free

    def _takes(self, ending: Ending, view: View, target: int) -> np.ndarray:
        scores = view.scores[:, target]
        if ending.wanted is None:
            reached: np.ndarray = scores >= ending.threshold  # False for NaN
            return reached
        return ending.cut.takes(view, scores)

    @cached_property
    def endings(self) -> list[Ending]:
        """Where the choice ends, by all that is known."""
        endings: list[Ending] = []
        for target, budget in enumerate(self.budgets):
            before = list(endings)

            def scores(view: View, target: int = target) -> np.ndarray:
                return view.scores[:, target]

            def free(view: View, before: list[Ending] = before) -> np.ndarray:
                return self.open_to(view, before)

            if budget is None:
                limit = self._settings.budget.threshold
                assert limit is not None
                endings.append(Ending(Cut(-1, None, 0, 0), None, limit))
                continue
            cut = cut_at(self.parts, scores, free, self.weights, budget)
            lowest = np.inf
            for view in self.parts():
                taken = free(view) & cut.takes(view, scores(view))
                lowest = min(lowest, float(scores(view)[taken].min(initial=np.inf)))
            endings.append(Ending(cut, budget, lowest))
        return endings

    def chosen(self, view: View) -> np.ndarray:
        """int64 [records]: the set of targets that a record is chosen for, -1 where it is not."""
        found = np.full(len(view), -1, dtype=np.int64)
        for target, ending in enumerate(self.endings):
            free = self.open_to(view, self.endings[:target])
            found[free & self._takes(ending, view, target)] = target
        return found

    def _drop(self, dropped: dict[tuple[int, int], np.ndarray]) -> None:
        self._dropped = dropped
        for name in ("endings", "_standings"):  # which follow from it
            self.__dict__.pop(name, None)

    # What has to be known yet.

    def to_race(self) -> tuple[str, Rows]:
        """What to do next, estimate or score, of documents that may belong to the choice and have no exact score; none
        once the race is over."""
        if not self._races:
            return "score", Rows()
        section = self._settings.racing
        if not any(task == "score" for _, task in self._work.rounds(self._shards)):
            return "score", first_round(self.parts, self._count, self.budgets, self.weights, section)
        to_score, to_estimate = Rows(), Rows()
        for race, ending in zip(self._standings, self.endings, strict=True):
            most = None if ending.wanted is None else math.ceil(ending.wanted * section.headroom)
            to_score.join(race.to_score(self._limit(ending), self.weights, most))
            to_estimate.join(race.to_estimate(self._limit(ending), self.weights, most))
        if len(to_estimate) <= FEW:  # another pass would cost more than their scores
            to_score.join(to_estimate)
        return ("score", to_score) if len(to_score) else ("estimate", to_estimate)

    @staticmethod
    def _limit(ending: Ending) -> float:
        """The score that a document must reach to be chosen; none where the scored ones do not fill the budget."""
        return -np.inf if ending.wanted is not None and ending.cut.bin < 0 else ending.threshold

    def _focus(self, target: int, ending: Ending) -> float:
        """Where estimates have to be good."""
        if np.isfinite(self._limit(ending)):
            return ending.threshold
        known = [view.scores[~np.isnan(view.scores[:, target]), target] for view in self.parts()]
        return float(np.quantile(np.concatenate(known), 0.9))

    def estimates(self, view: View, target: int) -> np.ndarray:
        """float64 [records]: exact scores, and estimates for documents that have none."""
        scores = view.scores[:, target]
        return np.where(np.isnan(scores), self._standings[target].estimates(view), scores) if self._races else scores

    @cached_property
    def _standings(self) -> list[Race]:
        """Of each set of targets, by all that is known."""
        section = self._settings.racing
        return [
            Race(self.parts, target, self._focus(target, ending), section) for target, ending in enumerate(self.endings)
        ]

    def audits(self) -> list[Audit]:
        """Of each set of targets, once the race is over: the random sample among those left out."""
        races = zip(self._standings, self.endings, strict=True)
        return [race.audit(self._limit(ending)) for race, ending in races]

    def needs_inspection(self) -> bool:
        """Whether the chosen have to be looked at more closely at all."""
        settings = self._settings
        return settings.duplicates.remove == "near" or settings.leaks.remove or settings.budget.unit == "tokens"

    def to_inspect(self) -> Rows:
        """Documents of the choice that were not inspected, with some beyond it; none once all of it was."""
        rows = Rows()
        if not self.needs_inspection():
            return rows
        if not any((self._decides(view) & ~view.inspected).any() for view in self.parts()):
            return rows
        wider = [
            None
            if ending.wanted is None
            else cut_at(
                self.parts,
                lambda view, t=target: view.scores[:, t],  # type: ignore[misc]
                lambda view, t=target: self.open_to(view, self.endings[:t]),  # type: ignore[misc]
                self.weights,
                int(ending.wanted * (1 + SLACK)) + int(self._typical_weight() * 64),
            )
            for target, ending in enumerate(self.endings)
        ]
        for view in self.parts():
            mask = self._decides(view)
            for target, cut in enumerate(wider):
                if cut is not None:
                    mask |= self.open_to(view, self.endings[:target]) & cut.takes(view, view.scores[:, target])
            rows.add(view, mask & ~view.inspected)
        return rows

    def _decides(self, view: View) -> np.ndarray:
        """bool [records]: what has to be inspected: the chosen, and the first that did not fit, if it might after all
        (its tokens are an estimate) or might be left out, so that the next one fits."""
        mask = self.chosen(view) >= 0
        if self._settings.budget.unit in ("tokens", "bytes"):
            for ending in self.endings:
                if ending.cut.next is not None and ending.cut.next[-2] == view.shard:
                    row = ending.cut.next[-1] - view.first_row
                    mask[row : row + 1] |= 0 <= row < len(view)
        return mask

    def _typical_weight(self) -> float:
        count = amount = 0
        for view in self.parts():
            count += int(view.eligible.sum())
            amount += int(self.weights(view)[view.eligible].sum())
        return amount / max(count, 1)

    def _drop_inspected(self) -> None:
        """Leave out what inspection has found: leaks first, then near-duplicates of better documents."""
        dropped = {}
        self.leaks = self.near_repeats = 0
        for view in self.parts():
            mask = np.zeros(len(view), dtype=bool)
            if self._settings.leaks.remove:
                mask = view.inspected & view.eligible & (view.inspection("leak") >= self._settings.leaks.share)
                self.leaks += int(mask.sum())
            dropped[(view.shard, view.part)] = mask
        self._drop(dropped)
        if self._settings.duplicates.remove == "near":
            kept: list[np.ndarray] = []
            for target in range(self._count):
                kept += self._drop_near(target, kept)

    def _drop_near(self, target: int, kept: list[np.ndarray]) -> list[np.ndarray]:
        """Drop near-duplicates among those chosen for one set of targets; returns the signatures of the others.

        `kept` are the signatures of what is chosen for the sets before, which go first.
        """
        earlier = self.endings[:target]
        candidates = []
        for view in self.parts():
            scores = view.scores[:, target]
            rows = np.flatnonzero(view.inspected & self.open_to(view, earlier) & ~np.isnan(scores))
            if len(rows):
                places = [((view.shard, view.part), int(row)) for row in rows]
                candidates += list(
                    zip(ranks(view, scores, rows), places, view.inspection("signature")[rows], strict=True)
                )
        candidates.sort(key=lambda candidate: candidate[0])
        signatures = [*kept, *(signature for _, _, signature in candidates)]
        repeats = find_repeats(signatures, self._settings.duplicates)[len(kept) :]
        before = {key: mask.copy() for key, mask in self._dropped.items()}
        dropped = {key: mask.copy() for key, mask in self._dropped.items()}
        for (_, (key, row), _), repeat in zip(candidates, repeats, strict=True):
            dropped[key][row] |= bool(repeat)
        self._drop(dropped)
        ending = self.endings[target]
        for view in self.parts():  # what ranks behind the cut was dropped for nothing: the next targets may want it
            key = (view.shard, view.part)
            dropped[key] = before[key] | (dropped[key] & self._takes(ending, view, target))
            self.near_repeats += int((dropped[key] & ~before[key]).sum())
        self._drop(dropped)
        chosen = {
            (view.shard, view.part, int(row))
            for view in self.parts()
            for row in np.flatnonzero(self.chosen(view) == target)
        }
        return [signature for _, (key, row), signature in candidates if (*key, row) in chosen]

    # Whether there is enough.

    def check_pool(self) -> None:
        """HarnessError where the pool has no document at all, or, as far as can be told before any is inspected, less
        than the budget, and budget.when_short is stop."""
        budget = self._settings.budget
        if not any(view.eligible.any() for view in self.parts()):
            raise HarnessError(f"{self._settings.pool.label}: has no document with text: all are empty or unreadable")
        if budget.unit in ("documents", "bytes"):
            self._check(sum(int(self.weights(view)[self.open_to(view, [])].sum()) for view in self.parts()))

    def check_filled(self) -> None:
        """HarnessError where the choice, made, is all that there is and less than the budget, likewise."""
        if any(ending.wanted is not None and ending.cut.next is None for ending in self.endings):
            self._check(sum(ending.cut.amount for ending in self.endings))

    def _check(self, have: int) -> None:
        budget = self._settings.budget
        if budget.when_short == "take" or budget.unit in ("threshold", "share"):
            return
        wanted = getattr(budget, budget.unit)
        if have < wanted:
            raise HarnessError(
                f"budget.{budget.unit}: {wanted:,} is more than the pool's {have:,} (without empty, unreadable, "
                "repeated and leaking documents); lower it, or set budget.when_short=take"
            )
