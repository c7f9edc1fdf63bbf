"""A chosen corpus in training: what is read, and what the run and its checkpoints say of it."""

from __future__ import annotations

import json
import random
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from harness.checkpoint import CheckpointStore
from harness.config import ConfigError, HarnessError, validate
from harness.data import CorpusSection, DataSection, open_prepared, prepare, text_bytes
from harness.selection import SelectSettings, select
from harness.settings import Settings
from harness.text import Progress
from harness.train import train
from tests.small_run import WORDS, small_settings


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished selection, whose text lies in two fields."""
    folder = tmp_path_factory.mktemp("selected")
    generator = random.Random()

    def row(alike: bool) -> dict[str, Any]:
        words = WORDS if alike else [f"{word}{generator.randint(0, 999)}" for word in WORDS]
        return {"title": generator.choice(words), "body": " ".join(generator.choices(words, k=60))}

    for name in ("a", "b"):
        rows = [row(generator.random() < 0.5) for _ in range(200)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "target.txt").write_text(" ".join(generator.choices(WORDS, k=100)))
    fields = {"source": [str(folder / "?.jsonl")], "text_field": ["title", "body"], "joined_by": ": "}
    values = {
        "pool": fields,
        "targets": [{"name": "words", "source": [str(folder / "target.txt")]}],
        "budget": {"documents": 80},
        "output": {"folder": str(folder / "out")},
        "workers": 1,
    }
    select(validate(SelectSettings, values, "test"), progress=Progress(quiet=True))
    return folder / "out"


def texts(folder: Path) -> list[str]:
    lines = [line for file in sorted((folder / "chosen").iterdir()) for line in file.read_text().splitlines()]
    return [f"{row['title']}: {row['body']}" for row in map(json.loads, lines)]


def test_a_run_reads_the_chosen_and_keeps_where_they_came_from(chosen: Path, tmp_path: Path) -> None:
    values = small_settings(tmp_path).model_dump()
    values["data"]["corpora"] = [{"name": "mine", "selection": str(chosen)}]
    values["train"]["steps"] = 3
    settings = validate(Settings, values, "test")
    result = train(settings)
    prepared = open_prepared(settings.data)
    parts = [text for split in ("train", "validation", "test") for text in text_bytes(prepared, "mine", split)]
    assert sorted(part.decode().rstrip("\0") for part in parts) == sorted(texts(chosen))
    record = json.loads((chosen / "selection.json").read_text())
    store = CheckpointStore(result.folder / "checkpoints")
    step = store.latest_good()
    assert step == 3
    of_run = json.loads((result.folder / "environment.json").read_text())["selections"]
    assert store.read_state(step)["selections"] == of_run
    kept = of_run["mine"]
    assert kept["sha256"] == sha256((chosen / "selection.json").read_bytes()).hexdigest()
    assert kept["documents"] == 80
    for key in ("method", "targets", "budget", "thresholds", "harness"):
        assert kept[key] == record[key]
    assert kept["targets"][0]["name"] == "words"
    assert kept["files"] == {
        name: sha256((chosen / "chosen" / name).read_bytes()).hexdigest() for name in ("a.jsonl", "b.jsonl")
    }


def test_what_was_tokenized_needs_the_selection_no_more(chosen: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(chosen, tmp_path / "selection")
    values = small_settings(tmp_path).data.model_dump()
    values["corpora"] = [{"name": "mine", "selection": str(moved)}]
    section = validate(DataSection, values, "test")
    before = prepare(section, progress=Progress(quiet=True))
    assert before.selections["mine"]["documents"] == 80
    shutil.rmtree(moved)
    assert open_prepared(section).selections == before.selections
    with pytest.raises(HarnessError, match=r"corpus 'mine': selection .*/selection: has no selection.json"):
        prepare(section, progress=Progress(quiet=True))


def test_changed_files_are_refused(chosen: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(chosen, tmp_path / "selection")
    corpus = CorpusSection(name="mine", selection=str(moved))
    section = small_settings(tmp_path).data.model_copy(update={"corpora": (corpus,)})
    file = moved / "chosen" / "a.jsonl"
    content = file.read_bytes()
    file.write_bytes(content.replace(b"the", b"eht", 1))
    with pytest.raises(HarnessError, match=r"chosen/a.jsonl was changed since; select again"):
        prepare(section, progress=Progress(quiet=True))
    file.unlink()
    with pytest.raises(HarnessError, match=r"chosen/a.jsonl is gone; select again"):
        prepare(section, progress=Progress(quiet=True))
    (moved / "selection.json").write_text("{")
    with pytest.raises(HarnessError, match=r"selection.json: is damaged"):
        prepare(section, progress=Progress(quiet=True))


def test_one_kind_of_text_a_corpus() -> None:
    with pytest.raises(ConfigError, match="`source` and `selection` exclude each other: keep one"):
        validate(CorpusSection, {"name": "x", "source": ["a"], "selection": "b"}, "test")
