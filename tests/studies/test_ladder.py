"""A ladder, tiny: its rules, its runs once and no more, its fits, its report."""

from __future__ import annotations

import json
import math
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness import runs
from harness.callbacks import Callback, TrainerView
from harness.config import HarnessError, validate
from harness.model import build_decoder
from harness.scaling import LAWS, fit
from harness.studies import kinds
from harness.studies.ladder import plan, report, run, status
from harness.studies.ladder import runs as ladder_runs
from harness.studies.ladder.analysis import held_out
from harness.studies.ladder.config import LadderSection
from harness.studies.ladder.grid import cells, recipe, settings_of
from harness.studies.ladder.runs import run_cells
from harness.train import train

NAMES = ("ast", "inspect", "pydoc", "tarfile", "turtle", "typing")


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    stdlib = Path(sysconfig.get_path("stdlib"))
    return {
        "kind": "ladder",
        "folder": str(folder / "ladder"),
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
        "model": {"family": "llama"},
        "sizes": {
            "a": {"layers": 1, "hidden_size": 8, "heads": 1},
            "b": {"layers": 1, "hidden_size": 16, "heads": 2},
            "c": {"layers": 2, "hidden_size": 16, "heads": 2},
        },
        "tokens_per_parameter": [2, 4],
        "batch": {"factor": 64, "exponent": 0.05},
        "device": "cpu",
        "validations": 3,
        "windows": 12,
        "resamples": 100,
        **changes,
    }


def write(folder: Path, **changes: Any) -> tuple[Path, LadderSection]:
    config = validate(LadderSection, values(folder, **changes), "test")
    path = folder / "ladder.yaml"
    path.write_text(json.dumps(values(folder, **changes)))  # JSON is YAML
    return path, config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LadderSection]:
    """Begun here and killed in the middle of its second run, then done by two workers."""
    folder = tmp_path_factory.mktemp("ladder")
    path, config = write(folder)
    calls = []

    class KilledError(BaseException):
        pass

    class Bomb(Callback):
        name = "bomb"

        def after_step(self, trainer: TrainerView, record: dict[str, Any]) -> None:
            if trainer.step == trainer.total_steps * 2 // 3:
                raise KilledError

    def killed(settings: Any) -> Any:
        calls.append(settings)
        return train(settings, [Bomb()] if len(calls) == 2 else [])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladder_runs, "train", killed)
        with pytest.raises(KilledError):
            run_cells(config)
    assert len(list((config.path / "results").glob("*.json"))) == 1
    run(path)
    return path, config


def test_the_rules_make_what_they_say(tmp_path: Path) -> None:
    _, config = write(tmp_path)
    for cell in cells(config):
        found = recipe(config, cell.size, cell.ratio)
        section = config.section(cell.size).model_copy(update={"vocab_size": 257, "vocab_multiple": 1})
        model = build_decoder(section, seed=0)
        parameters = dict(model.named_parameters())
        head = 257 * section.hidden_size
        whole = sum(parameter.numel() for parameter in parameters.values())
        assert (found.total, found.non_embedding, found.without_head) == (whole, whole - 2 * head, whole - head)
        matrices = sum(p.numel() for name, p in parameters.items() if p.dim() == 2) - 2 * head
        attention = 12 * section.layers * section.hidden_size * 32
        compute = (6 * matrices + attention) * cell.ratio * found.non_embedding
        assert found.sequences == max(1, round(64 * compute**0.05 / 32))
        assert found.learning_rate == pytest.approx(0.3118 * compute**-0.125, rel=1e-3)
        assert found.steps == math.ceil(cell.ratio * found.non_embedding / (found.sequences * 32))
        assert found.flops == (6 * (matrices + head) + attention) * found.tokens
        assert found.flops_6nd == 6 * found.non_embedding * found.tokens


def test_a_batch_is_whole_micro_batches(tmp_path: Path) -> None:
    """Also of a size that nothing divides."""
    _, config = write(tmp_path, batch={"factor": 67 * 32, "exponent": 0.0}, micro_batch_tokens=16 * 32)
    settings = settings_of(config, cells(config)[0])
    assert settings.train.micro_batch_size == 14
    assert settings.train.global_batch_size == 70


def test_the_plan_has_every_run(finished: tuple[Path, LadderSection], capsys: pytest.CaptureFixture[str]) -> None:
    path, config = finished
    plan(path)
    printed = capsys.readouterr().out
    assert all(cell.name in printed for cell in cells(config))
    assert "core-hours" in printed


def test_interrupted_or_not_the_runs_are_those_of_train(finished: tuple[Path, LadderSection], tmp_path: Path) -> None:
    _, config = finished
    killed = cells(config)[1]
    settings = settings_of(config, killed)
    run_section = settings.run.model_copy(update={"folder": str(tmp_path)})
    whole = runs.read(train(settings.model_copy(update={"run": run_section})).folder)
    ours = runs.read(config.path / "runs" / killed.name)
    assert (ours.column("loss") == whole.column("loss")).all()
    result = killed.result(config)
    assert result is not None
    assert result["loss"] == whole.metrics[-1]["validation_loss"]
    assert result["tokens"] == result["tokens_seen"] == whole.metrics[-1]["tokens_seen"]
    assert not (config.path / "runs" / killed.name / "checkpoints").exists()


