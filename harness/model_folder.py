"""What `evaluate` and `generate` can be told of a model that no run's configuration lies beside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.config import ConfigError, Section, load_config, read_yaml
from harness.convert import ModelSource, open_source
from harness.data import DataSection
from harness.evaluate import EvaluateSection, GenerateSection
from harness.model import ModelSection
from harness.parallel import ParallelSection


class ModelFolderSettings(Section):
    """The sections of a configuration that do not train."""

    parallel: ParallelSection = ParallelSection()
    """The device."""
    data: DataSection | None = None
    """Text to evaluate on. Its tokenizer is the model's own."""
    evaluate: EvaluateSection = EvaluateSection()
    """`harness evaluate`."""
    generate: GenerateSection = GenerateSection()
    """`harness generate`."""


class ModelOnly(Section):
    """The part of a run's configuration that begins with a folder's weights which the folder decides."""

    model: ModelSection
    """The decoder."""

    @classmethod
    def of(cls, folder: Path) -> ModelOnly:
        """The section of the model in a folder. Raises HarnessError where there is none."""
        return cls(model=open_source(folder).section)

    @classmethod
    def read(cls, file: Path) -> ModelSection:
        """The `model` section of a YAML file. Raises ConfigError."""
        return load_config(cls, {"model": _section(file, "model")}, label=str(file)).model


def load_model_folder(target: Path, overrides: Sequence[str], data_from: Path | None) -> ModelFolderSettings:
    """The settings for a Hugging Face folder, or another without config.yaml. `data_from`: a YAML file whose `data`
    section is meant. Raises HarnessError, also where the folder has no model."""
    source = open_source(target)  # first, so that a wrong folder is what is said
    values: dict[str, Any] = {}
    if data_from is not None:
        values["data"] = _section(data_from, "data")
    if data_from is not None or any(override.lstrip().startswith("data.") for override in overrides):
        values.setdefault("data", {})["tokenizer"] = _tokenizer_values(source)
    return load_config(ModelFolderSettings, values, overrides, label=str(data_from or target))


def _section(file: Path, name: str) -> dict[str, Any]:
    values = read_yaml(file, str(file)).get(name)
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: has no `{name}` section")
    return values


def _tokenizer_values(source: ModelSource) -> dict[str, Any]:
    tokenizer = source.tokenizer
    if tokenizer is None or tokenizer.file_name is None:
        return {"kind": "bytes"}  # without a tokenizer the model is refused when it is restored
    path = source.tokenizer_folder / tokenizer.file_name
    return {"kind": tokenizer.kind, "path": str(path), "end_of_text": tokenizer.end_of_text}
