"""Sources of models that lie nowhere but in memory, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from harness.convert import ModelSource
from harness.data import Tokenizer
from harness.model import Decoder, ModelSection, build_decoder
from harness.parallel import Fragment


class DecoderSource(ModelSource):
    """A decoder's weights, every one of them random: norms, biases and learned positions too."""

    format = "memory"
    path = Path("memory")
    tokenizer: Tokenizer | None = None

    def __init__(self, section: ModelSection, seed: int = 0) -> None:
        self.section = section
        self.decoder: Decoder = build_decoder(section, seed=seed).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in self.decoder.parameters():  # far from where they start, so that none of them can be left out
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
        self.weights = {
            name: self.decoder.get_parameter(name).detach()[place.slices]
            for name, place in self.decoder.placements().items()
        }

    def read(self, fragments: Sequence[Fragment]) -> None:
        for fragment in fragments:
            assert fragment.kind == "master"
            weight = self.weights[fragment.name]
            assert tuple(fragment.global_shape) == tuple(weight.shape)
            slices = tuple(
                slice(start, start + size) for start, size in zip(fragment.offsets, fragment.tensor.shape, strict=True)
            )
            fragment.tensor.copy_(weight[slices])


def read_all(source: ModelSource, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Every weight of a source, whole."""
    fragments = [Fragment.whole(name, "master", torch.empty(shape)) for name, shape in shapes.items()]
    source.read(fragments)
    return {fragment.name: fragment.tensor for fragment in fragments}
