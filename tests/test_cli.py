"""The command line: fast to start, complete in what it says, and the same for files, folders and embedded names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harness.cli import VERBS, load_settings, main
from harness.config import ConfigError, dump_yaml, field_names, sections_in
from harness.settings import Settings

HEAVY = {"torch", "megatron", "numpy", "transformers", "deepspeed", "tensorboard", "sentencepiece", "pyarrow"}


@pytest.mark.parametrize("program", ["import harness", "from harness.cli import main; main(['--version'])"])
def test_nothing_heavy_is_imported_to_start(program: str) -> None:
    code = f"import sys\ntry:\n    {program}\nexcept SystemExit:\n    pass\nprint(sorted(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    modules = {name.strip("'").split(".")[0] for name in printed.splitlines()[-1].strip("[]").split(", ")}
    assert "harness" in modules
    assert not modules & HEAVY


def test_help_names_every_verb() -> None:
    command = [sys.executable, "-m", "harness", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(verb in text for verb in VERBS)


def test_every_field_is_documented() -> None:
    def undocumented(section: type) -> list[str]:
        missing = [
            f"{section.__name__}.{name}" for name, field in section.model_fields.items() if not field.description
        ]
        below = [inner for field in section.model_fields.values() for inner in sections_in(field.annotation)]
        return missing + [line for inner in below for line in undocumented(inner)]

    assert not undocumented(Settings)
    assert len(list(field_names(Settings))) > 80


def test_config_prints_what_reads_back_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "quickstart", "train.steps=600", "optimizer.learning_rate=1e-3"]) == 0
    text = capsys.readouterr().out
    file = tmp_path / "resolved.yaml"
    file.write_text(text)
    settings = load_settings(str(file), [])
    assert settings == load_settings("quickstart", ["train.steps=600", "optimizer.learning_rate=1e-3"])
    assert dump_yaml(settings) == text
    assert "# The peak of the schedule." in text


def test_named_shapes_are_filled_in_and_can_be_changed() -> None:
    settings = load_settings("quickstart", ["model.shape=gpt2-355m", "model.layers=3", "data.sequence_length=64"])
    model = settings.model
    assert (model.layers, model.hidden_size, model.heads, model.positions, model.tied_head) == (
        3, 1024, 16, "learned", True,
    )  # fmt: skip
    assert (model.norm, model.activation, model.max_positions) == ("layernorm", "gelu", 1024)


def test_doctor_says_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("python", "torch", "megatron-core", "cpu", "cuda", "triton", "deepspeed", "c++", "sbatch"):
        assert word in text


def test_a_resolved_file_names_no_shape_and_takes_none_that_it_contradicts(tmp_path: Path) -> None:
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_yaml(load_settings("quickstart", [])))
    assert load_settings(str(resolved), []).model.shape is None
    with pytest.raises(ConfigError, match="shape: gpt2-124m has layers 12, hidden_size 768, heads 12, but layers 4"):
        load_settings(str(resolved), ["model.shape=gpt2-124m"])
