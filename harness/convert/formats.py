"""The formats that are known: how each is recognised, opened and written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from harness.checkpoint import StoredFile
from harness.config import HarnessError
from harness.model import ModelSection

from .harness_run import RunSource, is_run, write_run
from .huggingface import HuggingFaceSource, is_huggingface, write_huggingface
from .megatron import MegatronSource, is_megatron, write_megatron
from .source import ModelSource
from .transformer_lens import TransformerLensSource, is_transformer_lens, write_transformer_lens


@dataclass(frozen=True)
class Format:
    """One format that models are read from and written to."""

    key: str
    """What --to calls it."""
    name: str
    """What people call it."""
    description: str
    open: Callable[[Path], ModelSource]
    recognise: Callable[[Path], bool]
    write: Callable[[Path, ModelSource, torch.dtype], dict[str, StoredFile]]
    """Into an empty folder, with weights in a dtype; sizes and digests of the files of weights."""


FORMATS = (
    Format("harness", RunSource.format, "a run or checkpoint folder", RunSource, is_run, write_run),
    Format(
        "huggingface",
        HuggingFaceSource.format,
        "a Hugging Face folder",
        HuggingFaceSource,
        is_huggingface,
        write_huggingface,
    ),
    Format(
        "transformer-lens",
        TransformerLensSource.format,
        "a folder with a HookedTransformer's state",
        TransformerLensSource,
        is_transformer_lens,
        write_transformer_lens,
    ),
    Format(
        "megatron", MegatronSource.format, "a Megatron-core checkpoint", MegatronSource, is_megatron, write_megatron
    ),
)


def open_source(path: Path, *, step: int | None = None, section: ModelSection | None = None) -> ModelSource:
    """The model in a folder, whatever wrote it. `step` chooses among a run's checkpoints; `section` says what the model
    is where the folder does not, which is so of Megatron-core's.

    Raises HarnessError where there is none that is known, or it is damaged.
    """
    if is_run(path):
        if section is not None:
            raise HarnessError(f"{path}: says itself what its model is; leave --model out")
        return RunSource(path, step)
    if not path.is_dir():
        raise HarnessError(f"{path}: " + ("not a folder" if path.exists() else "no such folder") + _give())
    found = next((each for each in FORMATS if each.recognise(path)), None)
    if found is None:
        raise HarnessError(f"{path}: no model that is known here" + _give())
    if step is not None:
        raise HarnessError(f"{path}: has no steps to choose from; leave step out")
    if section is None:
        return found.open(path)
    if found.key != "megatron":
        raise HarnessError(f"{path}: says itself what its model is; leave --model out")
    return MegatronSource(path, section)


def _give() -> str:
    return "; give " + ", ".join(each.description for each in FORMATS)
