"""Real corpora come back byte for byte. Reads $HARNESS_TEST_DATA; skipped, with the reason, where it is not set."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import zstandard

from harness.config import validate
from harness.data import DataSection, prepare, text_bytes
from harness.data.splits import SPLITS
from harness.text import Progress

pytestmark = pytest.mark.needs_data


def real_file(name: str) -> Path:
    folder = os.environ.get("HARNESS_TEST_DATA")
    if not folder:
        pytest.skip("HARNESS_TEST_DATA names no folder of corpora")
    path = Path(folder) / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


def documents_of(path: Path) -> list[bytes]:
    if path.suffix != ".zst":
        return [path.read_bytes()]
    with path.open("rb") as stream:
        lines = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(stream), encoding="utf-8")
        return [json.loads(line)["text"].encode() for line in lines]


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("name", ["tinyshakespeare/input.txt", "corpus/validation.jsonl.zst", "wikitext2/valid.txt"])
def test_every_document_comes_back(name: str, kind: str, tmp_path: Path) -> None:
    path = real_file(name)
    values: dict[str, Any] = {
        "folder": str(tmp_path / "prepared"),
        "corpora": [{"name": "real", "source": [str(path)]}],
        "tokenizer": {"kind": kind, "vocab_size": 1000},
        # One document must be a training document for a tokenizer to learn from it.
        "validation_share": 0.1 if path.suffix == ".zst" else 0.0,
        "test_share": 0.0,
    }
    prepared = prepare(validate(DataSection, values, "test"), progress=Progress(quiet=True))
    splits = {split: list(text_bytes(prepared, "real", split)) for split in SPLITS}
    assert Counter(document for split in splits.values() for document in split) == Counter(documents_of(path))
    for split, documents in splits.items():
        part = prepared.split("real", split)
        assert (part.documents, part.bytes) == (len(documents), sum(map(len, documents)))
    assert not {*splits["train"]} & {*splits["validation"]}
