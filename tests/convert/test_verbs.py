"""The command line: a trained run to Hugging Face and on from there, with its tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.cli import load_settings, main
from harness.config import dump_yaml
from harness.train import train
from tests.convert.library import save_library_model
from tests.small_run import small_settings

TOKENIZERS: dict[str, dict[str, Any]] = {
    "bytes": {"kind": "bytes"},
    "sentencepiece": {"kind": "sentencepiece", "vocab_size": 330},
}
MODELS: dict[str, dict[str, Any]] = {
    "bytes": {"family": "gpt2", "layers": 2, "hidden_size": 32, "heads": 2, "max_positions": 64},
    "sentencepiece": {"family": "llama", "layers": 2, "hidden_size": 32, "heads": 4, "kv_heads": 2},
}


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module", params=TOKENIZERS)
def run(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    settings = small_settings(
        folder, data={"tokenizer": TOKENIZERS[request.param]}, model=MODELS[request.param], train={"steps": 40}
    )
    return train(settings).folder


def test_out_used_and_in_again(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "convert", run, tmp_path / "hf")
    assert "result and result in transformers: largest difference" in text
    record = json.loads((tmp_path / "hf" / "conversion.json").read_text())
    assert record["source"] == {"format": "harness", "path": str(run / "checkpoints/step-00000040"), "step": 40}
    assert record["tokenizer"]

    # The same evaluation and the same text as of the run itself.
    config = load_settings(str(run), [])
    another = "bytes" if config.data.tokenizer.kind == "sentencepiece" else "sentencepiece"  # the model's own counts
    text = yaml.safe_load(dump_yaml(config))["data"] | {"tokenizer": {"kind": another}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"data": text}))
    expected = json.loads(said(capsys, "evaluate", run))
    found = json.loads(
        said(capsys, "evaluate", tmp_path / "hf", "--data", tmp_path / "mine.yaml", f"data.folder={tmp_path}/prepared")
    )
    assert found.pop("run") == str(tmp_path / "hf")
    assert found.pop("step") is None
    assert found == {key: value for key, value in expected.items() if key in found}
    assert found["tokens"] > 100
    options = ["generate.prompt=the of", "generate.temperature=0", "generate.max_tokens=20"]
    ours = said(capsys, "generate", run, *options)
    assert said(capsys, "generate", tmp_path / "hf", *options) == ours

    # transformers, with the tokenizer that lies beside the weights.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    prompt = tokenizer("the of", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        tokens = model.generate(**prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert tokenizer.decode(tokens[0], skip_special_tokens=True, clean_up_tokenization_spaces=False) == ours[:-1]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id is not None

    # And back, to a run that is the same model with the same tokenizer.
    said(capsys, "convert", tmp_path / "hf", tmp_path / "back")
    assert said(capsys, "generate", tmp_path / "back", *options) == ours
    assert "whole" in said(capsys, "checkpoint", "verify", tmp_path / "back")
    section = yaml.safe_load(said(capsys, "config", tmp_path / "hf"))["model"]
    (tmp_path / "next.yaml").write_text(yaml.safe_dump(yaml.safe_load(dump_yaml(config)) | {"model": section}))
    for start in ("hf", "back"):
        place = (f"run.folder={tmp_path}/runs", f"run.name={start}")
        said(capsys, "train", tmp_path / "next.yaml", f"train.init_from={tmp_path / start}", "train.steps=4", *place)
    first, second = ((tmp_path / "runs" / start / "metrics.jsonl").read_text().splitlines() for start in ("hf", "back"))
    assert [json.loads(line)["loss"] for line in first] == [json.loads(line)["loss"] for line in second]
    assert json.loads(first[0])["loss"] < 4.0, "it begins with what was learned"


def test_a_run_begins_from_any_name_of_another(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run, tmp_path / "from")
    step = max((tmp_path / "from" / "checkpoints").glob("step-*"))
    names = {"run": str(tmp_path / "from"), "all": str(step.parent), "here": "."}
    monkeypatch.chdir(step)
    losses = []
    for name, start in names.items():
        place = (f"run.folder={tmp_path}/runs", f"run.name={name}", f"data.folder={tmp_path}/prepared")
        said(capsys, "train", run, f"train.init_from={start}", "train.steps=2", "schedule.warmup_steps=1", *place)
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert all(series == losses[0] for series in losses)


@pytest.mark.parametrize("form", ["megatron", "transformer-lens"])
def test_folders_of_every_format_are_used(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    said(capsys, "convert", run, tmp_path / "there", "--to", form)
    expected = json.loads(said(capsys, "evaluate", run))
    data = ("--data", run, f"data.folder={tmp_path}/prepared")
    assert json.loads(said(capsys, "evaluate", tmp_path / "there", *data))["loss"] == expected["loss"]
    options = ["generate.prompt=the of", "generate.temperature=0", "generate.max_tokens=20"]
    assert said(capsys, "generate", tmp_path / "there", *options) == said(capsys, "generate", run, *options)
    assert yaml.safe_load(said(capsys, "config", tmp_path / "there"))["model"]["layers"] == 2


def test_another_tokenizer_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "convert", run, tmp_path / "hf", "--no-proof")
    other = {"kind": "bytes"} if "sentencepiece" in str(run) else {"kind": "sentencepiece", "vocab_size": 300}
    config = yaml.safe_load(dump_yaml(load_settings(str(run), [])))
    config["data"] |= {"tokenizer": other, "folder": str(tmp_path / "prepared")}
    config["model"] |= yaml.safe_load(said(capsys, "config", tmp_path / "hf"))["model"]
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(config))
    arguments = ["train", str(tmp_path / "other.yaml"), f"train.init_from={tmp_path / 'hf'}", "run.name=other"]
    assert main([*arguments, f"run.folder={tmp_path}"]) == 2
    line = "its weights do not fit (data.tokenizer: another tokenizer)"
    if other["kind"] == "sentencepiece":  # which has more tokens than the model
        line = "model.vocab_size: 257 is less than the tokenizer's 300"
    assert line in capsys.readouterr().err

    shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "tokenizer")
    shutil.copytree(tmp_path / "prepared" / "tokenizer", tmp_path / "copy" / "tokenizer")
    assert main(["generate", str(tmp_path / "copy")]) == 2
    assert "tokenizer: not the tokenizer that the checkpoint was trained with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["evaluate", "hf"], "hf: no run's configuration lies there, so no text to evaluate on: say --data FILE.yaml"),
        (["evaluate", "hf", "--data", "nothing.yaml"], "nothing.yaml: no such file"),
        (["evaluate", "hf", "--data", "no_data.yaml"], "no_data.yaml: has no `data` section"),
        (["evaluate", "hf", "train.steps=3"], "unknown key"),
        (["generate", "hf"], "hf: has no tokenizer; put its tokenizer.json or tokenizer.model there"),
        (["generate", "."], ".: no model that is known here"),
        (["convert", "hf", "hf"], "hf: is there already; choose another name"),
        (["convert", "hf", "new", "--to", "onnx"], "--to onnx: is none of harness, huggingface"),
        (["convert", "nowhere", "new"], "nowhere: no such folder"),
    ],
)
def test_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    line: str,
) -> None:
    save_library_model(tmp_path / "hf", "llama-gqa")
    (tmp_path / "no_data.yaml").write_text("train: {steps: 3}\n")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()  # the library's progress bars
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert line in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "new").exists()
