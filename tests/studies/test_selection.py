"""A whole study, small: what its runs see, that it is the same again, what a kill costs, what is reported."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from harness.cli import main
from harness.config import ConfigError, HarnessError, plain
from harness.data import TokenizerSection, open_tokenizer
from harness.model import ModelSection, build_decoder
from harness.settings import Settings
from harness.studies.changes import check_settings
from harness.studies.files import claimed
from harness.studies.selection import training
from harness.studies.selection.analysis import analyse, read_results
from harness.studies.selection.config import SelectionStudySection
from harness.studies.selection.evaluation import ItemScores, item_nats
from harness.studies.selection.grid import cells
from harness.studies.selection.items import read_items
from harness.studies.selection.summary import write_report
from harness.studies.selection.work import decisive_settings, run_cells
from tests.studies.small_study import small_study

RECIPE = {"seen_tokens": 2000, "optimizer": {"learning_rate": 1e-2}, "schedule": {"kind": "constant"}}
CONTINUED = {"continued": {**RECIPE, "seen_tokens": 500}, "base": {**RECIPE, "unique_tokens": 2000}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> SelectionStudySection:
    """From scratch and continued: two arms, of one draw and one seed."""
    config = small_study(tmp_path_factory.mktemp("finished"), **CONTINUED)
    assert run_cells(config) == 4
    return config


def results(config: SelectionStudySection) -> list[dict[str, Any]]:
    """Without what a machine's load decides."""
    return [{key: value for key, value in r.items() if "seconds" not in key} for r in read_results(config)]


def test_every_cell_has_a_result_and_nothing_else_is_left(finished: SelectionStudySection) -> None:
    found = results(finished)
    assert [(r["mode"], r["arm"]) for r in found] == [
        (mode, arm) for mode in ("scratch", "continued") for arm in ("random", "gain")
    ]
    for result in found:
        assert result["seen_tokens"] == {"scratch": 2048, "continued": 512}[result["mode"]]
        assert result["epochs"] == result["seen_tokens"] / result["choice"]["tokens"]
        assert result["target"] == ("shared" if result["arm"] == "random" else "sky")
        assert list(result["items"]) == ["sky"]
        assert len(result["items"]["sky"]["nats"]) == 10
    assert not list((finished.path / "cells").iterdir())
    assert run_cells(finished) == 0


def test_text_of_the_targets_language_helps(finished: SelectionStudySection) -> None:
    row = {(row["mode"], row["arm"]): row for row in analyse(finished)["rows"]}
    for mode in ("scratch", "continued"):
        assert row[mode, "gain"]["in_domain"] == 1.0 > row[mode, "random"]["in_domain"]
        assert row[mode, "gain"]["minus_random"]["high"] < 0
    assert row["continued", "gain"]["training_loss"] < row["scratch", "gain"]["training_loss"]


