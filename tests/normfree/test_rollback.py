"""Spikes after a removal: injected by a callback that spoils the weights once, or the loss of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from harness import runs
from harness.callbacks import Callback, TrainerView
from harness.config import HarnessError
from harness.data import Batch
from harness.remove_norms import consumed_steps
from harness.settings import Settings
from harness.train import train
from tests.normfree.small_removal import small_removal
from tests.normfree.test_removal import removal_state

ADAPTIVE = {"start": 4, "gap": 2, "tolerance": 9.0, "patience": 4, "spike": 0.5}


class Spoiler(Callback):
    """Before certain steps, counted as they are trained and rollbacks included, the weights are no good."""

    name = "spoiler"

    def __init__(self, attempts: set[int], factor: float) -> None:
        self.attempts, self.factor, self.count = attempts, factor, 0

    def before_step(self, trainer: TrainerView) -> None:
        self.count += 1
        if self.count in self.attempts:
            with torch.no_grad():
                trainer.model.token_embedding.weight.mul_(self.factor)


def adaptive_removal(folder: Path, **changes: Any) -> Settings:
    removal = {"schedule": "adaptive", "adaptive": {**ADAPTIVE, **changes.pop("adaptive", {})}, **changes}
    return small_removal(
        folder, norm_removal=removal, train={"steps": 40}, checkpoint={"every_steps": 10, "keep_last": 1}
    )


@pytest.mark.parametrize("factor", [-30.0, float("nan")])
def test_a_spike_after_a_removal_is_taken_back_and_the_run_finishes(tmp_path: Path, factor: float) -> None:
    settings = adaptive_removal(tmp_path)
    result = train(settings, [Spoiler({9}, factor)])
    log = runs.read(result.folder)
    back = [event for event in log.events if event["event"] == "rolled_back"]
    assert [(event["step"], event["to_step"], event["kind"]) for event in back] == [(9, 7, "norm_removal")]
    removed = [(event["step"], event["site"]) for event in log.events if event["event"] == "norm_removed"]
    # At step 8 the third site went; taken back, it goes once more after twice the gap: not before step 7 + 1 + 2 * 2.
    assert removed[:4] == [
        (4, "layers.0.mlp"), (6, "layers.1.mlp"), (8, "layers.0.qk"), (12, "layers.0.qk"),
    ]  # fmt: skip
    assert len({site for _, site in removed}) == 7
    state = removal_state(result.folder, 40)
    assert {value["alpha"] for value in state["sites"].values()} == {1.0}
    assert state["schedule"]["rollbacks"] == 1
    assert [record["step"] for record in log.metrics] == list(range(1, 41))
    # Two steps were trained and taken back; their samples were passed over, so a control trains two steps more.
    assert back[0]["skipped_samples"] == [7 * 8, 9 * 8]
    assert consumed_steps(result.folder, 8) == 42


def test_the_snapshot_is_spared_by_retention_until_the_next_removal(tmp_path: Path) -> None:
    settings = adaptive_removal(tmp_path, adaptive={"patience": 30})
    settings = settings.model_copy(
        update={"checkpoint": settings.checkpoint.model_copy(update={"every_steps": 1, "keep_last": 1})}
    )
    result = train(settings, [Spoiler({27}, -30.0)])
    log = runs.read(result.folder)
    gone = [event["step"] for event in log.events if event["event"] == "norm_removed"]
    assert gone[6] == 16  # the last site, so that at step 27 every checkpoint since was pruned but one
    back = next(event for event in log.events if event["event"] == "rolled_back")
    assert back["to_step"] == 15


def test_rollbacks_have_an_end(tmp_path: Path) -> None:
    settings = adaptive_removal(tmp_path, adaptive={"most_rollbacks": 2})
    with pytest.raises(HarnessError, match=r"after 2 rollbacks \(norm_removal\.adaptive\.most_rollbacks\); lower"):
        train(settings, [Spoiler(set(range(5, 100)), -30.0)])


def test_a_spike_before_any_removal_is_none_of_its_business(tmp_path: Path) -> None:
    result = train(adaptive_removal(tmp_path), [Spoiler({2}, -30.0)])
    assert not [
        event for event in runs.read(result.folder).events if event["event"] == "rolled_back" and event["step"] < 4
    ]


class Recorder(Callback):
    name = "recorder"

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def before_forward(self, trainer: TrainerView, batch: Batch) -> None:
        self.batches.append(batch)


def test_no_sample_is_read_twice(tmp_path: Path) -> None:
    recorder = Recorder()
    train(adaptive_removal(tmp_path), [Spoiler({9}, -30.0), recorder])
    rows = [tuple(row.tolist()) for batch in recorder.batches for row in batch.tokens]
    plain = Recorder()
    other = adaptive_removal(tmp_path)
    longer = other.train.model_copy(update={"steps": 42})
    train(other.model_copy(update={"train": longer, "run": other.run.model_copy(update={"name": "b"})}), [plain])
    assert rows == [tuple(row.tolist()) for batch in plain.batches for row in batch.tokens]


def test_a_skipped_step_leaves_no_trace_in_statistics_and_schedule(tmp_path: Path) -> None:
    settings = adaptive_removal(tmp_path)
    faults = settings.faults.model_copy(update={"non_finite": "skip"})

    class Once(Spoiler):
        """Spoils one step's weights, and mends them before the next."""

        def before_step(self, trainer: TrainerView) -> None:
            self.count += 1
            with torch.no_grad():
                if self.count in self.attempts:
                    self.kept = trainer.model.final_norm.weight.clone()
                    trainer.model.final_norm.weight.fill_(float("nan"))
                elif self.count - 1 in self.attempts:
                    trainer.model.final_norm.weight.copy_(self.kept)

    result = train(settings.model_copy(update={"faults": faults}), [Once({2}, 1.0)])
    state = removal_state(result.folder, 40)
    assert [record["step"] for record in runs.read(result.folder).metrics if "skipped" in record] == [2]
    assert {value["alpha"] for value in state["sites"].values()} == {1.0}
    assert all(0 < value["sigma"] < 100 for value in state["sites"].values())
    assert state["schedule"]["mean"] == pytest.approx(state["schedule"]["mean"])  # no nan
