"""`harness study prior` and `harness study whatif`, on run folders whose losses follow a known law."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.cli import main
from harness.config import dump_yaml
from harness.forecast import planned_rates, read_curve
from harness.optim import ScheduleSection
from harness.runs import RunFolder
from harness.scaling import Prior, annealing_areas
from harness.studies.forecasts import annealed_early
from tests.small_run import small_settings

STEPS, PEAK = 3000, 1e-3
TRUTH = np.array([np.log(0.5), np.log(0.4), 0.5])
CONSTANT = {"kind": "constant", "warmup_steps": 100}
WSD = {"kind": "wsd", "warmup_steps": 100, "decay_steps": 600}
COSINE = {"kind": "cosine", "warmup_steps": 100}


def law(rates: np.ndarray, floor: float = 2.5) -> np.ndarray:
    level = np.where(np.arange(len(rates)) < rates.argmax(), rates.max(), rates)
    values: np.ndarray = (
        floor + np.exp(TRUTH[0]) * np.cumsum(rates) ** -TRUTH[2] - np.exp(TRUTH[1]) * annealing_areas(level)[1]
    )
    return values


def rates_of(schedule: dict[str, Any], steps: int = STEPS) -> np.ndarray:
    return planned_rates(ScheduleSection(**schedule), PEAK, steps)


def write_run(folder: Path, name: str, schedule: dict[str, Any], last: int = STEPS, floor: float = 2.5) -> Path:
    """The folder of a run that has done `last` of STEPS steps."""
    settings = small_settings(
        folder, run={"name": name}, schedule=schedule, optimizer={"learning_rate": PEAK}, train={"steps": STEPS}
    )
    rates = rates_of(schedule)
    losses = law(rates, floor) * np.exp(3e-3 * np.random.default_rng(len(name)).standard_normal(STEPS))
    path = folder / "runs" / name
    with RunFolder(path, tensorboard=False) as run:
        run.begin(dump_yaml(settings), details={"parameters": {"blocks": 1000}})
        for step in range(1, last + 1):
            record = {"loss": losses[step - 1], "learning_rate": rates[step - 1]}
            if step % 50 == 0:
                record["validation_loss"] = law(rates, floor + 0.1)[step - 1]
            run.log_metrics(step, record)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs, and a prior of two of them."""
    folder = tmp_path_factory.mktemp("whatif")
    write_run(folder, "constant", CONSTANT)
    write_run(folder, "wsd", WSD, floor=2.8)
    write_run(folder, "cosine", COSINE, last=900)
    write_run(folder, "begun", CONSTANT, last=1200)
    command = ["study", "prior", *(str(folder / "runs" / name) for name in ("constant", "wsd"))]
    assert main([*command, "--out", str(folder / "prior.json"), "--loss", "training"]) == 0
    return folder


