"""What each arm chooses: an order of a draw's windows, and of that as many as the budget takes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import Any

import numpy as np

from harness.config import HarnessError, plain
from harness.disk import write_whole
from harness.parallel import derive_seed
from harness.selection import Targets, open_scorer

from ..files import locked
from .config import ArmSection, SelectionStudySection, TargetSection
from .dsir import gumbel_order, log_weights
from .items import target_texts
from .pool import Pool

NEAREST = 50
"""Among how many windows of nearest length a length-matched one is drawn: enough that it is rarely the same one."""


@dataclass(frozen=True)
class Choice:
    """The windows of one arm, best first."""

    windows: np.ndarray
    """int64: numbers in the pool."""
    tokens: int
    """Tokens of theirs, ends of text included."""


class Chooser:
    """Chooses in one draw of the pool for one target (None: for arms that need none)."""

    def __init__(self, config: SelectionStudySection, pool: Pool, target: TargetSection | None, draw: int) -> None:
        self.config, self.pool, self.target, self.number = config, pool, target, draw
        self.draw = pool.draw(config, draw)

    def choose(self, arm: ArmSection, seed: int) -> Choice:
        """What an arm takes within the budget. `seed` matters to stochastic arms only."""
        return self._fill(self.order(arm, seed))

    def order(self, arm: ArmSection, seed: int) -> np.ndarray:
        """Places in the draw, those to take first first."""
        parts = (self.config.seed, "arm", arm.name, self.number, self.target.name if self.target else "", seed)
        generator = np.random.default_rng(derive_seed(*parts))
        if arm.kind == "random":
            return generator.permutation(len(self.draw))
        if arm.kind == "file-type":
            return generator.permutation(np.flatnonzero(self._sources == self._target.in_domain))
        if arm.kind == "length-matched":
            assert arm.matches is not None
            return self._match_lengths(self.choose(self.config.arm(arm.matches), seed), generator)
        scores = self.scores(arm)
        if arm.kind == "dsir" and arm.sampled:
            return gumbel_order(scores, generator)
        return np.argsort(-scores, kind="stable")

    def scores(self, arm: ArmSection) -> np.ndarray:
        """float64 [windows of the draw], higher is better; computed once for all processes."""
        name = arm.name if arm.kind == "score" else "dsir"  # sampled or not, the weights are the same
        file = self.config.path / "scores" / self._target.name / f"draw-{self.number}" / f"{name}.npz"
        described = json.dumps(plain(arm.score) if arm.kind == "score" else {"dsir": True}, sort_keys=True)
        with locked(file.with_suffix(".lock")):
            if not file.exists():
                buffer = BytesIO()
                np.savez(buffer, scores=self._compute(arm), windows=self.draw, score=np.array(described))
                write_whole(file, buffer.getvalue())
        with np.load(file) as found:
            if not np.array_equal(found["windows"], self.draw) or str(found["score"]) != described:
                raise HarnessError(f"{file}: are the scores of something else; delete it")
            scores: np.ndarray = found["scores"]
        return scores

    def describe(self, choice: Choice) -> dict[str, Any]:
        """Of what a choice consists: windows (with a digest of which they are), bytes, tokens, and the share of
        in-domain windows (None where the target has no domain in the pool)."""
        windows = [self.pool.windows[number] for number in choice.windows]
        domain = self.target.in_domain if self.target is not None else None
        sources = [window.source for window in windows]
        return {
            "windows": len(windows),
            "digest": hashlib.sha256(np.sort(choice.windows).astype("<i8").tobytes()).hexdigest(),
            "bytes": sum(window.size for window in windows),
            "tokens": choice.tokens,
            "sources": {source.name: sources.count(source.name) for source in self.config.pool.sources},
            "in_domain": None if domain is None else sources.count(domain) / len(sources),
        }

    def check_budget(self) -> None:
        """HarnessError where the budget is more than the allowed share of the draw's in-domain tokens."""
        if self.target is None or self.target.in_domain is None:
            return
        there = int(self.pool.tokens[self.draw[self._sources == self.target.in_domain]].sum())
        if self.config.budget_tokens > self.config.largest_share * there:
            raise HarnessError(
                f"budget_tokens: {self.config.budget_tokens} is more than {self.config.largest_share} of the {there} "
                f"tokens of {self.target.in_domain} in draw {self.number}; lower it, or raise windows_a_draw"
            )

    @property
    def _target(self) -> TargetSection:
        assert self.target is not None, "this arm needs a target"
        return self.target

    @cached_property
    def _sources(self) -> np.ndarray:
        return np.array([self.pool.windows[number].source for number in self.draw])

    def _compute(self, arm: ArmSection) -> np.ndarray:
        texts = [self.pool.windows[number].text for number in self.draw]
        targets = target_texts(self.config, self._target)
        if arm.kind == "dsir":
            return log_weights(texts, targets)
        assert arm.score is not None
        return open_scorer(arm.score, Targets(targets)).scores([text.encode() for text in texts])

    def _fill(self, order: np.ndarray) -> Choice:
        """The first windows of an order that fit the budget: all arms end within a window of it."""
        windows = self.draw[order]
        total = np.cumsum(self.pool.tokens[windows])
        count = int(np.searchsorted(total, self.config.budget_tokens, side="right"))
        if count == len(windows):
            raise HarnessError(f"budget_tokens: {self.config.budget_tokens} is more than an arm can choose from")
        return Choice(windows[:count], int(total[count - 1]))

    def _match_lengths(self, matched: Choice, generator: np.random.Generator) -> np.ndarray:
        """Random places whose windows have the lengths of `matched`, and more of such lengths until the budget ends."""
        sizes = np.array([self.pool.windows[number].size for number in self.draw])
        wanted = np.array([self.pool.windows[number].size for number in matched.windows])
        free = np.ones(len(sizes), dtype=bool)
        order = []
        # A tenth more than were matched: tokens, not windows, are what the budget counts.
        for size in np.concatenate([generator.permutation(wanted), generator.choice(wanted, len(wanted) // 10 + 5)]):
            places = np.flatnonzero(free)
            nearest = places[np.argsort(np.abs(sizes[places] - size), kind="stable")[:NEAREST]]
            taken = int(generator.choice(nearest))
            free[taken] = False
            order.append(taken)
        return np.array(order)
