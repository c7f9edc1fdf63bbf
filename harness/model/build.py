"""From a section to an initialised decoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from harness.parallel import Fragment, Placement, TensorParallel, derive_seed

from .config import LossSection, ModelSection
from .decoder import Decoder
from .norm_states import NormStates


def build_decoder(
    section: ModelSection,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    loss: LossSection | None = None,
    recompute: str = "none",
    compile_blocks: bool = False,
    tensor: TensorParallel | None = None,
    divide: Callable[[nn.Module], None] | None = None,
    switchable_norms: bool = False,
) -> Decoder:
    """A decoder in fp32 on `device`, its weights drawn from (seed, name, global shape): of those, this
    tensor-parallel rank's part.

    recompute: none, selective or full activation checkpointing of the blocks. `divide` is called with each block, and
    each other part, as soon as its weights are drawn, and may leave less of it here (ZeRO stage 3), so that no rank
    ever holds all. switchable_norms: with norms that norm removal can take away, through `Decoder.norm_states`.
    """
    with torch.device("meta"):
        model = Decoder(section, loss or LossSection(), recompute, tensor, switchable_norms=switchable_norms)
    placements = model.placements()
    for prefix, part in model.parts():
        if part is model.head and section.tied_head:
            model.tie_head()  # to_empty would give it a tensor of its own
        else:
            part.to_empty(device=device)
            for name, weight in part.named_parameters(prefix):
                initialise(name, weight, placements[name], section, seed)
        if divide is not None:
            divide(part)
    if switchable_norms:
        model.norm_states = NormStates(model, section, model.tensor, torch.device(device))
    if compile_blocks:
        for block in model.layers:
            block.compile()
    return model


@torch.no_grad()
def initialise(name: str, weight: Tensor, place: Placement, section: ModelSection, seed: int) -> None:
    """Fill a parameter: gains 1, biases and padded rows 0, the rest normal."""
    weight[place.shape[0] :] = 0.0
    weight[: place.shape[0]] = initial_value(name, section, seed, place.global_shape)[place.slices]


@torch.no_grad()
def initialise_masters(fragments: Iterable[Fragment], section: ModelSection, seed: int) -> None:
    """The same values into master weights: for an engine whose masters were taken from weights cast to bf16."""
    name, whole = "", torch.empty(0)
    for fragment in fragments:
        if fragment.kind != "master":
            continue
        if fragment.name != name:  # an engine yields a parameter's boxes one after the other
            name, whole = fragment.name, initial_value(fragment.name, section, seed, fragment.global_shape)
        fragment.tensor.copy_(whole[fragment.slices])


def initial_value(name: str, section: ModelSection, seed: int, shape: tuple[int, ...]) -> Tensor:
    """The initial value of a global parameter: fp32 on the CPU, the same on every layout and device."""
    std = init_std(name, section)
    if std is None:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
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
