"""Files of tensors, against the safetensors library."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.checkpoint.tensor_file import read_tensor, tensor_starts, write_tensor_file


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(4), "little"))
    numbers = torch.randn(7, 9, generator=generator)
    tensors = {
        "transposed": numbers.T,
        "one element of every second": numbers[0, 3:4].expand(1)[::2],
        "strided single": torch.randn(3, 2, generator=generator)[:1, 1],
        "half": numbers.bfloat16(),
        "flags": numbers > 0,
        "scalar": torch.tensor(3, dtype=torch.int64),
        "nothing": torch.empty(0, 4),
        "large": torch.randn(3 << 20, generator=generator),  # several pieces, hashed on the side
    }
    sizes: list[int] = []
    stored = write_tensor_file(tmp_path / "t.safetensors", tensors, sizes.append)
    content = (tmp_path / "t.safetensors").read_bytes()
    assert (stored.bytes, stored.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert sum(sizes) == len(content)
    loaded = load_file(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)


def test_what_the_library_writes_is_read_in_place(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(5, 3), "b": torch.randn(4).double(), "scalar": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "t.safetensors", metadata={"format": "pt"})
    descriptor = os.open(tmp_path / "t.safetensors", os.O_RDONLY)
    try:
        starts = tensor_starts(descriptor)
        assert starts.keys() == tensors.keys()
        for name, tensor in tensors.items():
            into = torch.zeros_like(tensor)
            read_tensor(descriptor, starts[name], into)
            assert torch.equal(into, tensor)
        with pytest.raises(OSError, match="ends before"):
            read_tensor(descriptor, (tmp_path / "t.safetensors").stat().st_size - 8, torch.zeros(3))
    finally:
        os.close(descriptor)
