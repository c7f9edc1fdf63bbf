"""Parts of tensors in files that the safetensors library wrote."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from harness.checkpoint import Box, CheckpointError, TensorFile, tensor_reader

SHAPES = {"vector": (11,), "matrix": (13, 7), "cube": (3, 5, 4), "row": (1, 9), "single": (1, 1, 1), "scalar": ()}


def random_box(shape: tuple[int, ...], generator: random.Random) -> Box:
    starts = [generator.randrange(size) for size in shape]
    sizes = [generator.randint(1, size - start) for start, size in zip(starts, shape, strict=True)]
    return Box(tuple(starts), tuple(sizes))


@pytest.mark.parametrize("block_bytes", [1, 40, 1 << 20])
def test_any_boxes_into_any_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    generator = random.Random(seed)
    monkeypatch.setattr(tensor_reader, "_BLOCK_BYTES", block_bytes)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        tensors = {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}
        save_file(tensors, tmp_path / "t.safetensors", metadata={"format": "pt"})
        with TensorFile(tmp_path / "t.safetensors") as file:
            assert {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()} == {
                name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
            }
            for name, tensor in tensors.items():
                boxes = [random_box(tuple(tensor.shape), generator) for _ in range(generator.randint(1, 4))]
                targets = [torch.full(box.shape, 7.0, dtype=torch.float32) for box in boxes]
                # A transposed view of wider memory, as one that belongs to another format's tensor.
                wide = [torch.full((*box.shape[::-1], 2), 7.0, dtype=dtype)[..., 0] for box in boxes]
                views = [one.permute(tuple(reversed(range(one.dim())))) for one in wide]
                file.read(name, list(zip(boxes, targets, strict=True)))
                file.read(name, list(zip(boxes, views, strict=True)))
                for box, target, view in zip(boxes, targets, views, strict=True):
                    assert torch.equal(target, tensor[box.slices].float()), (seed, name, box)
                    assert torch.equal(view, tensor[box.slices]), (seed, name, box)


def test_no_more_is_read_than_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"w": torch.randn(64, 32)}, tmp_path / "t.safetensors")
    read = 0
    real = os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal read
        count = real(descriptor, buffers, offset)
        read += count
        return count

    with TensorFile(tmp_path / "t.safetensors") as file:
        assert file.entries
        monkeypatch.setattr(os, "preadv", counted)
        file.read("w", [(Box((8, 0), (16, 32)), torch.empty(16, 32))])
        assert read == 16 * 32 * 4, "rows"
        read = 0
        file.read("w", [(Box((0, 8), (64, 8)), torch.empty(64, 8))])
        assert read == 64 * 8 * 4, "columns"
        read = 0
        file.read("w", [(Box((0, 8 * part), (64, 8)), torch.empty(64, 8)) for part in range(4)])
        assert read == 64 * 32 * 4, "all columns, once"
        read = 0
        file.read("w", [(Box((0, 31 * part), (64, 1)), torch.empty(64, 1)) for part in range(2)])
        assert read == 64 * 2 * 4, "the first and the last, and nothing between"


def test_truncated_or_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"w": torch.randn(64, 32)}, path)
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:20], b"", b"PK\x03\x04" + whole):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"t\.safetensors: is not a safetensors file"):
            TensorFile(path)
    with pytest.raises(CheckpointError, match=r"nowhere: is not a safetensors file"):
        TensorFile(tmp_path / "nowhere")


def test_a_file_that_shrinks_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"w": torch.randn(64, 32)}, path)
    with TensorFile(path) as file:
        assert file.entries
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(CheckpointError, match=r"t\.safetensors: cannot be read: it ends before byte"):
            file.read("w", [(Box((0, 0), (64, 32)), torch.empty(64, 32))])
