"""What a stranger is told: bad configurations, checkpoints, runs and prompts, and the one line that each one gets.

Corpora and tokenizers have a table of their own in tests/data/test_bad_input.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.cli import main
from harness.config import dump_yaml
from harness.train import train
from tests.small_run import small_settings


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run and its YAML; tests that damage it work on a copy."""
    folder = tmp_path_factory.mktemp("finished")
    settings = small_settings(folder, train={"steps": 4}, checkpoint={"every_steps": 2})
    (folder / "small.yaml").write_text(dump_yaml(settings, comments=False))
    train(settings)
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The line that the command gets, after `harness VERB: error: `."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith(f"harness {arguments[0]}: error: ")]
    assert len(errors) == 1
    assert lines[-1] == errors[0], "the error is the last line"
    return errors[0].removeprefix(f"harness {arguments[0]}: error: ")


# Overrides on a good configuration, and what the line says.
SETTINGS: list[tuple[str, str]] = [
    ("train.stesp=3", "command line: train.stesp: unknown key; did you mean train.steps?"),
    ("learning_rate=3", "command line: learning_rate: unknown key; did you mean optimizer.learning_rate?"),
    ("optimizer.learning_rate=fast", "command line: optimizer.learning_rate: expected a number, got 'fast'"),
    ("optimizer.beta2=1.5", "command line: optimizer.beta2: input should be less than 1, got 1.5"),
    ("train.steps=ten", "command line: train.steps: expected a whole number, got 'ten'"),
    ("train.compile=maybe", "command line: train.compile: expected true or false, got 'maybe'"),
    ("train.precision=fp61", "command line: train.precision: 'fp61' is not one of fp32, bf16"),
    ("train.micro_batch_size=3", "{b}: train: micro_batch_size 3 does not divide global_batch_size 4"),
    ("schedule.warmup_steps=9", "{b}: schedule.warmup_steps 9 is more than train.steps 4; lower it"),
    ("schedule.decay_steps=2", "{b}: schedule: decay_steps belongs to kind wsd; kind cosine has no separate decay"),
    ("schedule.kind=cosin", "command line: schedule.kind: 'cosin' is not one of constant, linear, cosine, wsd; did"),
    ("model.max_positions=16", "{b}: data.sequence_length 32 is more than model.max_positions 16"),
    ("model.hidden_size=33", "{b}: model: hidden_size 33 is not a multiple of heads 2; change one or set head_size"),
    ("model.kv_heads=3", "{b}: model: kv_heads 3 does not divide heads 2"),
    ("model.head_size=15", "{b}: model: rope turns pairs, and heads of width 15 are odd; change heads or"),
    ("model.shape=gpt2-125m", "{b}: model: shape: there is no shape 'gpt2-125m'; did you mean gpt2-124m? (known: "),
    ("model.family=lama", "command line: model.family: 'lama' is not one of gpt2, llama; did you mean llama?"),
    ("model.vocab_size=100", "model.vocab_size: 100 is less than the tokenizer's 257; leave it null, or"),
    ("parallel.device=gpu", "command line: parallel.device: 'gpu' is not one of auto, cpu, cuda"),
    ("run.name=a/b", "command line: run.name: 'a/b' is not a plain name"),
    ("data.corpora.2.weight=1", "command line: 'data.corpora.2.weight=1': data.corpora is a list of 2; number its"),
    ("steps", "command line: 'steps' is not of the form section.key=value"),
    ("train.resume=never", "{t}/runs/small: holds a run already; choose another run.name, delete it, or"),
    ("model.layers=3", "{t}/runs/small/checkpoints: step 4 cannot be resumed: model.layers: was 2, now 3. Set"),
    ("model={shape: gpt2-124m, layers: 2, hidden_size: 32, heads: 2}", "command line: model: shape: gpt2-124m has"),
    ("optimizer.learning_rate=.inf", "command line: optimizer.learning_rate: input should be a finite number, got inf"),
    ("data.validation_share=0", "{t}/prepared/first: validation_share was 0.15, it is 0.0 now; set data.folder to"),
    ("parallel.sequence_parallel=true", "{b}: parallel: sequence_parallel divides among tensor-parallel ranks: set"),
    ("train.steps=3", "{t}/runs/small/checkpoints: step 4 cannot be resumed: train.steps: 3 is less than the 4 steps"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "line"), SETTINGS)