def test_the_same_again_and_after_an_interruption(
    finished: SelectionStudySection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One cell is cut off at its very end; the rest of the study, and its results, are those of an undisturbed one."""
    config = small_study(tmp_path, **CONTINUED)
    after_training = ItemScores.after_training
    calls = 0

    def cut_off(self: ItemScores, trainer: Any) -> None:
        nonlocal calls
        calls += 1
        after_training(self, trainer)
        if calls == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(ItemScores, "after_training", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run_cells(config)
    assert len(results(config)) == 1
    assert run_cells(config) == 3
    assert results(config) == results(finished)


def test_arms_differ_in_their_text_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arms of a draw and a seed begin with the same weights and order; what they are measured on, no score has seen."""
    config = small_study(tmp_path, draws=2, seeds=2)
    runs: list[dict[str, Any]] = []

    def note(settings: Settings, callbacks: Any) -> None:
        text = Path(settings.data.corpora[0].source[0]).read_text()
        runs.append({"seed": settings.train.seed, "text": text, "items": callbacks[0].items})
        settings.run.path.mkdir()
        (settings.run.path / "metrics.jsonl").write_text('{"loss": 1.0}\n')
        callbacks[0].scores = {name: {"nats": [], "bytes": []} for name in callbacks[0].items}

    monkeypatch.setattr(training, "train", note)
    run_cells(config)
    pairs = list(zip(runs[::2], runs[1::2], strict=True))
    assert [a["seed"] == b["seed"] for a, b in pairs] == [True] * 4
    assert len({a["seed"] for a, _ in pairs}) == 4
    assert len({run["text"] for run in runs}) == 6  # random: of each seed and draw; gain: of each draw
    for run in runs:
        assert run["items"] == {"sky": read_items(config, config.targets[0].evaluation)}


def test_cells_that_choose_alike_are_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twins = [{"name": name, "kind": "dsir", "sampled": False} for name in ("one", "two")]
    other = {"name": "file-type", "kind": "file-type"}
    config = small_study(tmp_path, arms=[{"name": "random", "kind": "random"}, *twins, other])
    trained = []
    train = training.train
    monkeypatch.setattr(training, "train", lambda *arguments: trained.append(1) or train(*arguments))
    run_cells(config)
    _, one, two, other_result = results(config)
    assert len(trained) == 3
    assert "same_as" not in other_result
    assert (two["arm"], two["same_as"]) == ("two", "one")
    assert two["items"] == one["items"]


def test_a_killed_process_lets_go_of_its_cell(tmp_path: Path) -> None:
    hold = f"import fcntl, time; f = open({str(tmp_path / 'cell')!r}, 'a'); fcntl.flock(f, 2); print(1, flush=True)"
    process = subprocess.Popen([sys.executable, "-c", f"{hold}; time.sleep(60)"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    with claimed(tmp_path / "cell") as mine:
        assert not mine
    process.send_signal(signal.SIGKILL)
    process.wait()
    with claimed(tmp_path / "cell") as mine:
        assert mine


def test_a_cell_of_another_process_is_left_to_it(finished: SelectionStudySection, tmp_path: Path) -> None:
    config = small_study(tmp_path)
    first, second = cells(config)
    with claimed(config.path / "locks" / first.name) as mine:
        assert mine
        assert run_cells(config) == 1
    assert second.result_file(config).exists()
    assert not first.result_file(config).exists()


def test_item_nats_are_the_model_s_own() -> None:
    """Against log_softmax of the logits, for items shorter and longer than a window, of bytes beyond ASCII."""
    generator = np.random.default_rng()
    tokenizer = open_tokenizer(TokenizerSection(kind="bytes"))
    section = ModelSection(family="llama", layers=1, hidden_size=16, heads=2, vocab_size=257, init_std=0.5)
    model = build_decoder(section, seed=int(generator.integers(1000)), device="cpu")
    texts = ["a", "ßüø" * 7, "x" * 16, "".join(map(chr, generator.integers(32, 1000, 300)))]
    for text, found in zip(texts, item_nats(model, tokenizer, texts, 16), strict=True):
        ids = list(text.encode())
        expected = 0.0
        for start in range(0, len(ids), 16):
            inputs = [256, *ids][start : start + 16]
            with torch.no_grad():
                chances = model.logits(torch.tensor([inputs]))[0].double().log_softmax(dim=-1)
            wanted = ids[start : start + 16]
            expected -= float(chances[torch.arange(len(wanted)), wanted].sum())
        assert found == pytest.approx(expected, rel=1e-5)


def test_the_order_of_cells_is_balanced(tmp_path: Path) -> None:
    """Any beginning of it has every arm about as often, in the draws in turn; random serves all targets at once."""
    config = small_study(tmp_path, seeds=3, draws=2, **CONTINUED)
    order = cells(config)
    assert [(cell.seed, cell.draw) for cell in order[::4]] == [(s, d) for s in range(3) for d in range(2)]
    assert [(cell.mode, cell.arm, cell.target) for cell in order[:4]] == [
        ("scratch", "random", "shared"),
        ("scratch", "gain", "sky"),
        ("continued", "random", "shared"),
        ("continued", "gain", "sky"),
    ]
    assert len({cell.name for cell in order}) == len(order) == 24


def test_what_is_held_back_waits_for_confirmation(tmp_path: Path) -> None:
    config = small_study(tmp_path)
    assert not any(cell.target == "late" for cell in cells(config))
    confirmed = config.model_copy(update={"confirm": True})
    late = [cell for cell in cells(confirmed) if cell.target == "late"]
    assert [cell.arm for cell in late] == ["random", "gain"]
    assert set(cells(config)) < set(cells(confirmed))


def check(config: SelectionStudySection) -> None:
    check_settings(config.path, decisive_settings(config))


def test_other_settings_are_refused_and_more_arms_are_not(finished: SelectionStudySection) -> None:
    check(finished)
    check(finished.model_copy(update={"arms": finished.arms[:1], "seeds": 9, "workers": 5}))
    check(finished)
    for changed in ({"budget_tokens": 1300}, {"scratch": finished.scratch.model_copy(update={"seen_tokens": 1})}):
        with pytest.raises(HarnessError, match=f"another {next(iter(changed))}"):
            check(finished.model_copy(update=changed))


def test_the_report_says_what_there_is(finished: SelectionStudySection) -> None:
    paths = write_report(finished, analyse(finished))
    assert [path.name for path in paths] == ["report.json", "report.md", "report.html"]
    report = json.loads(paths[0].read_text())
    assert report["cells"] == {"done": 4, "expected": 4}
    nats = read_results(finished)[1]["items"]["sky"]
    rows = [row for row in report["rows"] if (row["mode"], row["arm"]) == ("scratch", "gain")]
    assert rows[0]["bits_per_byte"] == pytest.approx(sum(nats["nats"]) / math.log(2) / sum(nats["bytes"]))
    table = paths[1].read_text().split("## sky, scratch")[1].splitlines()
    assert table[4].startswith(f"| gain | {rows[0]['bits_per_byte']:.4f} | {rows[0]['minus_random']['mean']:+.4f} |")
    assert "minus random" in paths[2].read_text()
    assert str(finished.path) not in paths[0].read_text()


def test_a_part_of_a_study_says_so(finished: SelectionStudySection) -> None:
    larger = finished.model_copy(update={"seeds": 2})
    analysis = analyse(larger)
    assert analysis["cells"] == {"done": 4, "expected": 8}
    assert "not complete" in write_report(larger, analysis)[1].read_text()


def test_the_verbs(finished: SelectionStudySection, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(plain(finished)))
    assert main(["study", "plan", str(file)]) == 0
    assert "scratch: 2 runs of 2,000 tokens: 1,200 unique, 1.7 epochs" in capsys.readouterr().out
    assert main(["study", "status", str(file), "seeds=2"]) == 0
    assert "4 of 8 runs are done" in capsys.readouterr().out
    assert main(["study", "report", str(file)]) == 0
    assert "report.html" in capsys.readouterr().out
    file.write_text("kind: ladders\n")
    assert main(["study", "run", str(file)]) == 2
    said = capsys.readouterr().err
    assert "'ladders' is no kind of study; known: ladder, norm_removal, selection, tokenization" in said


def test_mistakes_in_a_configuration_are_said(tmp_path: Path) -> None:
    random, gain = {"name": "random", "kind": "random"}, {"name": "gain", "kind": "score"}
    for changes, message in (
        ({"arms": [random, gain]}, "`score` belongs to kind score"),
        ({"arms": [random, random]}, "need names of their own"),
        ({"arms": [{"name": "top", "kind": "dsir"}]}, "kind random, not dsir"),
        ({"second_baseline": "ncd"}, "there is no arm 'ncd'"),
        ({"scratch": None}, "nothing to train"),
        ({"continued": RECIPE}, "needs a base"),
    ):
        with pytest.raises(ConfigError, match=message):
            small_study(tmp_path, **changes)
