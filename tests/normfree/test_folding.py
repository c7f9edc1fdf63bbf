"""Folding: the same function of the tokens as the frozen model, without a norm left in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.convert import decoder_shapes, streamed_logits
from harness.model import Decoder, SiteState, build_decoder
from harness.normfree import FoldedSource, Folding, folded_section
from harness.parallel import Fragment
from tests.convert.refusals import refusal
from tests.convert.sources import read_all
from tests.normfree.frozen import KINDS, FrozenSource, fill, fresh, frozen_decoder, residual_inputs


def folded_weights(folding: Folding, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor in float64, in pieces of odd sizes."""
    found = {}
    for name, shape in decoder_shapes(folding.section).items():
        if folding.changes(name):
            pieces = [folding.rows(name, row, min(row + 37, shape[0])) for row in range(0, shape[0], 37)]
            found[name] = torch.cat(pieces)
        else:
            found[name] = weights[name]
    return found


def both(kind: str) -> tuple[Decoder, Decoder, Tensor]:
    """The frozen model and the folded one in float64, and tokens."""
    generator, section = fresh(), KINDS[kind]
    source = FrozenSource(section, generator)
    weights = {name: weight.double() for name, weight in source.weights.items()}
    for weight in weights.values():  # not only what fp32 holds
        weight *= 1 + 1e-9 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    frozen = frozen_decoder(section, weights, source.norm_states)
    folding = Folding(section, source.norm_states, lambda name, start, stop: weights[name][start:stop])
    assert folding.section == folded_section(section)
    empty = build_decoder(folding.section, seed=1).double().eval()
    return frozen, fill(empty, folded_weights(folding, weights)), residual_inputs(section, generator)


@pytest.mark.parametrize("kind", KINDS)
def test_float64(kind: str) -> None:
    frozen, folded, tokens = both(kind)
    norms = [name for name, _ in folded.named_parameters() if "norm" in name]
    assert all(name.startswith("final_norm") for name in norms)
    with torch.no_grad():
        expected, found = frozen.hidden_states(tokens), folded.hidden_states(tokens)
        assert found.dtype == torch.float64
        assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()
        assert frozen.norm_states is not None
        for site, state in dict(frozen.norm_states.states).items():  # what is compared does depend on every one
            frozen.norm_states.set({site: SiteState()})
            assert (frozen.hidden_states(tokens) - expected).abs().max() > 1e-6 * expected.abs().max(), site
            frozen.norm_states.set({site: state})


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_in_fp32_any_part_of_any_tensor(kind: str) -> None:
    generator = fresh()
    frozen = FrozenSource(KINDS[kind], generator)
    source = FoldedSource(frozen)
    tokens = residual_inputs(frozen.section, generator)
    positions = torch.arange(tokens.shape[1])[None].expand(len(tokens), -1)
    model = frozen_decoder(frozen.section, frozen.weights, frozen.norm_states)
    with torch.no_grad():
        expected = model.hidden_states(tokens) @ model.head.weight[: frozen.section.vocab_size].T
    found = streamed_logits(source, tokens, positions).double()
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()

    shapes = decoder_shapes(source.section)
    whole = read_all(source, shapes)
    for name, shape in shapes.items():
        for _ in range(3):
            starts = [int(torch.randint(size, (), generator=generator)) for size in shape]
            sizes = [
                1 + int(torch.randint(size - start, (), generator=generator))
                for size, start in zip(shape, starts, strict=True)
            ]
            view = torch.empty(sizes[::-1]).permute(*reversed(range(len(sizes))))
            source.read([Fragment(name, "master", shape, tuple(starts), view)])
            box = tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
            assert torch.equal(view, whole[name][box]), name


@pytest.mark.parametrize("kind", ["gpt2-no-bias", "llama-gqa-tied-wide-heads"])
def test_residual_to_logits_adds_up(kind: str) -> None:
    """f(a + b) - f(a) = f(b) - f(0) for the map from the last residual stream to the logits, as no norm lets it."""
    frozen, folded, _ = both(kind)
    generator = fresh()
    streams = torch.randn(2, 5, frozen.section.hidden_size, generator=generator, dtype=torch.float64)

    def error(model: Decoder) -> float:
        def logits(x: Tensor) -> Tensor:
            found = model.final_norm(x)
            found = found if isinstance(found, Tensor) else found.output
            return nn.functional.linear(found, model.head.weight)

        one, other = streams
        apart = logits(one) + logits(other) - logits(torch.zeros_like(one))
        return float((logits(one + other) - apart).norm() / apart.norm())

    with torch.no_grad():
        assert error(folded) < 1e-14
        assert frozen.norm_states is not None
        frozen.norm_states.set({"final": SiteState()})
        assert error(frozen) > 0.1


def operations(program: torch.export.ExportedProgram) -> Iterator[str]:
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            yield from (str(node.target) for node in module.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("kind", ["gpt2", "llama-qk-norm-mqa"])
def test_nothing_measures_the_stream(kind: str) -> None:
    """No variance, root or norm among the operations, not even once those that are made of others are taken apart."""

    class Whole(nn.Module):
        def __init__(self, model: Decoder) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: Tensor) -> Tensor:
            return self.model.logits(tokens)

    section = folded_section(KINDS[kind])
    tokens = torch.zeros(2, 9, dtype=torch.int64)
    found: dict[bool, set[str]] = {}
    for normed in (False, True):
        model: Any = build_decoder(KINDS[kind] if normed else section, seed=0).eval()
        program = torch.export.export(Whole(model), (tokens,), strict=False).run_decompositions()
        words = ("rsqrt", "sqrt", "var", "std", "norm")
        found[normed] = {one for one in operations(program) if any(word in one for word in words)}
    assert not found[False]
    assert found[True], "the words are those of the operations of a model with norms"


def test_what_is_not_frozen_is_named() -> None:
    source = FrozenSource(KINDS["gpt2"])
    source.norm_states = {**source.norm_states, "layers.1.v": SiteState(0.5, 1.0)}
    del source.norm_states["final"]
    said = refusal(lambda: FoldedSource(source))
    assert said == "memory: its norms cannot be folded, for these sites are not frozen: layers.1.v, final"
    source.norm_states = {}
    assert "layers.0.qk, layers.0.v, layers.0.mlp, layers.1.qk" in refusal(lambda: FoldedSource(source))
    free = FrozenSource(folded_section(KINDS["gpt2"]))
    assert "there is nothing to fold" in refusal(lambda: FoldedSource(free))
