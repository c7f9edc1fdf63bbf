"""Bad steps: told from good ones by statistics that numpy agrees with; skipped, rolled back, and replayed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness import runs
from harness.callbacks import Callback, FaultError, FaultJudge, FaultsSection, TrainerView
from harness.checkpoint import CheckpointStore
from harness.data import TokenStream
from harness.parallel import TorchEngine
from harness.settings import Settings
from harness.train import Trainer, train
from tests.small_run import small_settings
from tests.test_train import KillAfter, Killed, series

BATCH = 4


@pytest.mark.parametrize("what", ["loss", "norm"])
def test_a_spike_is_what_numpy_says_it_is(what: str) -> None:
    rng = np.random.default_rng()
    section = FaultsSection(
        spike="skip", spike_deviations=3.0, spike_least=0.05, grad_norm_deviations=4.0, window_steps=20
    )
    judge = FaultJudge(section)
    losses, norms = [], []
    found = 0
    for step in range(300):
        loss, norm = 3.0 + 0.1 * rng.normal(), 1.0 + 0.2 * rng.random()
        if rng.random() < 0.1 and what == "loss":
            loss += rng.uniform(0.1, 0.8)
        if rng.random() < 0.1 and what == "norm":
            norm += rng.uniform(0.1, 3.0)
        expected = False
        if len(losses) >= 10:
            window, others = np.array(losses[-20:]), np.array(norms[-20:])
            expected = loss > window.mean() + max(3.0 * window.std(), 0.05)
            expected |= norm > others.mean() + max(4.0 * others.std(), others.mean())
        fault = judge.judge(loss, norm)
        assert (fault is not None) == expected, (step, loss, norm)
        if fault is None:
            judge.accept(loss, norm)
            losses.append(loss)
            norms.append(norm)
        else:
            found += 1
            assert fault.kind == "spike"
        if step % 7 == 0:  # the statistics survive a resume
            state = judge.state_dict()
            judge = FaultJudge(section)
            judge.load_state_dict(state)
    assert found > 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_found_from_the_first_step(value: float) -> None:
    judge = FaultJudge(FaultsSection())
    for loss, norm in ((value, 1.0), (1.0, value)):
        fault = judge.judge(loss, norm)
        assert fault is not None
        assert fault.kind == "non_finite"
        assert str(value) in fault.reason


def test_too_many_decisions_are_a_stop() -> None:
    judge = FaultJudge(FaultsSection(non_finite="skip", most=3, window_steps=4))
    bad = judge.judge(math.nan, 1.0)
    assert bad is not None
    assert [judge.decide(bad) for _ in range(4)] == ["skip", "skip", "skip", "stop"]
    for _ in range(4):
        judge.accept(1.0, 1.0)
    assert judge.decide(bad) == "skip", "window_steps good steps make up for them"


def settings(folder: Path, name: str, policy: str, **faults: Any) -> Settings:
    return small_settings(
        folder,
        run={"name": name},
        schedule={"kind": "constant"},
        train={"steps": 14},
        checkpoint={"every_steps": 2, "keep_last": None},
        faults={"non_finite": policy, "window_steps": 6, "rollback_steps": 3, **faults},
    )


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step that reads sample 4 * 8 (that is step 9, at first) has a loss that is not a number."""
    plain_read, plain_backward = TokenStream.read, Trainer._backward

    def read(self: TokenStream, *arguments: Any) -> Any:
        first = self.consumed_samples
        batches = plain_read(self, *arguments)
        self.bad = first <= 32 < self.consumed_samples and not any(  # type: ignore[attr-defined]
            start <= 32 < stop for start, stop in self.state_dict()["skipped"]
        )
        return batches

    def backward(self: Trainer, batch: Any, tokens: int, *, last: bool) -> Any:
        loss = plain_backward(self, batch, tokens, last=last)
        if self.stream.bad:  # type: ignore[attr-defined]
            for weight in self.model.parameters():
                if weight.grad is not None:
                    weight.grad.fill_(math.nan)
        return loss

    monkeypatch.setattr(TokenStream, "read", read)
    monkeypatch.setattr(Trainer, "_backward", backward)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


class Watch(Callback):
    """Keeps the masters and moments after every step."""

    name = "watch"

    def __init__(self) -> None:
        self.state: dict[int, dict[str, torch.Tensor]] = {}

    def after_step(self, trainer: TrainerView, record: dict[str, Any]) -> None:
        assert isinstance(trainer.engine, TorchEngine)
        self.state[trainer.step] = {part.key: part.tensor.clone() for part in trainer.engine.fragments()}


