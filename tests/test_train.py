"""The loop: resume after any step, stop before a bad one, what is recorded, what callbacks see."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import runs
from harness.callbacks import Callback, FaultError, TrainerView
from harness.checkpoint import CheckpointStore
from harness.cli import main
from harness.config import HarnessError
from harness.settings import Settings
from harness.train import train
from tests.small_run import small_settings

MEASURED = {
    "tokens_per_second", "model_flops_per_second", "utilisation", "memory_bytes", "data_wait_seconds", "step_seconds",
}  # fmt: skip


class Killed(BaseException):
    """Not an Exception: nothing in between may swallow it."""


class KillAfter(Callback):
    """Ends the run some time after a step, before the next one is recorded, as a kill would."""

    name = "kill"

    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, trainer: TrainerView, record: dict[str, Any]) -> None:
        if trainer.step == self.step + 1:
            raise Killed


def series(folder: Path) -> list[dict[str, Any]]:
    """The recorded steps without what depends on the clock."""
    metrics = runs.read(folder).metrics
    return [{key: value for key, value in record.items() if key not in MEASURED} for record in metrics]


def variant(folder: Path, name: str, kind: str, **train_changes: Any) -> Settings:
    base = small_settings(folder).model_dump()
    model = dict(base["model"], dropout=0.1 if kind == "gpt2-dropout-bf16" else 0.0)
    if kind.startswith("gpt2"):
        model = {"family": "gpt2", "layers": 2, "hidden_size": 32, "heads": 2, "dropout": model["dropout"]}
    precision = "bf16" if kind.endswith("bf16") else "fp32"
    return small_settings(
        folder,
        run={"name": name},
        data={"document_masking": kind == "llama-masked"},
        model=model,
        train={"steps": 9, "precision": precision, **train_changes},
        validation={"every_steps": 2},
        checkpoint={"every_steps": 1, "keep_last": 2},
    )


@pytest.mark.parametrize("kind", ["llama-masked", "gpt2-dropout-bf16"])
def test_interrupted_after_any_step_the_series_is_the_same(tmp_path: Path, kind: str) -> None:
    """Blends, document masking, dropout and validation included; bit for bit."""
    whole = series(train(variant(tmp_path, "whole", kind)).folder)
    assert [record["step"] for record in whole] == list(range(1, 10))
    assert whole[-1]["loss"] != whole[0]["loss"]
    for step in range(1, 9):
        name = f"killed-{step}"
        with pytest.raises(Killed):
            train(variant(tmp_path, name, kind), [KillAfter(step)])
        result = train(variant(tmp_path, name, kind, resume="must"))
        assert series(result.folder) == whole, step
        events = [event["event"] for event in runs.read(result.folder).events]
        assert events.count("started") == events.count("resumed") == events.count("finished") == 1


def test_steps_after_the_checkpoint_are_discarded_and_done_again(tmp_path: Path) -> None:
    def settings(name: str) -> Settings:
        return small_settings(tmp_path, run={"name": name}, train={"steps": 9}, checkpoint={"every_steps": 4})

    whole = series(train(settings("whole")).folder)
    with pytest.raises(Killed):
        train(settings("killed"), [KillAfter(7)])
    folder = tmp_path / "runs" / "killed"
    assert len(runs.read(folder).metrics) == 7
    train(settings("killed"))
    assert series(folder) == whole
    discarded = [json.loads(line) for line in (folder / "metrics.discarded.jsonl").read_text().splitlines()]
    assert [record["step"] for record in discarded] == [5, 6, 7]


def test_a_longer_run_begins_as_the_shorter_one(tmp_path: Path) -> None:
    """The order of samples depends on the seed and on consumed samples alone, not on how long the run will be."""
    constant = {"kind": "constant"}
    short = series(train(small_settings(tmp_path, run={"name": "a"}, schedule=constant, train={"steps": 5})).folder)
    settings = small_settings(tmp_path, run={"name": "b"}, schedule=constant, train={"steps": 40})
    long = series(train(settings).folder)
    keys = ("step", "loss", "grad_norm", "target_tokens")
    assert [[record[key] for key in keys] for record in short] == [[record[key] for key in keys] for record in long[:5]]


def test_accumulation_changes_nothing_but_rounding(tmp_path: Path) -> None:
    results = []
    for micro_batch in (1, 2, 4):
        name = f"micro-{micro_batch}"
        settings = small_settings(
            tmp_path, run={"name": name}, data={"mask_after_end_of_text": True}, train={"micro_batch_size": micro_batch}
        )
        results.append([record["loss"] for record in series(train(settings).folder)])
    assert results[0] == pytest.approx(results[2], rel=1e-5)
    assert results[1] == pytest.approx(results[2], rel=1e-5)


def test_bf16_follows_fp32(tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        settings = small_settings(tmp_path, run={"name": precision}, train={"steps": 30, "precision": precision})
        losses[precision] = [record["loss"] for record in series(train(settings).folder)]
    assert losses["fp32"][-1] < 0.7 * losses["fp32"][0]
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)


class Poison(Callback):
    """Makes a weight infinite after a step, so that the next loss is not a number."""

    name = "poison"

    def after_step(self, trainer: TrainerView, record: dict[str, Any]) -> None:
        if trainer.step == 3:
            trainer.model.final_norm.weight.data[0] = math.inf
            self.before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
            self.model = trainer.model


class PoisonGradient(Callback):
    """A finite loss with a gradient that is not."""

    name = "poison"

    def before_training(self, trainer: TrainerView) -> None:
        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            return gradient * (math.nan if trainer.step == 2 else 1.0)

        trainer.model.final_norm.weight.register_hook(spoil)


def test_a_bad_loss_stops_before_the_optimizer_step(tmp_path: Path) -> None:
    poison = Poison()
    with pytest.raises(FaultError, match=r"step 4: the loss is nan; stopped before the optimizer step"):
        train(small_settings(tmp_path), [poison])
    for name, weight in poison.model.named_parameters():
        assert torch.equal(weight, poison.before[name]), name
    run = runs.read(tmp_path / "runs" / "small")
    assert [record["step"] for record in run.metrics] == [1, 2, 3]
    assert run.events[-1]["event"] == "stopped"
    assert "step 4" in run.events[-1]["reason"]


def test_a_bad_gradient_stops_before_the_optimizer_step(tmp_path: Path) -> None:
    with pytest.raises(FaultError, match="step 3: the gradient norm is nan"):
        train(small_settings(tmp_path), [PoisonGradient()])


def test_validation_is_a_column_and_a_view_of_the_same_text(tmp_path: Path) -> None:
    run = runs.read(train(small_settings(tmp_path, validation={"every_steps": 3})).folder)
    validated = [record["step"] for record in run.metrics if "validation_loss" in record]
    assert validated == [3, 6, 8], "on the cadence, and after the last step"
    for record in run.metrics:
        if record["step"] in validated:
            parts = [record["validation_loss/first"], record["validation_loss/second"]]
            assert min(parts) < record["validation_loss"] < max(parts)
            # A byte a token, and the end-of-text tokens' cost on top.
            bits = record["validation_loss"] / math.log(2)
            assert bits < record["validation_bits_per_byte"] < 1.1 * bits


def test_a_record_says_what_it_should(tmp_path: Path) -> None:
    result = train(small_settings(tmp_path))
    run = runs.read(result.folder)
    for step, record in enumerate(run.metrics, 1):
        assert record["tokens_seen"] == step * 4 * 32
        assert record["tokens_per_second"] == pytest.approx(4 * 32 / record["step_seconds"])
        per_token = run.environment["model_flops_per_token"]
        assert record["model_flops_per_second"] == pytest.approx(per_token * record["tokens_per_second"])
        assert record["utilisation"] == pytest.approx(
            record["model_flops_per_second"] / run.environment["peak_flops_per_second"]
        )
        assert 0 <= record["data_wait_seconds"] <= record["step_seconds"]
        assert record["memory_bytes"] > 1e7
    assert math.log(257) * 0.8 < run.metrics[0]["loss"] < math.log(257) * 1.2
    assert run.config["model"]["vocab_size"] == 257
    assert json.loads((result.folder / "summary.json").read_text())["step"] == 8


class Counter(Callback):
    name = "counter"

    def __init__(self) -> None:
        self.count = 0
        self.calls: list[str] = []

    def before_training(self, trainer: TrainerView) -> None:
        self.calls.append(f"before {trainer.step}")

    def after_step(self, trainer: TrainerView, record: dict[str, Any]) -> None:
        self.count += 1
        record["count"] = self.count

    def after_training(self, trainer: TrainerView) -> None:
        self.calls.append(f"after {trainer.step}")

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def test_callbacks_have_hooks_columns_and_state(tmp_path: Path) -> None:
    settings = small_settings(tmp_path, checkpoint={"every_steps": 2})
    with pytest.raises(Killed):
        train(settings, [Counter(), KillAfter(5)])
    counter = Counter()
    result = train(settings, [counter])
    assert counter.calls == ["before 4", "after 8"]
    assert [record["count"] for record in runs.read(result.folder).metrics] == list(range(1, 9))


def test_a_finished_run_is_left_as_it_is_and_can_go_on(tmp_path: Path) -> None:
    settings = small_settings(tmp_path, schedule={"kind": "constant"})
    first = series(train(settings).folder)
    result = train(settings)
    assert result.record is None
    assert result.step == 8
    assert series(result.folder) == first
    longer = small_settings(tmp_path, schedule={"kind": "constant"}, train={"steps": 12})
    assert len(series(train(longer).folder)) == 12


def test_what_may_not_change_is_refused_by_name(tmp_path: Path) -> None:
    train(small_settings(tmp_path))
    with pytest.raises(HarnessError, match=r"model\.layers: was 2, now 3"):
        train(small_settings(tmp_path, model={"layers": 3}, train={"steps": 20}))
    with pytest.raises(HarnessError, match="holds a run already"):
        train(small_settings(tmp_path, train={"resume": "never"}))
    with pytest.raises(HarnessError, match="no good checkpoint to resume from"):
        train(small_settings(tmp_path, run={"name": "other"}, train={"resume": "must"}))


def test_recomputation_in_the_loop_changes_no_loss(tmp_path: Path) -> None:
    results = []
    for mode in ("none", "selective", "full"):
        settings = small_settings(tmp_path, run={"name": mode}, train={"recompute": mode})
        results.append([record["loss"] for record in series(train(settings).folder)])
    assert results[0] == pytest.approx(results[1], rel=1e-6)
    assert results[0] == pytest.approx(results[2], rel=1e-6)


def test_a_moved_run_folder_goes_on_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = small_settings(tmp_path, schedule={"kind": "constant"}, train={"steps": 3}, run={"folder": "runs"})
    folder = train(settings).folder
    moved = folder.rename(tmp_path / "moved run")
    assert main(["train", "moved run", "train.steps=5"]) == 0
    assert [record["step"] for record in runs.read(moved).metrics] == [1, 2, 3, 4, 5]
    assert not folder.exists()


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def settings(name: str, steps: int) -> Settings:
        return small_settings(
            tmp_path,
            run={"name": name},
            schedule={"kind": "constant"},
            train={"steps": steps},
            checkpoint={"every_steps": 2},
        )

    whole = series(train(settings("whole", 8)).folder)
    folder = train(settings("damaged", 6)).folder
    shard = folder / "checkpoints" / "step-00000006" / "tensors-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    caplog.clear()
    train(settings("damaged", 8))
    assert any(str(shard) in record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert series(folder) == whole


def test_without_held_out_text_it_is_said_before_the_first_step_or_trained_without(tmp_path: Path) -> None:
    text = tmp_path / "one.txt"
    text.write_text("the one and only document " * 200)
    data = {"corpora": [{"name": "one", "source": [str(text)]}], "folder": str(tmp_path / "p"), "validation_share": 0.0}
    with pytest.raises(
        HarnessError, match=r"none of its 1 documents in the validation split.*validation\.enabled=false"
    ):
        train(small_settings(tmp_path, data=data))
    assert not (tmp_path / "runs" / "small" / "metrics.jsonl").exists()
    folder = train(small_settings(tmp_path, data=data, validation={"enabled": False}, summary={"prompt": "the"})).folder
    assert [record["step"] for record in runs.read(folder).metrics] == list(range(1, 9))
    assert "validation_loss" not in runs.read(folder).columns
    assert json.loads((folder / "summary.json").read_text()).keys() == {"step", "completion"}


def test_the_sequence_length_may_change_where_positions_are_not_weights(tmp_path: Path) -> None:
    def settings(steps: int, length: int, **model: Any) -> Settings:
        data = {"sequence_length": length}
        return small_settings(
            tmp_path,
            run={"name": model["positions"]},
            schedule={"kind": "constant", "warmup_steps": 0},
            train={"steps": steps},
            data=data,
            model={"max_positions": None, **model},
        )

    train(settings(2, 32, positions="rope"))
    assert train(settings(4, 48, positions="rope", dropout=0.1)).step == 4
    train(settings(2, 32, positions="learned"))
    with pytest.raises(HarnessError, match=r"model\.max_positions: was 32, now 48"):
        train(settings(4, 48, positions="learned"))


@pytest.mark.parametrize(("keep", "steps"), [(2, [6, 8]), (None, [2, 4, 6, 8])])
def test_the_last_checkpoints_are_kept(tmp_path: Path, keep: int | None, steps: list[int]) -> None:
    settings = small_settings(tmp_path, checkpoint={"every_steps": 2, "keep_last": keep})
    store = CheckpointStore(train(settings).folder / "checkpoints")
    assert store.steps() == steps
    assert [store.verify(step) for step in steps] == [[] for _ in steps]
