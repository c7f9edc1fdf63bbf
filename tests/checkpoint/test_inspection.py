"""What is printed of checkpoints, and what pruning by hand does."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.checkpoint import CheckpointError, CheckpointStore, Retention, inspection
from harness.parallel import Fragment
from tests.checkpoint.states import random_tensors, whole_fragments


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "checkpoints", max_file_bytes=700)
    new: dict[str, Any] = {
        "saved_at": "2026-07-14T12:30:45+02:00",
        "validation_loss": 3.25,
        "layout": "tensor 2 x data 3",
        "settings": {"secret": 1},
        "long": list(range(100)),
    }
    store.save(100, whole_fragments(random_tensors(100)), {"kept": [1, 2]})  # as an older harness saved it
    store.save(200, whole_fragments(random_tensors(200)), new)
    store.save(300, whole_fragments(random_tensors(300)), {"saved_at": "soon", "layout": [2], "validation_loss": "3"})
    then = datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC).timestamp()
    os.utime(store.folder / "step-00000100", (then, then))
    return store


def bytes_of(store: CheckpointStore, step: int) -> int:
    return sum(path.stat().st_size for path in (store.folder / f"step-{step:08d}").glob("*.safetensors"))


def damage(store: CheckpointStore, step: int) -> Path:
    """One bit of the last file."""
    path = sorted((store.folder / f"step-{step:08d}").glob("*.safetensors"))[-1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return path


def test_list(store: CheckpointStore) -> None:
    (store.folder / "step-00000400").mkdir()
    rows = json.loads(inspection.list_steps(store, as_json=True))
    assert [row["step"] for row in rows] == [100, 200, 300, 400]
    assert [row["validation_loss"] for row in rows] == [None, 3.25, None, None]
    assert [row["layout"] for row in rows] == [None, "tensor 2 x data 3", None, None]
    assert [row["bytes"] for row in rows] == [*(bytes_of(store, step) for step in (100, 200, 300)), None]
    assert rows[0]["committed"] == "2025-01-02T03:04:05+00:00"
    assert rows[1]["committed"] == "2026-07-14T10:30:45+00:00"
    assert datetime.now(UTC) - datetime.fromisoformat(rows[2]["committed"]) < timedelta(minutes=10)
    assert [row["problem"] for row in rows[:3]] == [None] * 3
    lost = f"{store.folder}/step-00000400/manifest.json: cannot be read (No such file or directory)"
    assert rows[3]["problem"].startswith(lost)

    lines = inspection.list_steps(store).splitlines()
    assert len(lines) == 5
    assert lines[0].split() == ["step", "committed", "(UTC)", "size", "files", "validation", "loss", "layout"]
    assert lines[1].startswith(" 100  2025-01-02 03:04:05  ")
    assert lines[2].split()[:3] == ["200", "2026-07-14", "10:30:45"]
    assert lines[2].endswith("  3.2500  tensor 2 x data 3  whole")
    assert lost in lines[4]
    assert len({line.find("whole") for line in lines[1:4]}) == 1, "aligned"

    nowhere = CheckpointStore(store.folder / "nowhere")
    assert inspection.list_steps(nowhere) == f"{nowhere.folder}: no checkpoints"
    assert inspection.list_steps(nowhere, as_json=True) == "[]"


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1234, "1.23 kB"), (999_600, "1 MB"), (56_700_000, "56.7 MB"),
     (2_147_483_648, "2.15 GB"), (5 * 10**15, "5e+03 TB")],
)  # fmt: skip
def test_sizes(size: int, text: str) -> None:
    assert inspection._size(size) == text


def test_show(store: CheckpointStore) -> None:
    text = inspection.show_step(store, 200)
    facts = {line[2:18].strip(): line[18:] for line in text.split("\n\n")[0].splitlines()[1:]}
    assert facts == {
        "format": "harness-checkpoint 1",
        "step": "200",
        "committed": "2026-07-14 10:30:45 UTC",
        "layout": "tensor 2 x data 3",
        "validation loss": "3.2500",
        "size": f"{inspection._size(bytes_of(store, 200))} in 3 files",
        "tensors": "11, 91 parameters among them",
    }
    assert text.split("state, without the settings:\n")[1].partition("\n\n")[0].splitlines() == [
        '  saved_at: "2026-07-14T12:30:45+02:00"',
        "  validation_loss: 3.25",
        '  layout: "tensor 2 x data 3"',
        f"  long: {list(range(100))!r:.100}... (390 characters)",
    ]
    table = [line.split() for line in text.split("\n\n")[2].splitlines()]
    assert table[0] == ["tensor", "shape", "dtype", "boxes"]
    assert ["master/layers.0.attention.qkv.weight", "12", "x", "7", "float32", "1"] in table
    assert ["step/norm.weight", "scalar", "float32", "1"] in table
    assert ["master/empty", "0", "x", "5", "float32", "0"] in table
    assert len(table) == 12

    whole = json.loads(inspection.show_step(store, 200, as_json=True))
    assert whole["state"]["settings"] == {"secret": 1}
    assert whole["tensors"]["mask/kept"] == {"shape": [3, 2, 5], "dtype": "bool", "boxes": 1}
    assert sum(file["bytes"] for file in whole["files"].values()) == whole["bytes"] == bytes_of(store, 200)
    assert (whole["format"], whole["version"], whole["step"], whole["parameters"]) == ("harness-checkpoint", 1, 200, 91)
    assert whole["folder"] == str(store.folder / "step-00000200")


def test_show_takes_the_newest_that_is_whole(store: CheckpointStore) -> None:
    assert json.loads(inspection.show_step(store, None, as_json=True))["step"] == 300
    (store.folder / "step-00000300" / "manifest.json").unlink()
    assert json.loads(inspection.show_step(store, None, as_json=True))["step"] == 200
    with pytest.raises(CheckpointError, match=r"step-00000300/manifest\.json: cannot be read"):
        inspection.show_step(store, 300)
    with pytest.raises(CheckpointError, match="nowhere: no good checkpoint"):
        inspection.show_step(CheckpointStore(store.folder / "nowhere"), None)


def test_verify(store: CheckpointStore) -> None:
    assert [whole for _, whole in inspection.verify_steps(store)] == [True] * 3
    (line, whole), = inspection.verify_steps(store, 200)  # fmt: skip
    assert (line, whole) == (f"step 200: whole: 3 files, {inspection._size(bytes_of(store, 200))}", True)
    path = damage(store, 200)
    results = list(inspection.verify_steps(store))
    assert [whole for _, whole in results] == [True, False, True]
    assert results[1][0].splitlines() == [
        "step 200: damaged",
        f"  {path}: digest differs from the manifest: the file is damaged",
    ]
    assert [whole for _, whole in inspection.verify_steps(store, 300)] == [True]
    with pytest.raises(CheckpointError, match="has no step 250; steps there: 100, 200, 300"):
        list(inspection.verify_steps(store, 250))
    with pytest.raises(CheckpointError, match="nowhere: no checkpoints"):
        list(inspection.verify_steps(CheckpointStore(store.folder / "nowhere")))


def test_prune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    for step in range(1, 7):
        fragment = Fragment.whole("w", "master", torch.tensor([float(step)]))
        store.save(step * 100, [fragment], {"validation_loss": abs(step - 2.5)})
    (store.folder / "step-00000500" / "tensors-00000.safetensors").unlink()
    (store.folder / ".tmp-step-00000700").mkdir()
    aside = store.folder / ".replaced-step-00000400"
    (store.folder / "step-00000400").rename(aside)  # a kill between the two renames of a second save
    entries = sorted(path.name for path in store.folder.iterdir())
    retention = Retention(1, keep_every_steps=400, keep_best=1)

    text, done = inspection.prune_steps(store, retention, dry_run=True)
    assert done
    assert entries == sorted(path.name for path in store.folder.iterdir()), "a dry run changes nothing"
    lines = text.splitlines()
    assert lines[:4] == [
        "step 100: would be deleted",
        "step 200: would be deleted",
        "step 300: kept: validation loss 0.5000, of the best 1",
        "step 400: kept: a multiple of 400",
    ]
    assert lines[4].startswith(f"step 500: damaged, left alone: {store.folder}/step-00000500/tensors-00000.safetensors")
    assert lines[5] == "step 600: kept: of the newest 1"
    assert [line.partition(": ")[0] for line in lines[6:]] == [".replaced-step-00000400", ".tmp-step-00000700"]
    assert all("would be cleared away" in line for line in lines[6:])

    with monkeypatch.context() as patch:

        def delete(step: int) -> None:
            raise PermissionError(13, "Permission denied", str(store.folder))

        patch.setattr(store, "delete", delete)
        text, done = inspection.prune_steps(store, retention)
    assert not done
    assert text.splitlines()[:2] == ["step 100: could not be deleted", "step 200: could not be deleted"]
    text, done = inspection.prune_steps(store, retention)
    assert done
    assert text.splitlines()[:2] == ["step 100: deleted", "step 200: deleted"]
    assert store.steps() == [300, 400, 500, 600]
    assert [step for step in store.steps() if store.verify(step)] == [500]
    assert sorted(path.name for path in store.folder.iterdir()) == [f"step-{step:08d}" for step in store.steps()]
    assert inspection.prune_steps(CheckpointStore(tmp_path / "no"), retention) == (
        f"{tmp_path}/no: no checkpoints",
        True,
    )
