"""From a section to an initialised decoder."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from harness.parallel import derive_seed

from .config import LossSection, ModelSection
from .decoder import Decoder


def build_decoder(
    section: ModelSection,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    loss: LossSection | None = None,
    recompute: str = "none",
    compile_blocks: bool = False,
) -> Decoder:
    """A decoder in fp32 on `device`, its weights drawn from (seed, name, global shape).

    recompute: none, selective or full activation checkpointing of the blocks.
    """
    with torch.device("meta"):
        model = Decoder(section, loss or LossSection(), recompute)
    model.to_empty(device=device)
    model.tie_head()  # to_empty gives each module a tensor of its own
    initialise(model, section, seed)
    if compile_blocks:
        for block in model.layers:
            block.compile()
    return model


@torch.no_grad()
def initialise(model: Decoder, section: ModelSection, seed: int) -> None:
    """Fill every parameter of `model`, one at a time: gains 1, biases and padded rows 0, the rest normal."""
    real_rows = model.real_rows()
    for name, weight in model.named_parameters():
        std = init_std(name, section)
        if std is None:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        rows = real_rows.get(name, len(weight))
        weight[rows:] = 0.0
        weight[:rows] = draw_normal(seed, name, (rows, *weight.shape[1:]), std)


def draw_normal(seed: int, name: str, shape: tuple[int, ...], std: float) -> Tensor:
    """The initial value of a global parameter: fp32 on the CPU, the same on every layout and device."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "weights", name, *shape))
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)


def init_std(name: str, section: ModelSection) -> float | None:
    """The standard deviation that a parameter starts with; None for gains and biases."""
    if name.endswith("bias") or "norm" in name:
        return None
    if name.startswith("position_embedding"):
        return section.position_init_std
    if section.scale_residual_init and name.endswith(("attention.output.weight", "mlp.down.weight")):
        return section.init_std / math.sqrt(2 * section.layers)
    return section.init_std
