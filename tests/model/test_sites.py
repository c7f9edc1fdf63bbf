"""Named places: all there, the identity until replaced, and replaced only within the block."""

from __future__ import annotations

import pytest
import torch

from harness.model import build_decoder, norm_sites, spliced, tap_sites
from tests.model.sections import SECTIONS

PLACES = ["residual_before", "q", "k", "v", "attention_out", "residual_between", "mlp_out", "residual_after"]


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa-tied"])
def test_every_place_has_its_name_and_shape(name: str) -> None:
    section = SECTIONS[name]
    model = build_decoder(section, seed=0)
    expected = {f"layers.{layer}.{place}" for layer in range(section.layers) for place in PLACES} | {"final_residual"}
    assert set(tap_sites(model)) == expected
    seen = {}
    recorders = {site: lambda x, site=site: seen.setdefault(site, x) for site in expected}
    tokens = torch.randint(section.vocab_size, (2, 5))
    with torch.no_grad(), spliced(model, recorders):
        model.logits(tokens)
    for site, activation in seen.items():
        shape = (2, 5, section.hidden_size)
        if site[-1] in "qkv":
            shape = (2, 5, section.heads if site.endswith("q") else section.key_value_heads, section.head_width)
        assert activation.shape == shape, site
    assert seen.keys() == expected
    torch.testing.assert_close(
        seen["layers.0.residual_before"] + seen["layers.0.attention_out"], seen["layers.0.residual_between"]
    )
    torch.testing.assert_close(seen["layers.1.residual_after"], seen["final_residual"])


def test_replacement_acts_within_the_block_only() -> None:
    section = SECTIONS["gpt2"]
    model = build_decoder(section, seed=0)
    tokens = torch.randint(section.vocab_size, (2, 9))
    with torch.no_grad():
        plain = model.logits(tokens)
        with spliced(model, {site: lambda x: x for site in tap_sites(model)}):
            assert torch.equal(model.logits(tokens), plain), "the identity arm must give exactly 0"
        for site in tap_sites(model):
            with spliced(model, {site: torch.zeros_like}):
                assert not torch.equal(model.logits(tokens), plain), site
        assert torch.equal(model.logits(tokens), plain)
    with pytest.raises(ValueError, match="no site"), spliced(model, {"layers.9.q": torch.zeros_like}):
        pass
    site = "layers.0.mlp_out"
    with spliced(model, {site: torch.zeros_like}), pytest.raises(ValueError, match="already"):  # noqa: SIM117
        with spliced(model, {site: torch.zeros_like}):
            pass


def test_taps_leave_no_trace_in_the_state() -> None:
    model = build_decoder(SECTIONS["gpt2"], seed=0)
    assert not [name for name in model.state_dict() if "residual" in name or name.endswith("_out")]


def test_norm_sites_are_three_a_block_and_one() -> None:
    section = SECTIONS["llama"]
    sites = norm_sites(section)
    assert [site.name for site in sites] == [
        "layers.0.qk", "layers.0.v", "layers.0.mlp", "layers.1.qk", "layers.1.v", "layers.1.mlp", "final",
    ]  # fmt: skip
    modules = dict(build_decoder(section, seed=0).named_modules())
    assert all(site.module in modules for site in sites)
    assert sites[0].module == sites[1].module == "layers.0.attention_norm"
    assert norm_sites(section.model_copy(update={"norm_free": True})) == []
