"""What `evaluate` and `generate` can be told of a model that no run's configuration lies beside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.config import ConfigError, Section, load_config, read_yaml
from harness.convert import ModelSource, open_source
from harness.data import DataSection
from harness.evaluate import EvaluateSection, GenerateSection
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


def load_model_folder(target: Path, overrides: Sequence[str], data_from: Path | None) -> ModelFolderSettings:
    """The settings for a Hugging Face folder, or another without config.yaml. `data_from`: a YAML file whose `data`
    section is meant. Raises HarnessError, also where the folder has no model."""
    source = open_source(target)  # first, so that a wrong folder is what is said
    values: dict[str, Any] = {}
    if data_from is not None:
        section = read_yaml(data_from, str(data_from)).get("data")
        if not isinstance(section, dict):
            raise ConfigError(f"{data_from}: has no `data` section")
        values["data"] = section
    if data_from is not None or any(override.lstrip().startswith("data.") for override in overrides):
        values.setdefault("data", {})["tokenizer"] = _tokenizer_values(source)
    return load_config(ModelFolderSettings, values, overrides, label=str(data_from or target))


def _tokenizer_values(source: ModelSource) -> dict[str, Any]:
    tokenizer = source.tokenizer
    if tokenizer is None or tokenizer.file_name is None:
        return {"kind": "bytes"}  # without a tokenizer the model is refused when it is restored
    path = source.tokenizer_folder / tokenizer.file_name
    return {"kind": tokenizer.kind, "path": str(path), "end_of_text": tokenizer.end_of_text}
