"""What is kept, against the definition counted out step by step, and what is deleted when."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.checkpoint import CheckpointStore, Pruner, Retention, retention
from harness.parallel import Fragment


def kept_by_definition(rule: Retention, scores: dict[int, float | None], step: int) -> bool:
    """Counted for one step alone: how many are newer, and how many are better."""
    newer = sum(other > step for other in scores)
    if newer == 0 or rule.keep_last is None or newer < rule.keep_last:
        return True
    if rule.keep_every_steps and step % rule.keep_every_steps == 0:
        return True
    mine = scores[step]
    if mine is None or mine != mine or rule.keep_best is None:
        return False
    better = sum(
        score < mine or (score == mine and other > step) for other, score in scores.items() if score is not None
    )
    return better < rule.keep_best


def test_random_rules_on_random_runs() -> None:
    rng = random.Random()
    sizes = set()
    for _ in range(600):
        rule = Retention(*(rng.choice([None, least, 2, 3, most]) for least, most in ((0, 5), (1, 40), (1, 4))))
        steps = rng.sample(range(0, 200, rng.choice([1, 5, 10])), rng.randint(0, 15))
        values = [None, float("nan"), float("inf"), *(rng.choice([1.5, 2.5, rng.random()]) for _ in range(6))]
        scores = {step: rng.choice(values) for step in steps}
        expected = sorted(step for step in scores if not kept_by_definition(rule, scores, step))
        assert rule.doomed(scores) == expected, (rule, scores)
        sizes.add(len(expected))
        reasons = rule.reasons(scores)
        assert list(reasons) == sorted(steps)
        assert all((step in expected) != bool(reasons[step]) for step in steps)
    assert len(sizes) > 8


def test_by_hand() -> None:
    scores = {100: 3.0, 200: None, 300: 2.0, 400: 2.0, 500: 2.5, 600: None}
    assert Retention(2).doomed(scores) == [100, 200, 300, 400]
    assert Retention(1, keep_best=1).doomed(scores) == [100, 200, 300, 500]  # of equal losses the newer
    assert Retention(1, keep_best=2).doomed(scores) == [100, 200, 500]
    assert Retention(1, keep_every_steps=300).doomed(scores) == [100, 200, 400, 500]
    assert Retention(None).doomed(scores) == []
    assert Retention(2, 200, 1).reasons(scores) == {
        100: [],
        200: ["a multiple of 200"],
        300: [],
        400: ["a multiple of 200", "validation loss 2.0000, of the best 1"],
        500: ["of the newest 2"],
        600: ["of the newest 2", "a multiple of 200"],
    }
    assert Retention(3).doomed({}) == []


def save(store: CheckpointStore, step: int, **state: Any) -> None:
    store.save(step, [Fragment.whole("w", "master", torch.full((3,), float(step)))], state)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def test_pruned_after_every_commit(store: CheckpointStore) -> None:
    pruner = Pruner(store, Retention(2, keep_every_steps=400, keep_best=1))
    losses = {100: 3.0, 200: 1.0, 300: 2.0, 400: 5.0, 500: 1.0, 600: 4.0, 700: 4.0}
    deleted = []
    for step, loss in losses.items():
        save(store, step, validation_loss=loss)
        deleted.append(pruner.prune())
    assert deleted == [[], [], [100], [], [200, 300], [], []]
    assert store.steps() == [400, 500, 600, 700]
    assert all(not store.verify(step) for step in store.steps())


def test_each_manifest_is_read_once_and_again_when_its_step_is(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    original = retention.read_manifest

    def counting(folder: Path, step: int) -> Any:
        read.append(step)
        return original(folder, step)

    monkeypatch.setattr(retention, "read_manifest", counting)
    pruner = Pruner(store, Retention(1, keep_best=1))
    save(store, 100, validation_loss=1.0)
    save(store, 200, validation_loss=3.0)
    save(store, 300, validation_loss=2.0)
    assert pruner.prune() == [200]
    assert pruner.prune() == []
    assert read == [100, 200, 300]
    save(store, 100, validation_loss=9.0)  # after a rollback, say
    assert pruner.scores() == {100: 9.0, 300: 2.0}
    assert pruner.prune() == [100]
    assert read == [100, 200, 300, 100]


@pytest.mark.parametrize("early", [False, True])
def test_damaged_steps_are_neither_counted_nor_deleted(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture, early: bool
) -> None:
    for step in (100, 200, 300, 400):
        save(store, step, validation_loss=step / 100)
    pruner = Pruner(store, Retention(2))
    if early:
        pruner.scores()  # they were whole when they were first seen
    (store.folder / "step-00000400" / "tensors-00000.safetensors").unlink()
    (store.folder / "step-00000100" / "manifest.sha256").write_text("0" * 64 + "  manifest.json\n")
    assert pruner.prune() == []  # 200 and 300 are the newest two that are whole
    save(store, 500)
    assert pruner.prune() == [200]
    assert store.steps() == [100, 300, 400, 500]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2, "each is named once"
    for line, name in zip(
        lines, ("step-00000100/manifest.json", "step-00000400/tensors-00000.safetensors"), strict=True
    ):
        assert "is neither counted nor deleted: " in line
        assert str(store.folder / name) in line
    assert sorted(pruner.damaged) == [100, 400]


def test_the_last_good_one_is_not_deleted_for_a_damaged_newer_one(store: CheckpointStore) -> None:
    pruner = Pruner(store, Retention(1))
    save(store, 100)
    pruner.prune()
    save(store, 200)
    path = store.folder / "step-00000200" / "tensors-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert pruner.prune() == []
    assert store.latest_good(verify=True) == 100


def test_a_deletion_that_fails_is_a_warning(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (100, 200, 300, 400):
        save(store, step)
    original, tried = store.delete, []

    def delete(step: int) -> None:
        tried.append(step)
        if step == 200:
            raise OSError(30, "Read-only file system", str(store.folder))
        if step == 300:
            original(step)  # somebody else was faster
        original(step)

    monkeypatch.setattr(store, "delete", delete)
    assert Pruner(store, Retention(1)).prune() == [100]
    assert tried == [100, 200, 300], "the oldest first"
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "step 200 could not be deleted: [Errno 30] Read-only file system" in warnings[0]
    assert "step 300 could not be deleted: " in warnings[1]
    assert store.steps() == [200, 400]


def test_scores_that_are_none(store: CheckpointStore) -> None:
    values = [None, "2.0", True, [1.0], 10**400, {}]
    for step, value in enumerate(values):
        save(store, step, validation_loss=value)
    save(store, 6)
    save(store, 7, validation_loss=2)
    pruner = Pruner(store, Retention(1, keep_best=3))
    assert pruner.scores() == {**dict.fromkeys(range(7)), 7: 2.0}
    assert pruner.prune() == list(range(7))
    assert Pruner(CheckpointStore(store.folder / "nowhere"), Retention(1)).prune() == []
