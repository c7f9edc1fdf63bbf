"""States to save, and boxes to cut them into."""

from __future__ import annotations

import numpy as np
import torch

from harness.parallel import Fragment


def random_tensors(seed: int) -> dict[str, torch.Tensor]:
    """Tensors of a small model and optimizer, every stored dtype and odd shape among them, by "kind/name"."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "master/layers.0.attention.qkv.weight": normal(12, 7),
        "master/norm.weight": normal(7),
        "exp_avg/layers.0.attention.qkv.weight": normal(12, 7).double() * 1e-300,
        "exp_avg_sq/layers.0.attention.qkv.weight": normal(12, 7).square().bfloat16(),
        "exp_avg_sq/norm.weight": normal(7).half(),
        "step/norm.weight": torch.tensor(float(seed)),
        "rng/cpu": torch.randint(0, 256, (33,), generator=generator, dtype=torch.uint8),
        "count/seen": torch.tensor(2**62 + seed),
        "mask/kept": normal(3, 2, 5) > 0,
        "master/empty": torch.zeros(0, 5),
        "special/values": torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45]),
    }


def whole_fragments(tensors: dict[str, torch.Tensor]) -> list[Fragment]:
    return [Fragment.whole(key.partition("/")[2], key.partition("/")[0], tensor) for key, tensor in tensors.items()]


def blank_like(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: torch.full_like(tensor, 1 if tensor.dtype == torch.bool else 77) for key, tensor in tensors.items()}


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert tensor.dtype == right[key].dtype
        assert tensor.shape == right[key].shape, key
        both = [each.contiguous().reshape(-1).view(torch.uint8).numpy() for each in (tensor, right[key])]
        np.testing.assert_array_equal(*both, err_msg=key)


def random_tiling(rng: np.random.Generator, shape: tuple[int, ...], cuts: int) -> list[tuple[slice, ...]]:
    """Boxes that tile `shape`, made by cutting a random box in two, `cuts` times."""
    boxes = [tuple(slice(0, size) for size in shape)]
    for _ in range(cuts):
        box = list(boxes.pop(int(rng.integers(len(boxes)))))
        dimension = int(rng.integers(len(shape)))
        start, stop = box[dimension].start, box[dimension].stop
        middle = int(rng.integers(start, stop + 1))
        for part in (slice(start, middle), slice(middle, stop)):
            box[dimension] = part
            boxes.append(tuple(box))
    return boxes


def fragment_at(name: str, kind: str, tensor: torch.Tensor, box: tuple[slice, ...]) -> Fragment:
    """The fragment of `tensor` in `box`: a view of it."""
    return Fragment(name, kind, tuple(tensor.shape), tuple(cut.start for cut in box), tensor[box])
