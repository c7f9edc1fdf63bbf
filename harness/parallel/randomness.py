"""Seeds that follow from what they are for, and dropout masks that follow from seeds."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*parts: object) -> int:
    """A seed below 2**63 from anything printable: the same parts give the same seed on every machine and rank."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class ForwardSeeds:
    """One seed a forward pass in training, from which every dropout of that pass derives its own.

    The sequence is started from (seed, step, data rank), so it is the same on all tensor-parallel ranks, on a resume,
    and in the recomputation of activations, and it depends on no other use of random numbers.
    """

    def __init__(self) -> None:
        self._generator = torch.Generator()
        self._generator.manual_seed(torch.initial_seed())

    def start(self, seed: int) -> None:
        self._generator.manual_seed(seed)

    def draw(self) -> int:
        return int(torch.randint(2**62, (), generator=self._generator))


def seed_dropout(device: torch.device, forward_seed: int, place: str, tensor_rank: int | None) -> None:
    """Start the device's default generator for one dropout of a forward pass.

    `tensor_rank` where the tensor-parallel ranks drop elements of *different* activations (their heads, their tokens);
    None where they hold the same ones and must draw the same mask.
    """
    if torch.compiler.is_compiling():
        torch.compiler.disable(_seed_dropout)(device, forward_seed, place, tensor_rank)
    else:
        _seed_dropout(device, forward_seed, place, tensor_rank)


def _seed_dropout(device: torch.device, forward_seed: int, place: str, tensor_rank: int | None) -> None:
    seed = derive_seed(forward_seed, place, "all" if tensor_rank is None else tensor_rank)
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        torch.cuda.default_generators[index].manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