def test_bad_settings(finished: Path, capsys: pytest.CaptureFixture[str], override: str, line: str) -> None:
    file = finished / "small.yaml"
    said = refused(capsys, "train", str(file), override)
    assert said.startswith(line.replace("{b}", f"{file} and command line").replace("{t}", str(finished)))


def test_several_processes_and_no_gpu(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(finished / "small.yaml")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert refused(capsys, "train", file, "parallel.device=cuda").startswith("parallel.device: cuda is asked for, but")
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = refused(capsys, "generate", file)
    assert said.endswith(": runs on one process; start it without torchrun, whatever layout trained the model")
    said = refused(capsys, "train", file, "parallel.tensor=3")
    assert "parallel.tensor: a job of size 2 does not divide into groups of 3; start a multiple of 3" in said


def test_layouts_that_do_not_fit(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dry = ("train", str(finished / "small.yaml"), "train.dry_run=true", "dry_run.processes=6")
    assert refused(capsys, *dry, "parallel.tensor=3").startswith(
        "parallel.tensor: 3 does not divide model.heads 2; choose a divisor of both kv_heads 2 and mlp_size 96, or"
    )
    assert refused(capsys, *dry, "train.micro_batch_size=null").startswith(
        "train.global_batch_size: 4 sequences do not divide into micro-batches of 1 on 6 data-parallel ranks; make it a"
    )
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert refused(capsys, "train", dry[1], "run.name=zero", "parallel.zero_stage=2").startswith(
        "parallel.zero_stage: stages 1 to 3 need DeepSpeed, which is not installed; pip install 'harness[zero]', or set"
    )


TARGETS: list[tuple[tuple[str, ...], str]] = [
    (
        ("train", "quickstrat"),
        "quickstrat: no such file, and no embedded configuration of that name; did you mean quick",
    ),
    (("train", "{t}/gone.yaml"), "{t}/gone.yaml: no such file"),
    (("train", "{t}"), "{t}: a folder without config.yaml; give a YAML file or a run folder"),
    (("train", "{t}/runs/small/checkpoints/step-00000002"), "{t}/runs/small/checkpoints/step-00000002: a run goes on"),
    (("config", "{t}/small.yaml", "data.corpora=[]"), "command line: data.corpora: is empty: name at least one corpus"),
    (("generate", "{t}/runs/small", "generate.step=3"), "{t}/runs/small/checkpoints: has no step 3; steps there: 2, 4"),
    (
        ("generate", "{t}/runs/small", "generate.top_p=0"),
        "command line: generate.top_p: input should be greater than 0",
    ),
    (
        ("evaluate", "{t}/small.yaml", "run.name=gone"),
        "{t}/runs/gone: no such folder; give a run or checkpoint folder",
    ),
    (("evaluate", "{t}/runs/small", "evaluate.split=valid"), "command line: evaluate.split: 'valid' is not one of "),
    (
        ("generate", "{t}/runs/small", "generate.prompt=" + "long " * 20),
        "generate.prompt: 100 tokens leave no room in the model's 32 positions; shorten the prompt",
    ),
]


@pytest.mark.parametrize(("arguments", "line"), TARGETS)
def test_bad_targets(finished: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], line: str) -> None:
    said = refused(capsys, *(argument.replace("{t}", str(finished)) for argument in arguments))
    assert said.startswith(line.replace("{t}", str(finished)))


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)


# What is done to the only checkpoint of a run, and what evaluating that run says.
DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    ("tensors-00000.safetensors", flip_byte, "tensors-00000.safetensors: digest differs from the manifest"),
    ("tensors-00000.safetensors", Path.unlink, "tensors-00000.safetensors: cannot be read (No such file"),
    ("manifest.json", flip_byte, "manifest.json: digest differs from manifest.sha256"),
    ("manifest.sha256", Path.unlink, "manifest.sha256: cannot be read (No such file"),
]


@pytest.mark.parametrize(("name", "damage", "line"), DAMAGE)
def test_damaged_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: Callable[[Path], object], line: str
) -> None:
    folder = train(small_settings(tmp_path, train={"steps": 1}, schedule={"warmup_steps": 0})).folder
    damage(folder / "checkpoints" / "step-00000001" / name)
    said = refused(capsys, "generate", str(folder))
    assert line in said
    assert "; there is no earlier step" in said
    assert str(folder) in said


def test_a_swapped_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train(small_settings(tmp_path, train={"steps": 1}, schedule={"warmup_steps": 0})).folder
    (folder / "tokenizer").rename(tmp_path / "set-aside")
    assert "tokenizer" in refused(capsys, "generate", str(folder))
