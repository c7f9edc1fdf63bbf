"""A study of norm removal, tiny: what it does, once and no more, and what its report says."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.callbacks import Callback, FaultError, TrainerView
from harness.config import HarnessError, dump_yaml, validate
from harness.normfree import NormRemoval
from harness.studies.norm_removal import plan, report, run, status
from harness.studies.norm_removal import runs as study_runs
from harness.studies.norm_removal.config import NormRemovalStudySection
from harness.studies.norm_removal.grid import control_cells, removal_cells
from harness.studies.norm_removal.runs import run_cells
from harness.train import train

NAMES = ("ast", "inspect", "pydoc", "tarfile", "turtle", "typing")


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    stdlib = Path(sysconfig.get_path("stdlib"))
    model = {"layers": 1, "hidden_size": 32, "heads": 2}
    times = {"mlp": {"first": 4}, "qk": {"first": 6}, "v": {"first": 8}, "final": {"first": 10}}
    return {
        "kind": "norm_removal",
        "folder": str(folder / "study"),
        "workers": 2,
        "seeds": 2,
        "data": {
            "folder": str(folder / "prepared"),
            "corpora": [{"name": "text", "source": [str(stdlib / f"{name}.py") for name in NAMES]}],
            "tokenizer": {"kind": "bytes"},
            "sequence_length": 32,
            "validation_share": 0.3,
            "test_share": 0.0,
            "workers": 1,
        },
        "families": {"llama": {"family": "llama", **model}},
        "source": {"steps": 12, "sequences": 8, "norm_removal": {"injection": {"weight": 0.3}}},
        "removal": {"steps": 14, "sequences": 4},
        "arms": [
            {"name": "fixed", "norm_removal": {"times": times}},
            {"name": "plain", "norm_removal": {"control": "plain"}},
        ],
        "windows": 12,
        **changes,
    }  # fmt: skip


def write(folder: Path, **changes: Any) -> tuple[Path, NormRemovalStudySection]:
    config = validate(NormRemovalStudySection, values(folder, **changes), "test")
    path = folder / "study.yaml"
    path.write_text(dump_yaml(config, comments=False))
    return path, config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, NormRemovalStudySection]:
    """Begun here and killed in the middle of its second run, then done by two workers."""
    folder = tmp_path_factory.mktemp("study")
    path, config = write(folder)
    calls = []

    class KilledError(BaseException):
        pass

    def after_training(self: NormRemoval, trainer: Any) -> None:
        calls.append(trainer.step)
        if len(calls) == 3:  # the source, the first removal, and the second one before its result
            raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NormRemoval, "after_training", after_training)
        with pytest.raises(KilledError):
            run_cells(config)
    assert len(list((config.path / "results").glob("*.json"))) == 1
    run(path)
    return path, config


def test_the_plan_says_what_it_costs(finished: tuple[Path, Any], capsys: pytest.CaptureFixture[str]) -> None:
    plan(finished[0])
    printed = capsys.readouterr().out
    assert "7 norm sites" not in printed
    assert "4 norm sites; source: 3,072 tokens" in printed
    assert "in all about" in printed


def test_every_removal_has_its_control_and_a_proof(finished: tuple[Path, NormRemovalStudySection]) -> None:
    _, config = finished
    assert len(removal_cells(config)) == len(control_cells(config)) == 2
    for cell in removal_cells(config):
        result = cell.result(config)
        assert result is not None
        assert result["proof"]["holds"], result["proof"]["failures"]
        assert result["consumed_steps"] == 14
        assert [event["step"] for event in result["events"]] == [4, 6, 8, 10]
        assert result["curve"][-1][2] == 0
        assert not (config.path / "cells" / cell.name / "checkpoints").exists()
    for cell in control_cells(config):
        result = cell.result(config)
        assert result is not None
        assert result["curve"][-1][2] == 4


def test_a_second_run_does_nothing(finished: tuple[Path, Any], capsys: pytest.CaptureFixture[str]) -> None:
    path, config = finished
    before = {file: file.stat().st_mtime_ns for file in config.path.rglob("*.json")}
    assert run_cells(config) == 0
    status(path)
    assert "removals: 2 of 2 are done" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in config.path.rglob("*.json")} == before


def test_the_report_has_the_gaps_of_the_results(finished: tuple[Path, Any]) -> None:
    path, config = finished
    report(path)
    found = json.loads((config.path / "report.json").read_text())
    row = next(row for row in found["rows"] if row["family"] == "llama")
    gaps = []
    for seed in range(2):
        mine, theirs = (
            json.loads((config.path / "results" / f"llama-{arm}-14-seed{seed}.json").read_text())["window_losses"]
            for arm in ("fixed", "plain")
        )
        gaps.append(np.mean(np.array(mine) - np.array(theirs)))
    assert row["gaps"]["plain"]["nats"] == pytest.approx(np.mean(gaps))
    assert row["gaps"]["plain"]["over_seeds"] == pytest.approx(np.std(gaps, ddof=1))
    assert row["proofs_hold"] == 2
    text = (config.path / "report.md").read_text()
    assert f"{row['gaps']['plain']['nats']:+.4f}\u00a0±\u00a0{row['gaps']['plain']['over_seeds']:.4f}" in text
    page = (config.path / "report.html").read_text()
    assert "norm sites left" in page
    assert str(config.path.parent) not in page + text + json.dumps(found["settings"])


def test_other_settings_are_refused(finished: tuple[Path, Any], tmp_path: Path) -> None:
    path, _ = finished
    changed = values(path.parent, removal={"steps": 15, "sequences": 4})
    other = tmp_path / "other.yaml"
    other.write_text(dump_yaml(validate(NormRemovalStudySection, changed, "test"), comments=False))
    with pytest.raises(HarnessError, match="made with another removal"):
        run(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": [{"name": "plain", "norm_removal": {"control": "plain"}}]}, "all are controls"),
        ({"arms": values(Path("x"))["arms"][:1] * 2}, "has a name twice"),
    ],
)
def test_bad_configurations_are_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HarnessError, match=message):
        write(tmp_path, **changes)


def test_nothing_done_is_no_report(tmp_path: Path) -> None:
    path, _ = write(tmp_path)
    with pytest.raises(HarnessError, match="no removal of this study is done yet"):
        report(path)


class Diverges(Callback):
    name = "diverges"

    def after_step(self, trainer: TrainerView, record: dict[str, Any]) -> None:
        if trainer.step == 9:
            raise FaultError("step 10: the loss is nan")


def test_a_removal_that_diverges_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends neither the study nor the report, and has no controls."""
    path, config = write(tmp_path, seeds=1)

    def diverging(settings: Any) -> Any:
        return train(settings, [Diverges()] if settings.run.folder.endswith("cells") else [])

    monkeypatch.setattr(study_runs, "train", diverging)
    assert run_cells(config) == 1
    assert run_cells(config) == 0
    assert control_cells(config) == []
    report(path)
    found = json.loads((config.path / "report.json").read_text())
    assert found["rows"] == [{"family": "llama", "arm": "fixed", "seeds": 0, "failed_after": [8]}]
    assert found["runs"][0]["failed"] == "step 10: the loss is nan"
    assert found["runs"][0]["curve"][-1][0] == 8, "the record of the step itself comes after the callbacks"
    assert "| llama | fixed | 0 |" in (config.path / "report.md").read_text()
    assert "after step 8" in (config.path / "report.html").read_text()
