"""From scores, already known, to the chosen: every unit of a budget, several targets and their shares."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.config import ConfigError, HarnessError, validate
from harness.selection import SelectSettings
from harness.selection.choice import Choice
from harness.selection.config import BudgetSection
from harness.selection.work import MEASURE, WorkFolder

Key = tuple[int, int]
"""Shard and row."""
NAMES = ("a", "b", "c")


class Known:
    """A pool of which everything was measured: two shards, few different scores."""

    def __init__(self, folder: Path, targets: int) -> None:
        self.rng = np.random.default_rng()
        self.work = WorkFolder(folder, {}, {})
        self.rows: dict[Key, dict[str, Any]] = {}
        for shard in range(2):
            count = int(self.rng.integers(40, 120))
            columns = {
                "usable": self.rng.random(count) < 0.9,
                "bytes": self.rng.integers(1, 100, count),
                "digest": self.rng.integers(0, 2**60, (count, 2)).astype(np.uint64),
                "id_digest": self.rng.integers(0, 2**60, count).astype(np.uint64),
                "scores": self.rng.integers(-3, 30, (count, targets)) / 40,
            }
            self.work.save(MEASURE, shard, 0, columns)
            self.work.finish_shard(MEASURE, shard, {"unreadable": []})
            for row in np.flatnonzero(columns["usable"]):
                digest = tuple(int(number) for number in columns["digest"][row])
                self.rows[shard, int(row)] = {
                    "scores": columns["scores"][row].tolist(),
                    "bytes": int(columns["bytes"][row]),
                    "tie": (*digest, int(columns["id_digest"][row])),
                }

    def choose(self, budget: dict[str, Any], shares: list[float]) -> tuple[Choice, dict[Key, int]]:
        targets = [{"name": NAMES[i], "source": ["x"], "share": share} for i, share in enumerate(shares)]
        values = {
            "pool": {"source": ["x"]},
            "targets": targets,
            "budget": budget,
            "duplicates": {"remove": "exact"},
            "leaks": {"remove": False},
            "output": {"folder": "out"},
        }
        choice = Choice(validate(SelectSettings, values, "test"), self.work, 2, {}, False)
        assert len(choice.to_race()[1]) == 0
        assert len(choice.to_inspect()) == 0
        chosen: dict[Key, int] = {}
        for view in choice.parts():
            found = choice.chosen(view)
            chosen |= {(view.shard, int(row)): int(found[row]) for row in np.flatnonzero(found >= 0)}
        return choice, chosen

    def expect(self, budgets: list[int], unit: str) -> dict[Key, int]:
        """One set of targets after the other, each from what those before have left."""
        chosen: dict[Key, int] = {}
        for target, budget in enumerate(budgets):
            left = budget
            for key, row in self.ranking(target):
                if key not in chosen:
                    left -= row["bytes"] if unit == "bytes" else 1
                    if left < 0:
                        break
                    chosen[key] = target
        return chosen

    def ranking(self, target: int) -> list[tuple[Key, dict[str, Any]]]:
        return sorted(self.rows.items(), key=lambda item: (-item[1]["scores"][target], item[1]["tie"]))


@pytest.fixture
def known(tmp_path: Path) -> Known:
    return Known(tmp_path / "work", 3)


def test_documents_and_bytes_by_shares(known: Known) -> None:
    for _ in range(8):
        shares = [random.choice([0.5, 1, 2, 7]) for _ in range(random.randint(1, 3))]
        for unit, most in (("documents", len(known.rows)), ("bytes", sum(row["bytes"] for row in known.rows.values()))):
            total = random.randint(1, most)
            choice, chosen = known.choose({unit: total}, shares)
            parts = [total * share / sum(shares) for share in shares]
            assert sum(budget or 0 for budget in choice.budgets) == total
            assert all(abs((budget or 0) - part) <= 1 for budget, part in zip(choice.budgets, parts, strict=True))
            assert chosen == known.expect([budget or 0 for budget in choice.budgets], unit)
            for target, ending in enumerate(choice.endings):
                scores = [known.rows[key]["scores"][target] for key, its in chosen.items() if its == target]
                assert ending.threshold == min(scores, default=np.inf)


def test_a_share_is_rounded_down_and_at_least_one_document(known: Known) -> None:
    for share in (1e-6, 0.1, 0.5, 1.0):
        count = max(1, int(share * len(known.rows)))
        assert known.choose({"share": share}, [1])[1] == known.expect([count], "documents")


def test_a_threshold_takes_all_that_reach_it_for_the_first_of_their_targets(known: Known) -> None:
    for threshold in (-1.0, 0.4, 10 / 40, 0.7249, 2.0):
        _, chosen = known.choose({"threshold": threshold}, [1, 1, 1])
        reached = {key: [score >= threshold for score in row["scores"]] for key, row in known.rows.items()}
        assert chosen == {key: each.index(True) for key, each in reached.items() if any(each)}


@pytest.mark.parametrize("unit", ["documents", "bytes"])
def test_more_than_there_is(known: Known, unit: str) -> None:
    have = len(known.rows) if unit == "documents" else sum(row["bytes"] for row in known.rows.values())
    for shares in ([1.0], [1.0, 3.0]):
        exact, chosen = known.choose({unit: have}, shares)
        exact.check_pool()
        exact.check_filled()
        short, taken = known.choose({unit: have + 1}, shares)
        said = f"budget.{unit}: {have + 1:,} is more than the pool's {have:,} "
        with pytest.raises(HarnessError, match=said):
            short.check_pool()
        took, everything = known.choose({unit: 2 * have, "when_short": "take"}, shares)
        took.check_pool()
        took.check_filled()
        assert set(everything) == set(known.rows)
        if len(shares) == 1 or unit == "documents":  # else what is left of each share may be too small for the next
            assert set(chosen) == set(taken) == set(known.rows)
            with pytest.raises(HarnessError, match=said):
                short.check_filled()


def test_one_budget() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "say exactly one of documents, tokens, bytes, share, threshold; found none"),
        ({"documents": 1, "share": 0.5}, "found documents and share"),
        ({"tokens": 5}, "set both `tokens` and `tokenizer`, or neither"),
        ({"bytes": 5, "tokenizer": "x"}, "set both `tokens` and `tokenizer`, or neither"),
        ({"documents": 0}, "greater than or equal to 1"),
        ({"share": 1.5}, "less than or equal to 1"),
    ]
    for values, said in cases:
        with pytest.raises(ConfigError, match=said):
            validate(BudgetSection, values, "test")
