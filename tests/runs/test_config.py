"""The run section."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.config import ConfigError, dump_yaml, validate
from harness.runs import RunSection


def test_defaults_and_path() -> None:
    section = RunSection()
    assert (section.name, section.folder, section.tensorboard, section.log_every_steps) == ("run", "runs", True, 10)
    assert validate(RunSection, {"name": "a", "folder": "/x/y"}, "test").path == Path("/x/y/a")
    assert all(field.description for field in RunSection.model_fields.values())
    assert "Write TensorBoard event files" in dump_yaml(section)


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "", "a\\b", "  "])
def test_a_name_is_no_path(name: str) -> None:
    with pytest.raises(ConfigError, match=r"name: .*is not a plain name"):
        validate(RunSection, {"name": name}, "test")


def test_a_cadence_is_positive() -> None:
    with pytest.raises(ConfigError, match="log_every_steps"):
        validate(RunSection, {"log_every_steps": 0}, "test")
