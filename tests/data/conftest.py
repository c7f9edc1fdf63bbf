"""Configurations and small prepared corpora that the data tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.data import DataSection, Prepared, prepare
from harness.text import Progress
from tests.data.helpers import write_jsonl


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"random seed {seed}")  # shown when the test fails
    return np.random.default_rng(seed)


@pytest.fixture
def quiet() -> Progress:
    return Progress(quiet=True)


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., DataSection]:
    """A configuration with raw bytes in tmp_path/prepared; keywords replace fields."""

    def make(**fields: Any) -> DataSection:
        defaults: dict[str, Any] = {
            "folder": str(tmp_path / "prepared"),
            "tokenizer": {"kind": "bytes"},
            "sequence_length": 16,
            "validation_share": 0.2,
            "test_share": 0.1,
            "workers": 1,
        }
        return DataSection.model_validate(defaults | fields)

    return make


@pytest.fixture
def make_prepared(
    tmp_path: Path, make_config: Callable[..., DataSection], quiet: Progress
) -> Callable[..., tuple[DataSection, Prepared]]:
    """Corpora of the given documents, prepared."""

    def make(corpora: dict[str, list[str]], weights: dict[str, float] | None = None, **fields: Any) -> Any:
        entries = []
        for name, documents in corpora.items():
            path = write_jsonl(tmp_path / "text" / f"{name}.jsonl", documents)
            entries.append({"name": name, "source": str(path), "weight": weights[name] if weights else None})
        config = make_config(corpora=entries, **fields)
        return config, prepare(config, progress=quiet)

    return make
