"""Megatron-core's names of our parameters, and the ways in which its versions and settings vary them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace

from harness.checkpoint import Box
from harness.model import ModelSection

from .links import Link, Links
from .rules import Row, Rule, Share, link_names, same, whole
from .source import decoder_shapes

LAYER = "decoder.layers.{i}."
EMBEDDING = "embedding.word_embeddings.weight"
POSITIONS = "embedding.position_embeddings.weight"
OUTPUT = "output_layer.weight"
VOCABULARY = (EMBEDDING, OUTPUT)
"""Tensors that may have more rows than there are tokens."""
_FC1 = LAYER + "mlp.linear_fc1."
_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
"""Norms as Transformer Engine has them, in one with the matrix that follows; and apart. Models of either kind are saved
under the former names since version 0.4."""
_NUMBERED = re.compile(r"decoder\.layers\.(\d+)\.")
_STACKED = re.compile(r"decoder\.layers\.(?!\d)")


@dataclass(frozen=True)
class Naming:
    """How a checkpoint names what all have."""

    stacked: bool = True
    """One tensor holds what all layers have of a kind, with a leading dimension; else each layer's stands alone."""
    halves_apart: bool = False
    """The gate and the other half of SwiGLU's first matrix are two tensors."""
    norms_apart: bool = False
    prefix: str = ""

    @classmethod
    def of(cls, names: Set[str]) -> Naming:
        """That of a checkpoint in which tensors of these names lie."""
        prefix = next((name.removesuffix(EMBEDDING) for name in sorted(names) if name.endswith(EMBEDDING)), "")
        return cls(
            any(_STACKED.match(name.removeprefix(prefix)) for name in names),
            any(name.endswith(".linear_fc1.weight_w") for name in names),
            any(f".{apart}weight" in name for name in names for apart in _NORMS.values()),
            prefix,
        )


def link_megatron(section: ModelSection, naming: Naming) -> Links:
    """The links of one model, whose vocabulary has no padding."""
    links = link_names(_rows(section, naming.halves_apart), section, decoder_shapes(section))
    return Links(_vary(link, section, naming) for each in links.by_ours.values() for link in each)


def _vary(link: Link, section: ModelSection, naming: Naming) -> Link:
    name, box = link.theirs, link.their_box
    if naming.norms_apart:
        for joined, apart in _NORMS.items():
            name = name.replace(joined, apart)
    number = _NUMBERED.match(name)
    if naming.stacked and number is not None:
        name = name.replace(number[0], "decoder.layers.")
        box = Box((int(number[1]), *box.offsets), (1, *box.shape))
    return replace(link, theirs=naming.prefix + name, their_box=box)


def _second_half(section: ModelSection, shape: tuple[int, ...]) -> Iterator[Share]:
    """theirs has twice the rows of ours, and these are the latter ones."""
    yield whole(shape), Box((shape[0], *(0 for _ in shape[1:])), shape), False


def _rows(section: ModelSection, halves_apart: bool) -> Iterator[Row]:
    yield Row("token_embedding.weight", EMBEDDING)
    yield Row("position_embedding.weight", POSITIONS)
    gated = section.activation == "swiglu"
    up: Rule = _second_half if gated and not halves_apart else same
    first, second = ("_w", "_v") if gated and halves_apart else ("", "")
    for kind in ("weight", "bias"):
        yield Row(f"layers.{{i}}.attention_norm.{kind}", f"{LAYER}self_attention.linear_qkv.layer_norm_{kind}")
        # The rows of both are grouped by key-value head: its queries, its key, its value.
        yield Row(f"layers.{{i}}.attention.qkv.{kind}", f"{LAYER}self_attention.linear_qkv.{kind}")
        yield Row(f"layers.{{i}}.attention.output.{kind}", f"{LAYER}self_attention.linear_proj.{kind}")
        yield Row(f"layers.{{i}}.mlp_norm.{kind}", f"{_FC1}layer_norm_{kind}")
        yield Row(f"layers.{{i}}.mlp.gate.{kind}", f"{_FC1}{kind}{first}")
        yield Row(f"layers.{{i}}.mlp.up.{kind}", f"{_FC1}{kind}{second}", up)
        yield Row(f"layers.{{i}}.mlp.down.{kind}", f"{LAYER}mlp.linear_fc2.{kind}")
        yield Row(f"final_norm.{kind}", f"decoder.final_layernorm.{kind}")
    for part in "qk":
        yield Row(f"layers.{{i}}.attention.{part}_norm.weight", f"{LAYER}self_attention.{part}_layernorm.weight")
    yield Row("head.weight", OUTPUT)
