"""What a tokenizer that was trained in a prepared folder came out of, and whether it is the one wanted now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness.config import HarnessError
from harness.text import SourceFile

from .config import DataSection
from .record import compare_settings, text_settings
from .tokenizer import Tokenizer

TRAINING = "training.json"


def training_settings(config: DataSection, files: dict[str, list[SourceFile]] | None) -> dict[str, Any]:
    """What a tokenizer that is trained here comes out of; without `files`, its settings alone."""
    settings: dict[str, Any] = {
        "vocab_size": config.tokenizer.vocab_size,
        "model_type": config.tokenizer.model_type,
        "max_training_bytes": config.tokenizer.max_training_bytes,
        "corpora": [corpus.name for corpus in config.corpora],
    }
    for corpus in config.corpora:
        settings[f"corpora.{corpus.name}"] = text_settings(config, corpus)
        if files is not None:
            sizes = [file.size for file in files[corpus.name]]
            settings[f"corpora.{corpus.name}.source"] = {"files": len(sizes), "bytes": sum(sizes)}
    return settings


def find_tokenizer_difference(
    folder: Path,
    found: Tokenizer,
    wanted: Tokenizer | None,
    config: DataSection,
    files: dict[str, list[SourceFile]] | None,
) -> str | None:
    """In words, how the tokenizer in a prepared folder differs from the configured one; None where it does not.

    `wanted` is the tokenizer that the configuration names; None where one is trained here.
    """
    if wanted is not None:
        if wanted.fingerprint == found.fingerprint:
            return None
        return (
            f"the tokenizer is another one (there: {found.kind}, {found.vocab_size} tokens; "
            f"configured: {wanted.kind}, {wanted.vocab_size} tokens)"
        )
    try:
        then: dict[str, Any] = json.loads((folder / TRAINING).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"the {found.kind} tokenizer was not trained here, and tokenizer.path is null"
    except ValueError:
        raise HarnessError(f"{folder / TRAINING}: is damaged; delete {folder.parent} and tokenize again") from None
    now = training_settings(config, files)
    if files is None:
        then = {key: value for key, value in then.items() if key in now or not key.endswith(".source")}
    difference = compare_settings(then, now)
    if difference is None:
        return None
    return (
        f"the tokenizer was trained on something else: {difference} "
        f"(to keep it, set data.tokenizer.path={folder / 'tokenizer.model'})"
    )
