"""A disk that is really full: a small file system in memory, filled at every moment of a save."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from harness.checkpoint import CannotWriteError, CheckpointStore, Pruner, Retention
from tests.checkpoint.states import assert_same_bits, blank_like, whole_fragments

MEGABYTES = 12


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """The root of a file system of its own."""
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", "harness-test", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def tensors(step: int) -> dict[str, torch.Tensor]:
    """1.5 MB in three files."""
    generator = torch.Generator().manual_seed(step)
    return {f"master/{name}": torch.randn(125_000, generator=generator) for name in "abc"}


def fill(disk: Path, free: int = 0) -> None:
    """Somebody else takes all of the disk but `free` bytes."""
    with (disk / "filler").open("ab") as file:
        while (left := shutil.disk_usage(disk).free - free) > 0:
            file.write(bytes(min(left, 1 << 20)))
            file.flush()


def is_whole(store: CheckpointStore, step: int, saved_as: int) -> None:
    assert store.verify(step) == []
    loaded = blank_like(tensors(saved_as))
    assert store.load(step, whole_fragments(loaded)) == {"saved_as": saved_as}
    assert_same_bits(loaded, tensors(saved_as))


@pytest.mark.parametrize("step", [200, 100], ids=["a new step", "the same step again"])
def test_filled_while_a_checkpoint_is_written(disk: Path, step: int) -> None:
    """At every piece that is written, and before the manifest: what was there stays, and the next try succeeds."""
    store = CheckpointStore(disk / "checkpoints", max_file_bytes=400_000)
    store.save(100, whole_fragments(tensors(100)), {"saved_as": 100})
    pieces: list[int] = []
    store.save(300, whole_fragments(tensors(300)), {"saved_as": 300}, pieces.append)
    store.delete(300)
    assert len(pieces) >= 6
    for moment in range(1, len(pieces) + 1):
        for free in (0, 4096) if moment == len(pieces) else (0,):
            count = 0

            def fill_at(_: int, moment: int = moment, free: int = free) -> None:
                nonlocal count
                count += 1
                if count == moment:
                    fill(disk, free)

            with pytest.raises(CannotWriteError) as caught:
                store.save(step, whole_fragments(tensors(2)), {"saved_as": 2, "padding": "x" * 10_000}, fill_at)
            line = str(caught.value)
            assert line.isprintable()
            assert f"{store.folder}/step-{step:08d}: cannot be written: " in line
            assert "No space left on device" in line
            assert line.endswith("; earlier steps are untouched")
            assert count >= moment
            assert os.listdir(store.folder) == ["step-00000100"]
            assert store.latest_good(verify=True) == 100
            is_whole(store, 100, 100)
            (disk / "filler").unlink()
    store.save(step, whole_fragments(tensors(2)), {"saved_as": 2})
    is_whole(store, step, 2)
    assert store.latest_good(verify=True) == step


def test_too_little_room_is_seen_beforehand(disk: Path) -> None:
    store = CheckpointStore(disk / "checkpoints")
    store.save(100, whole_fragments(tensors(100)), {"saved_as": 100})
    fill(disk, free=1_600_000)
    touched: list[int] = []
    for _ in range(3):
        with pytest.raises(CannotWriteError, match=r"step-00000200: .* MB are needed and 1\.6 MB are free"):
            store.save(200, whole_fragments(tensors(200)), {"saved_as": 200}, touched.append)
    assert touched == []
    assert os.listdir(store.folder) == ["step-00000100"]
    is_whole(store, 100, 100)
    (disk / "filler").unlink()
    store.save(200, whole_fragments(tensors(200)), {"saved_as": 200})
    is_whole(store, 200, 200)


def test_pruning_and_cleaning_need_no_room(disk: Path) -> None:
    store = CheckpointStore(disk / "checkpoints")
    for step in (100, 200, 300):
        store.save(step, whole_fragments(tensors(step)), {"saved_as": step})
    (store.folder / ".tmp-step-00000400").mkdir()
    fill(disk)
    assert store.clean() == [".tmp-step-00000400"]
    assert Pruner(store, Retention(1)).prune() == [100, 200]
    is_whole(store, 300, 300)
    store.save(400, whole_fragments(tensors(400)), {"saved_as": 400})
    is_whole(store, 400, 400)
