"""A run small enough for tests: random text with structure, byte tokens, a model of two narrow layers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from harness.config import validate
from harness.settings import Settings

WORDS = ("the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "with", "was", "on", "be", "by", "at", "from")


def write_corpus(folder: Path, documents: int = 60, seed: int = 0, longest: int = 60) -> Path:
    """Text files of random words, of very different lengths."""
    folder.mkdir(parents=True)
    generator = random.Random(seed)
    for number in range(documents):
        words = generator.choices(WORDS, k=generator.randint(1, longest))
        (folder / f"{number:03}.txt").write_text(" ".join(words) + f"\n{seed} {number}\n")
    return folder


def small_settings(folder: Path, **sections: dict[str, Any]) -> Settings:
    """Settings of a run under `folder`, on a corpus that is written there; `sections` are merged over the defaults."""
    if not (folder / "text").exists():
        write_corpus(folder / "text" / "first", seed=1)
        write_corpus(folder / "text" / "second", documents=30, seed=2, longest=200)
    values: dict[str, Any] = {
        "run": {"name": "small", "folder": str(folder / "runs"), "tensorboard": False, "log_every_steps": 1000},
        "parallel": {"device": "cpu"},
        "data": {
            "folder": str(folder / "prepared"),
            "corpora": [
                {"name": name, "source": [str(folder / "text" / name)], "suffixes": [".txt"], "weight": weight}
                for name, weight in (("first", 0.3), ("second", 0.7))
            ],
            "tokenizer": {"kind": "bytes"},
            "sequence_length": 32,
            "validation_share": 0.15,
            "test_share": 0.1,
            "workers": 1,
        },
        "model": {"family": "llama", "layers": 2, "hidden_size": 32, "heads": 2, "max_positions": 32},
        "optimizer": {"learning_rate": 3e-3},
        "schedule": {"kind": "cosine", "warmup_steps": 3},
        "train": {"steps": 8, "global_batch_size": 4, "micro_batch_size": 2},
        "validation": {"every_steps": None, "samples": 8, "batch_size": 4},
        "checkpoint": {"every_steps": None},
    }
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes}
    return validate(Settings, values, "small_settings")