@pytest.mark.usefixtures("poisoned")
def test_stop_names_the_step_and_the_samples(tmp_path: Path) -> None:
    with pytest.raises(FaultError, match=r"step 9: the gradient norm is nan; stopped before .* samples 32 to 35"):
        train(settings(tmp_path, "stop", "stop"))


@pytest.mark.usefixtures("poisoned")
def test_skip_leaves_weights_moments_and_counts(tmp_path: Path) -> None:
    watch = Watch()
    run = runs.read(train(settings(tmp_path, "skip", "skip"), [watch]).folder)
    assert [record["step"] for record in run.metrics] == list(range(1, 15))
    assert [record["step"] for record in run.metrics if "skipped" in record] == [9]
    for key, value in watch.state[9].items():
        assert torch.equal(value, watch.state[8][key]), key
    assert not torch.equal(watch.state[10]["exp_avg/head.weight"], watch.state[9]["exp_avg/head.weight"])
    (event,) = [event for event in run.events if event["event"] == "skipped"]
    assert (event["step"], event["samples"], event["kind"]) == (9, [32, 36], "non_finite")


def test_a_rollback_is_a_run_without_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 9 is bad: back to step 6 and on without the samples of steps 7 to 9. So the series is that of a run whose
    stream has never had them; and it is replayed where the run is killed at any later step."""
    with monkeypatch.context() as patch:
        created = TokenStream.__init__

        def create(self: TokenStream, *arguments: Any, **options: Any) -> None:
            created(self, *arguments, **options)
            self.skip(6 * BATCH, 9 * BATCH)

        patch.setattr(TokenStream, "__init__", create)
        whole = series(train(settings(tmp_path, "without", "stop")).folder)

    with monkeypatch.context() as patch:
        poison(patch)
        result = train(settings(tmp_path, "rolled", "rollback"))
        assert series(result.folder) == whole
        events = runs.read(result.folder).events
        (event,) = [event for event in events if event["event"] == "rolled_back"]
        assert (event["step"], event["to_step"], event["skipped_samples"]) == (9, 6, [24, 36])
        discarded = (result.folder / "metrics.discarded.jsonl").read_text().splitlines()
        assert len(discarded) == 2, "steps 7 and 8"
        store = CheckpointStore(result.folder / "checkpoints")
        assert store.read_state(6)["stream"]["skipped"] == [[24, 36]], "saved again with the decision"

        for step in (7, 9, 12):
            name = f"killed-{step}"
            with pytest.raises(Killed):
                train(settings(tmp_path, name, "rollback"), [KillAfterRollback(step)])
            result = train(settings(tmp_path, name, "rollback"))
            assert series(result.folder) == whole, step
            rolled = [event["event"] for event in runs.read(result.folder).events].count("rolled_back")
            assert rolled == 1, "the decision was in the checkpoint"


class KillAfterRollback(KillAfter):
    """Not before a step was seen for the second time."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.seen: set[int] = set()
        self.rolled = False

    def after_step(self, trainer: TrainerView, record: dict[str, Any]) -> None:
        self.rolled |= trainer.step in self.seen
        self.seen.add(trainer.step)
        if self.rolled:
            trainer.saving._saver._running and trainer.saving._saver._running.result()  # type: ignore[attr-defined]
            super().after_step(trainer, record)


@pytest.mark.usefixtures("poisoned")
def test_a_rollback_without_a_checkpoint_to_go_back_to_stops(tmp_path: Path) -> None:
    with pytest.raises(FaultError, match=r"step 9: .* no checkpoint 9 steps back to roll back to"):
        train(settings(tmp_path, "rollback", "rollback", rollback_steps=9))


@pytest.mark.parametrize("policy", ["ignore", "stop", "skip", "rollback"])
def test_a_spike_of_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    plain = Trainer._backward
    spiked: list[int] = []

    def backward(self: Trainer, batch: Any, tokens: int, *, last: bool) -> Any:
        loss = plain(self, batch, tokens, last=last)
        at_nine = self.step == 8 and len(spiked) < 2  # both micro-batches, once
        if at_nine:
            spiked.append(self.step)
        return loss * 3 if at_nine else loss

    monkeypatch.setattr(Trainer, "_backward", backward)
    chosen = settings(tmp_path, "spike", "stop", spike=policy)
    if policy == "stop":
        with pytest.raises(FaultError, match=r"step 9: the loss is .* over the last 6 steps; stopped"):
            train(chosen)
        return
    run = runs.read(train(chosen).folder)
    expected = {"ignore": [], "skip": ["skipped"], "rollback": ["rolled_back"]}[policy]
    assert [event["event"] for event in run.events if event["event"] in ("skipped", "rolled_back")] == expected
    assert [record["step"] for record in run.metrics] == list(range(1, 15))
