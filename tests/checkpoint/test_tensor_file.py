"""Files of tensors, against the safetensors library."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from harness.checkpoint.tensor_file import write_tensor_file


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


def test_tensors_are_fetched_one_at_a_time(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(5, 3), "a": torch.randn(4).double(), "scalar": torch.tensor(2, dtype=torch.int16)}
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    asked: list[str] = []

    def fetch(name: str) -> torch.Tensor:
        asked.append(name)
        return tensors[name].clone()

    write_tensor_file(tmp_path / "fetched.safetensors", shapes, fetch=fetch, metadata={"format": "pt"})
    assert sorted(asked) == sorted(tensors)
    with safe_open(tmp_path / "fetched.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    loaded = load_file(tmp_path / "fetched.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
