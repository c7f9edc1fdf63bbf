"""Forecasts in real runs: the record, TensorBoard, kills, roll-backs, two ranks. The truth is the same callback that is
shown the finished run's records."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from harness import runs
from harness.callbacks import Callback, RollBack, TrainerView
from harness.cli import main
from harness.config import plain
from harness.forecast import Forecasting
from harness.model import count_parameters
from harness.scaling import Prior
from harness.scaling.residuals import Residuals
from harness.settings import Settings
from harness.train import train
from tests.parallel.layout_table import launch
from tests.runs.test_tensorboard import assert_view_equals_record
from tests.small_run import small_settings
from tests.test_train import KillAfter, Killed, series

STEPS = 40


def settings(folder: Path, name: str, **sections: Any) -> Settings:
    folder.mkdir(exist_ok=True)
    prior = folder / "prior.json"
    if not prior.exists():
        mean = np.array([np.log(0.05), np.log(0.05), 0.5])
        Prior(mean, np.diag([1.0, 1.0, 0.04]), Residuals(0.05, 0.02, 0.3), 0.05, 3e-3, None, None, ()).save(prior)
    return small_settings(
        folder,
        run={"name": name, "tensorboard": True},
        train={"steps": STEPS},
        checkpoint={"every_steps": 5, "keep_last": None},
        forecast={"prior": str(prior), "every_steps": 4, "from_share": 0.5, "window_steps": 6},
        **sections,
    )


def replayed(folder: Path, settings: Settings) -> list[dict[str, float]]:
    """What a fresh callback says to the records of a run that went through without any trouble."""
    model = settings.model.model_copy(update={"vocab_size": 257})
    callback = Forecasting(
        settings.forecast,
        settings.schedule,
        peak=settings.optimizer.learning_rate,
        steps=STEPS,
        tokens_per_step=4 * 32,
        parameters=count_parameters(model).blocks,
    )
    view, found = SimpleNamespace(step=0, run=SimpleNamespace(log_event=lambda *_, **__: None)), []
    for record in runs.read(folder).metrics:
        known = {name: value for name, value in record.items() if not name.startswith("forecast")}
        view.step = record["step"]
        callback.after_step(view, known)  # type: ignore[arg-type]
        found.append({name: value for name, value in known.items() if name.startswith("forecast")})
    return found


def recorded(folder: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in record.items() if name.startswith("forecast")}
        for record in runs.read(folder).metrics
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the run `whole` in it."""
    folder = tmp_path_factory.mktemp("forecast") / "work"
    train(settings(folder, "whole"))
    return folder


def test_a_run_has_forecasts_in_its_record_and_in_tensorboard(folder: Path) -> None:
    run = folder / "runs" / "whole"
    found = recorded(run)
    assert [number for number, columns in enumerate(found, 1) if columns] == [20, 24, 28, 32, 36, 40]
    assert found == replayed(run, settings(folder, "whole"))
    assert_view_equals_record(run)
    (event,) = [event for event in runs.read(run).events if event["event"] == "forecast"]
    assert (event["step"], event["of"], event["final"]) == (20, "training", found[19]["forecast_final"])


def test_the_training_is_the_same_with_and_without(folder: Path) -> None:
    without = settings(folder, "without")
    train(without.model_copy(update={"forecast": type(without.forecast)()}))
    one, other = (series(folder / "runs" / name) for name in ("whole", "without"))
    kept = [{name: value for name, value in record.items() if not name.startswith("forecast")} for record in one]
    assert kept == other


@pytest.mark.parametrize("step", [8, 20, 33])
def test_a_killed_run_goes_on_to_the_last_bit(folder: Path, step: int) -> None:
    name = f"killed-{step}"
    with pytest.raises(Killed):
        train(settings(folder, name), [KillAfter(step)])
    train(settings(folder, name))
    assert series(folder / "runs" / name) == series(folder / "runs" / "whole")


class GoBack(Callback):
    """Once, from step 29 to 15: behind the first forecast."""

    name = "go-back"

    def __init__(self) -> None:
        self.done = False

    def after_step(self, trainer: TrainerView, record: dict[str, Any]) -> None:
        if trainer.step == 29 and not self.done:
            self.done = True
            raise RollBack(15, "test", "to see what is left")


def test_after_a_roll_back_it_is_the_forecast_of_the_run_that_is_left(folder: Path) -> None:
    run = train(settings(folder, "rolled"), [GoBack()]).folder
    assert recorded(run) == replayed(run, settings(folder, "rolled"))
    assert series(run) != series(folder / "runs" / "whole"), "other samples"
    assert [event["step"] for event in runs.read(run).events if event["event"] == "forecast"] == [20, 20]


def test_two_ranks_record_what_one_would(folder: Path) -> None:
    two = settings(folder, "two", parallel={"device": "cpu", "threads": 1})
    launch(2, [{"settings": plain(two)}], folder, timeout_seconds=300)
    run = folder / "runs" / "two"
    found = recorded(run)
    assert sum(map(bool, found)) == 6
    assert found == replayed(run, two)


def test_a_prior_that_is_none_ends_it_before_the_first_step(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "none.json").write_text("[]")
    assert (
        main(["train", str(folder / "runs" / "whole"), "run.name=refused", f"forecast.prior={folder}/none.json"]) == 2
    )
    assert capsys.readouterr().err.count("\n") == 1