def test_a_second_run_does_nothing(finished: tuple[Path, LadderSection], capsys: pytest.CaptureFixture[str]) -> None:
    path, config = finished
    before = {file: file.stat().st_mtime_ns for file in config.path.rglob("*.json*")}
    assert run_cells(config) == 0
    status(path)
    assert "12 of 12 runs are done" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in config.path.rglob("*.json*")} == before


def test_parts_share_the_runs_without_overlap(finished: tuple[Path, LadderSection]) -> None:
    _, config = finished
    parts = [cells(config.model_copy(update={"part": part, "parts": 5})) for part in range(5)]
    names = [cell.name for part in parts for cell in part]
    assert sorted(names) == sorted(cell.name for cell in cells(config))
    assert len(set(names)) == len(names)


def test_the_largest_size_is_predicted_from_the_others(finished: tuple[Path, LadderSection]) -> None:
    """On losses that obey a law: the prediction is the law's, and a wrong loss of the largest size changes nothing."""
    _, config = finished
    rows = [row for cell in cells(config) if (row := cell.result(config)) is not None]
    sizes = {"a": 1e6, "b": 3e6, "c": 1e7}
    more = [{**row, "size": f"{row['size']}+", "non_embedding": 0.1 * sizes[row["size"]]} for row in rows]
    rows = [{**row, "non_embedding": sizes[row["size"]]} for row in rows] + more
    generator = np.random.default_rng()
    for row in rows:
        row["tokens"] = row["ratio"] * row["non_embedding"]
        row["loss"] = 1.7 + 400 / row["non_embedding"] ** 0.34 + 900 / row["tokens"] ** 0.36
        row["loss"] *= math.exp(1e-5 * generator.standard_normal())
    truth = {row["ratio"]: row["loss"] for row in rows if row["size"] == "c"}
    for row in rows:
        if row["size"] == "c":
            row["loss"] = 99.0
    found = {e["ratio"]: e for e in held_out(rows, config) if e["law"] == "chinchilla"}
    for ratio, loss in truth.items():
        assert found[ratio]["predicted"] == pytest.approx(loss, rel=2e-3)
        assert found[ratio]["low"] <= found[ratio]["predicted"] <= found[ratio]["high"]
        assert not found[ratio]["inside"]


def test_the_report_says_what_was_run(finished: tuple[Path, LadderSection], capsys: pytest.CaptureFixture[str]) -> None:
    path, config = finished
    report(path)
    found = json.loads((config.path / "report.json").read_text())
    assert len(found["runs"]) == 12
    table = [json.loads(line) for line in (config.path / "runs.jsonl").read_text().splitlines()]
    columns = {"parameters": "total", "tokens": "tokens", "loss": "loss"}
    by_hand = fit(
        LAWS["chinchilla"],
        {name: np.array([row[key] for row in table]) for name, key in columns.items()},
        resamples=100,
    )
    assert found["fits"]["total"]["parameters"] == pytest.approx(by_hand.parameters, rel=1e-3)
    page = (config.path / "report.html").read_text()
    for text in ("The largest size, c, predicted", "What the law leaves over", "The best size for a budget"):
        assert text in page
    text = (config.path / "report.md").read_text()
    assert str(config.path.parent) not in page + text + json.dumps(found["settings"])
    capsys.readouterr()
    kinds.fit(path)
    assert "Fits of L(N, D)" in capsys.readouterr().out


def test_other_settings_are_refused(finished: tuple[Path, LadderSection], tmp_path: Path) -> None:
    path, _ = finished
    other = tmp_path / "other.yaml"
    other.write_text(json.dumps(values(path.parent, warmup_share=0.1)))
    with pytest.raises(HarnessError, match="made with another warmup_share"):
        run(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"part": 2, "parts": 2}, "part 2: should be below parts"),
        ({"tokens_per_parameter": [2, 2]}, "has a value twice"),
        ({"tokens_per_parameter": [-1]}, "should be positive"),
        ({"optimizer": {"learning_rate": 1e-3}}, "come from the rules"),
        ({"sizes": {"a": {"layers": 1, "hidden_size": 8}}}, "sizes.a"),
        ({"sizes": {n: {"layers": 1, "hidden_size": 8, "heads": 1} for n in "ab"}}, "sizes.b: is the same model as a"),
    ],
)
def test_bad_configurations_are_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HarnessError, match=message) as caught:
        write(tmp_path, **changes)
    assert "\n" not in str(caught.value)


def test_nothing_done_is_no_report(tmp_path: Path) -> None:
    path, _ = write(tmp_path)
    with pytest.raises(HarnessError, match="no run of this ladder is done yet"):
        report(path)
