"""The named places of a decoder that other rooms read, replace or switch, without reaching into its code.

An activation site is a `Tap`: the identity until a replacement function is installed. Names:
    layers.{i}.residual_before   residual stream entering block i
    layers.{i}.q, .k, .v         projected queries, keys, values, (batch, sequence, heads, head width), before q/k
    norm and rotation layers.{i}.attention_out     what attention adds to the residual stream
    layers.{i}.residual_between  residual stream between attention and MLP
    layers.{i}.mlp_out           what the MLP adds
    layers.{i}.residual_after    residual stream leaving block i
    final_residual               residual stream entering the final norm
A norm site is a place where a norm's output is used, (layer, kind): `qk` and `v`, both served by the attention norm;
`q_norm` and `k_norm`, where heads have norms of their own; `mlp`; and `final`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from .config import ModelSection

Replacement = Callable[[Tensor], Tensor]


class Tap(nn.Module):
    """A named place: the identity, unless `replacement` is set. Holds no weights and leaves no trace in a
    checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.replacement: Replacement | None = None

    def forward(self, activation: Tensor) -> Tensor:
        return activation if self.replacement is None else self.replacement(activation)


@dataclass(frozen=True)
class NormSite:
    """A place where a norm's output is used; a module may serve two."""

    layer: int | None
    """None for the final norm."""
    kind: str
    """qk, v, q_norm, k_norm, mlp or final."""

    @property
    def name(self) -> str:
        return self.kind if self.layer is None else f"layers.{self.layer}.{self.kind}"

    @property
    def module(self) -> str:
        """The name of the module that serves it."""
        modules = {"qk": "attention_norm", "v": "attention_norm", "mlp": "mlp_norm", "final": "final_norm"}
        place = modules.get(self.kind, f"attention.{self.kind}")
        return place if self.layer is None else f"layers.{self.layer}.{place}"


def tap_sites(model: nn.Module) -> dict[str, Tap]:
    """Every activation site of `model` by name, in the order of the forward pass within a block."""
    taps = {name: module for name, module in model.named_modules() if isinstance(module, Tap)}
    return {name.replace(".attention.", "."): tap for name, tap in taps.items()}


def norm_sites(section: ModelSection) -> list[NormSite]:
    """Every norm site of the decoder that a section describes, in the order of the forward pass; none where it is
    free of norms."""
    if section.norm_free:
        return []
    kinds = ["qk", "v", *(["q_norm", "k_norm"] if section.qk_norm else []), "mlp"]
    return [*(NormSite(layer, kind) for layer in range(section.layers) for kind in kinds), NormSite(None, "final")]


@contextmanager
def spliced(model: nn.Module, replacements: Mapping[str, Replacement]) -> Iterator[None]:
    """Within the block, the activation at each named site is what its function returns for it.

    Raises ValueError for a name that is no site, or one that is replaced already.
    """
    taps = tap_sites(model)
    for name in replacements:
        if name not in taps:
            raise ValueError(f"{name!r} is no site of this model; sites are {', '.join(taps)}")
        if taps[name].replacement is not None:
            raise ValueError(f"site {name} is replaced already; one replacement at a time")
    try:
        for name, replacement in replacements.items():
            taps[name].replacement = replacement
        yield
    finally:
        for name in replacements:
            taps[name].replacement = None
