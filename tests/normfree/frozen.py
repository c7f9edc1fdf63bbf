"""Models whose norms are frozen, with weights, gains, biases and sigmas all random, for tests."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from harness.model import Decoder, ModelSection, SiteState, build_decoder, norm_sites
from tests.convert.sources import DecoderSource

_SMALL = {"layers": 2, "vocab_size": 97, "max_positions": 30}
KINDS: dict[str, ModelSection] = {
    "gpt2": ModelSection(family="gpt2", hidden_size=48, heads=3, **_SMALL),
    "gpt2-untied-narrow-heads": ModelSection(
        family="gpt2", hidden_size=40, heads=3, head_size=6, mlp_size=70, tied_head=False, **_SMALL
    ),
    "gpt2-no-bias": ModelSection(family="gpt2", hidden_size=48, heads=3, bias=False, **_SMALL),
    "gpt2-no-qkv-bias": ModelSection(family="gpt2", hidden_size=48, heads=4, qkv_bias=False, **_SMALL),
    "layernorm-rope-gqa-qk-norm": ModelSection(
        family="gpt2", hidden_size=40, heads=6, kv_heads=2, head_size=10, positions="rope", qk_norm=True, **_SMALL
    ),
    "layernorm-swiglu": ModelSection(hidden_size=48, heads=4, norm="layernorm", mlp_size=100, **_SMALL),
    "llama": ModelSection(hidden_size=48, heads=3, mlp_size=100, **_SMALL),
    "llama-biases": ModelSection(hidden_size=48, heads=4, kv_heads=2, bias=True, **_SMALL),
    "llama-gqa-tied-wide-heads": ModelSection(
        hidden_size=60, heads=6, kv_heads=3, head_size=24, tied_head=True, **_SMALL
    ),
    "llama-qk-norm-mqa": ModelSection(hidden_size=64, heads=4, kv_heads=1, qk_norm=True, **_SMALL),
    "qwen2": ModelSection(hidden_size=64, heads=4, kv_heads=2, qkv_bias=True, **_SMALL),
}  # fmt: skip


def fresh() -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(os.urandom(4), "little"))


def frozen_states(section: ModelSection, generator: torch.Generator) -> dict[str, SiteState]:
    """Every site frozen, at a sigma of its own from 0.5 to 3."""
    return {
        site.name: SiteState(1.0, 0.5 + 2.5 * torch.rand((), generator=generator).item())
        for site in norm_sites(section)
    }


class FrozenSource(DecoderSource):
    """A source in memory as a finished removal run would be."""

    def __init__(self, section: ModelSection, generator: torch.Generator | None = None) -> None:
        generator = generator or fresh()
        super().__init__(section, seed=int(torch.randint(1 << 30, (), generator=generator)))
        for name, weight in self.weights.items():  # larger than they begin with, so that nothing is lost in the stream
            if weight.dim() == 1:
                weight += 0.4 * torch.randn(weight.shape, generator=generator)
            elif "layers" in name:
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
        self.norm_states: dict[str, SiteState] = frozen_states(section, generator)


def frozen_decoder(section: ModelSection, weights: Mapping[str, Tensor], states: Mapping[str, SiteState]) -> Decoder:
    """The model itself, with its norms frozen, in float64."""
    model = build_decoder(section, seed=0, switchable_norms=True).double().eval()
    assert model.norm_states is not None
    model.norm_states.set(states)
    return fill(model, weights)


def fill(model: Decoder, weights: Mapping[str, Tensor]) -> Decoder:
    placements = model.placements()
    assert placements.keys() == weights.keys()
    with torch.no_grad():
        for name, place in placements.items():
            assert place.global_shape == tuple(weights[name].shape), name
            model.get_parameter(name)[place.slices] = weights[name].to(model.get_parameter(name).dtype)
    return model


def residual_inputs(section: ModelSection, generator: torch.Generator) -> Tensor:
    assert section.vocab_size is not None
    return torch.randint(section.vocab_size, (3, 25), generator=generator)