def asked(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["study", "whatif", *map(str, arguments), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(["study", *map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert not said.out
    return said.err


def test_a_prior_says_what_it_is_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Prior.load(folder / "prior.json")
    assert [Path(one["name"]).name for one in made.origin] == ["constant", "wsd"]
    assert (made.peak, made.tokens_per_step, made.parameters) == (PEAK, 4 * 32, 1000)
    assert (np.abs(made.mean - TRUTH) < 3 * np.sqrt(np.diag(made.covariance))).all()
    runs = [folder / "runs" / name for name in ("constant", "wsd")]
    assert main(["study", "prior", *map(str, runs), "--out", str(folder / "other.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "57 validation losses up to step 3000" in lines[0]
    assert lines[-1].startswith("written to")


@pytest.mark.parametrize("other", [CONSTANT, WSD, {**COSINE, "final_fraction": 0.5}])
def test_another_schedule(folder: Path, capsys: pytest.CaptureFixture[str], other: dict[str, Any]) -> None:
    changes = [f"schedule.{key}={value}" for key, value in other.items()]
    found = asked(capsys, folder / "runs" / "cosine", *changes, "--prior", folder / "prior.json")
    assert (found["of"], found["last_step"], found["parts_after_step"]) == ("training", 900, 100)
    mine, theirs = law(rates_of(COSINE))[-1], law(rates_of(other))[-1]
    for name, truth in (("configured", mine), ("other", theirs), ("difference", theirs - mine)):
        assert found[name]["low"] < truth < found[name]["high"], name
        assert found[name]["high"] - found[name]["low"] < 0.15
    if other["kind"] == "cosine":
        widths = {name: found[name]["high"] - found[name]["low"] for name in ("configured", "other", "difference")}
        assert widths["difference"] < 0.8 * np.hypot(widths["configured"], widths["other"]), "what both share"


def test_another_length(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = asked(capsys, folder / "runs" / "begun", "train.steps=9000", "--prior", folder / "prior.json")
    assert found["other"]["steps"] == 9000
    truth = law(rates_of(CONSTANT, 9000))[-1]
    assert found["other"]["low"] < truth < found["other"]["high"]
    assert found["parts_after_step"] is None, "a constant rate goes on"


def test_an_earlier_annealing_from_other_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, earlier = folder / "runs" / "begun", folder / "runs" / "wsd"
    found = asked(capsys, run, "--anneal-at", 1500, "--over", 400, "--loss", "training", "--from", earlier)
    rates = np.concatenate([rates_of(CONSTANT)[:1500], PEAK * (1 - 0.9 * np.arange(1, 401) / 400)])
    truth = law(rates)[-1]
    assert (found["other"]["steps"], found["parts_after_step"]) == (1900, 1500)
    assert found["other"]["low"] < truth < found["other"]["high"]
    assert found["other"]["loss"] == pytest.approx(truth, rel=0.01)


def test_a_run_that_has_annealed_needs_no_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder / "runs" / "wsd"
    found = asked(capsys, run, "--anneal-at", 1200, "--over", 600, "--loss", "training")
    assert found["prior"] == "none: the run itself has annealed"
    rates = np.concatenate([rates_of(WSD)[:1200], PEAK * (1 - 0.9 * np.arange(1, 601) / 600)])
    assert found["other"]["low"] < law(rates, 2.8)[-1] < found["other"]["high"]
    configured = found["configured"]
    assert configured["loss"] == pytest.approx(law(rates_of(WSD), 2.8)[-1], rel=2e-3), "it was measured"
    assert configured["high"] - configured["low"] < found["other"]["high"] - found["other"]["low"]


def test_for_people(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["study", "whatif", str(folder / "runs" / "cosine"), "--prior", str(folder / "prior.json")]
    assert main([*command, "schedule.kind=constant"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "at step 900; 125 points" in lines[0]
    assert [line.split()[0] for line in lines[1:4]] == ["as", "schedule.kind=constant,", "difference"]
    assert "one schedule up to step 100, which the run is past" in lines[4]


def test_what_cannot_be_answered_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run, prior = folder / "runs" / "begun", ["--prior", folder / "prior.json"]
    assert "give --prior FILE" in refused(capsys, "whatif", run, "--anneal-at", 1500, "--over", 400)
    assert "nothing is changed" in refused(capsys, "whatif", run, *prior)
    assert "another run" in refused(capsys, "whatif", run, "model.layers=3", *prior)
    assert "belong together" in refused(capsys, "whatif", run, "--anneal-at", 1500, *prior)
    assert "within the run's 3000 steps" in refused(capsys, "whatif", run, "--anneal-at", 3001, "--over", 1, *prior)
    assert "one of the two" in refused(capsys, "whatif", run, "train.steps=4000", *prior, "--from", run)
    assert "is the run itself" in refused(capsys, "whatif", run, "train.steps=4000", "--from", run)
    assert "is not a run folder" in refused(capsys, "whatif", run, "train.steps=4000", "--from", tmp_path)
    assert "did you mean schedule.kind?" in refused(capsys, "whatif", run, "schedule.knd=wsd", *prior)
    assert "no run anneals" in refused(capsys, "prior", run, "--out", tmp_path / "prior.json")
    young = write_run(tmp_path, "young", CONSTANT, last=150)
    assert "needs at least 8" in refused(capsys, "whatif", young, "train.steps=4000", *prior)


def test_the_rates_that_a_run_had_count(folder: Path) -> None:
    """Not those that its newest start would have given it."""
    run = write_run(folder, "changed", CONSTANT, last=500)
    text = (run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in text]
    for record in records[300:]:
        record["learning_rate"] = 2e-4
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rates = read_curve(run).rates
    assert rates[299] == PEAK
    assert (rates[300:500] == 2e-4).all()
    assert (rates[500:] == PEAK).all()


def test_a_fall_ends_where_the_schedule_says() -> None:
    rates = np.full(100, 1.0)
    settings = small_settings_of({"final_fraction": 0.25, "kind": "wsd", "decay_shape": "sqrt"})
    fallen = annealed_early(rates, 40, 16, settings)
    assert len(fallen) == 56
    assert (fallen[:40] == 1).all()
    np.testing.assert_allclose(fallen[40:], 0.25 + 0.75 * (1 - np.sqrt(np.arange(1, 17) / 16)))


def small_settings_of(schedule: dict[str, Any]) -> Any:
    from types import SimpleNamespace

    return SimpleNamespace(schedule=ScheduleSection(**schedule))
