"""Initial weights depend on seed, name and global shape alone, and have the published spread."""

from __future__ import annotations

import math

import torch

from harness.model import ModelSection, build_decoder, count_parameters, flops_per_token
from tests.model.sections import SECTIONS


def test_weights_follow_seed_and_name_alone() -> None:
    section = SECTIONS["llama-gqa-tied"]
    deeper = section.model_copy(update={"layers": 3, "vocab_multiple": 1, "scale_residual_init": False})
    model, again, other = (build_decoder(section, seed=seed).state_dict() for seed in (1, 1, 2))
    longer = build_decoder(deeper, seed=1).state_dict()
    for name, weight in model.items():
        torch.testing.assert_close(weight, again[name], rtol=0, atol=0)
        if "norm" not in name:
            assert not torch.equal(weight, other[name])
        if not name.endswith(("output.weight", "down.weight")):
            torch.testing.assert_close(weight[: len(longer[name])], longer[name], rtol=0, atol=0)
    first, second = model["layers.0.mlp.gate.weight"], model["layers.0.mlp.up.weight"]
    assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 0.05


def test_spread_is_the_published_one() -> None:
    section = ModelSection(family="gpt2", layers=8, hidden_size=128, heads=4, vocab_size=1000, max_positions=512)
    for name, weight in build_decoder(section, seed=0).named_parameters():
        if name == "token_embedding.weight":
            assert weight[1000:].abs().max() == 0, "padded rows"
            weight = weight[:1000]
        if "norm" in name or name.endswith("bias"):
            assert weight.unique().tolist() == ([0.0] if name.endswith("bias") else [1.0])
            continue
        expected = 0.02
        if name.startswith("position_embedding"):
            expected = 0.01
        elif name.endswith(("attention.output.weight", "mlp.down.weight")):
            expected = 0.02 / math.sqrt(16)
        assert abs(weight.std().item() / expected - 1) < 0.03, name
        assert abs(weight.mean().item()) < 0.05 * expected, name


def test_counts_are_those_of_the_built_model() -> None:
    for section in SECTIONS.values():
        model = build_decoder(section, seed=0)
        padding = sum(
            (len(dict(model.named_parameters())[name]) - rows) * section.hidden_size
            for name, rows in ((name, place.shape[0]) for name, place in model.placements().items())
        )
        counts = count_parameters(section)
        assert counts.total == sum(weight.numel() for weight in model.parameters()) - padding
        blocks = sum(weight.numel() for weight in model.layers.parameters())
        assert counts.blocks == blocks + sum(weight.numel() for weight in model.final_norm.parameters())
        products = sum(w.numel() for n, w in model.layers.named_parameters() if n.endswith("weight") and w.dim() == 2)
        assert counts.products == products + section.vocab_size * section.hidden_size


def test_published_shapes_have_their_published_counts() -> None:
    """Parameter counts of the released models, in millions, and the ladder's names."""
    published = {
        "gpt2-124m": (50257, 124.44), "gpt2-355m": (50257, 354.82), "gpt2-774m": (50257, 774.03),
        "gpt2-1.5b": (50257, 1557.61), "llama-1b": (128256, 1235.81), "llama-8b": (128256, 8030.26),
    }  # fmt: skip
    for shape, (vocabulary, millions) in published.items():
        counts = count_parameters(ModelSection(shape=shape, vocab_size=vocabulary))
        assert round(counts.total / 1e6, 2) == millions, shape
    for shape, millions in {
        "0.1": 0.1,
        "0.4": 0.4,
        "0.8": 0.8,
        "1.5": 1.5,
        "4": 4,
        "10": 10,
        "25": 25,
        "60": 60,
    }.items():
        blocks = count_parameters(ModelSection(shape=f"ladder-{shape}m", vocab_size=4096)).blocks
        assert abs(blocks / 1e6 / millions - 1) < 0.12, (shape, blocks)


def test_flops_are_counted_as_palm_counts_them() -> None:
    section = ModelSection(shape="gpt2-124m", vocab_size=50257)
    products = 12 * 12 * 768**2 + 50257 * 768
    assert flops_per_token(section, 1024) == 6 * products + 12 * 12 * 12 * 64 * 1024
