"""Switchable norms against a decoder written out in float64, and their statistics against numpy."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.model import Decoder, ModelSection, SiteState, build_decoder, norm_sites, ordinary_tokens
from tests.model.frozen_reference import reference_logits, sigmas
from tests.model.sections import SECTIONS

NAMES = ["gpt2", "gpt2-untied", "llama", "llama-gqa-tied", "llama-qk-norm", "llama-qkv-bias"]


def random_decoder(section: ModelSection, seed: int, **options: object) -> Decoder:
    model = build_decoder(section, seed=seed, switchable_norms=True, **options)
    generator = torch.Generator().manual_seed(seed)
    for weight in dict(model.named_parameters()).values():
        weight.data += 0.15 * torch.randn(weight.shape, generator=generator)
    return model


def draw(section: ModelSection, batch: int = 2, sequence: int = 29) -> Tensor:
    return torch.randint(section.vocab_size, (batch, sequence))


def random_states(section: ModelSection) -> dict[str, SiteState]:
    """Real, frozen and on the way, all mixed."""
    return {
        site.name: SiteState(random.choice([0.0, 1.0, random.random()]), random.uniform(0.3, 3.0))
        for site in norm_sites(section)
    }


def relative(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth).abs().max() / truth.abs().max())


def switch(model: Decoder) -> None:
    """Compute as under a compiler: by the operations for any state."""
    for module in model.modules():
        if hasattr(module, "real"):
            module.real = False


@pytest.mark.parametrize("path", ["torch's kernels", "any state"])
@pytest.mark.parametrize("name", NAMES)
def test_with_no_site_removed_it_is_the_plain_decoder(name: str, path: str) -> None:
    section, tokens = SECTIONS[name], draw(SECTIONS[name])
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        model = random_decoder(section, random.randrange(10**6)).to(dtype)
        plain = build_decoder(section, seed=0).to(dtype)
        plain.load_state_dict(model.state_dict())
        if path == "any state":
            switch(model)
        with torch.no_grad():
            truth = plain(tokens, tokens, reduction="none", plain=True)
            ours = model(tokens, tokens, reduction="none", plain=True)
            hidden, expected = model.hidden_states(tokens), plain.hidden_states(tokens)
        assert relative(hidden, expected.double()) <= tolerance
        torch.testing.assert_close(ours.loss, truth.loss, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_any_states_equal_the_definition(name: str) -> None:
    section, tokens = SECTIONS[name], draw(SECTIONS[name])
    upstream = torch.randn(*tokens.shape, section.vocab_size, dtype=torch.float64)
    for _ in range(3):
        model = random_decoder(section, random.randrange(10**6)).double()
        states = random_states(section)
        assert model.norm_states is not None
        model.norm_states.set(states)
        hidden = model.hidden_states(tokens)
        logits = hidden @ model.head.weight[: section.vocab_size].T
        truth = reference_logits(model, tokens, states)
        # sigma is held on the device in fp32
        assert relative(logits.detach(), truth.detach()) <= 1e-6
        weights = dict(model.named_parameters())
        ours = torch.autograd.grad((logits * upstream).sum(), list(weights.values()), allow_unused=True)
        expected = torch.autograd.grad((truth * upstream).sum(), list(weights.values()), allow_unused=True)
        for key, mine, theirs in zip(weights, ours, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-6 * float(theirs.abs().max()), msg=key)


def test_a_state_of_one_site_moves_that_site_alone() -> None:
    """qk and v share a module: freezing one leaves the other as it was."""
    section, tokens = SECTIONS["llama"], draw(SECTIONS["llama"])
    model = random_decoder(section, 1).double()
    assert model.norm_states is not None
    for site in norm_sites(section):
        states = {site.name: SiteState(1.0, 0.7)}
        model.norm_states.set({other.name: SiteState() for other in norm_sites(section)} | states)
        with torch.no_grad():
            assert relative(model.logits(tokens), reference_logits(model, tokens, states)) < 1e-6, site


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama-qk-norm"])
def test_statistics_equal_numpy_over_documents_and_micro_batches(name: str, frozen: bool) -> None:
    section = SECTIONS[name]
    model = random_decoder(section, 2).train()
    states = model.norm_states
    assert states is not None
    if frozen:
        states.set({site.name: SiteState(1.0, 1.3) for site in norm_sites(section)})
    model.end_of_text = 5
    tokens = draw(section, 5, 23)
    tokens[1, 7] = tokens[4, 0] = 5
    states.gather(True)
    for rows in (tokens[:3], tokens[3:]):  # a step's micro-batches
        model(rows, rows)
    states.gather(False)
    model(tokens, tokens)  # counts nothing
    seen: dict[str, Tensor] = {}
    with torch.no_grad():
        reference_logits(model, tokens, states.states, seen)
    ordinary = (tokens != 5).numpy()
    ordinary[:, 0] = False
    for site, sums in states.take(lambda sums: sums).items():
        on_heads = site.endswith("_norm")
        sigma = sigmas(seen[site], section.norm == "layernorm" and not on_heads, section.norm_epsilon).numpy()
        mask = np.broadcast_to(ordinary[..., None], sigma.shape) if on_heads else ordinary
        for row, group in zip(sums, (sigma[mask], sigma[~mask]), strict=True):
            np.testing.assert_allclose(row, [group.size, group.sum(), (group**2).sum()], rtol=2e-6)
    assert all((sums == 0).all() for sums in states.take(lambda sums: sums).values())


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_recomputation_and_evaluation_count_no_token_twice(recompute: str) -> None:
    section, tokens = SECTIONS["gpt2"], draw(SECTIONS["gpt2"])
    model = random_decoder(section, 3, recompute=recompute).train()
    states = model.norm_states
    assert states is not None
    states.gather(True)
    loss = model(tokens, tokens).loss
    states.gather(False)
    loss.backward()
    model.eval()
    states.gather(True)
    with torch.no_grad():
        model(tokens, tokens)
    counted = states.take(lambda sums: sums)
    assert {float(sums[:, 0].sum()) for sums in counted.values()} == {float(tokens.numel())}


def test_ordinary_tokens_are_neither_first_nor_ends() -> None:
    tokens = torch.tensor([[3, 9, 4, 4], [9, 1, 2, 9]])
    documents = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    expected = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 0]]).bool()
    assert torch.equal(ordinary_tokens(tokens, documents, 9), expected)
    assert torch.equal(ordinary_tokens(tokens, None, None), torch.tensor([[0, 1, 1, 1]] * 2).bool())


def test_one_compiled_graph_a_block_serves_all_states() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    section, tokens = SECTIONS["gpt2"], draw(SECTIONS["gpt2"])
    model = random_decoder(section, 4).train()
    states = model.norm_states
    assert states is not None
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.layers:
        block.compile(backend=counter, fullgraph=True)
    states.gather(True)
    for _ in range(3):
        chosen = random_states(section)
        states.set(chosen)
        output = model(tokens, tokens, reduction="none", plain=True)
        output.loss.sum().backward()
        truth = reference_logits(model, tokens, chosen).flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(truth, tokens.flatten(), reduction="none")
        torch.testing.assert_close(output.loss.flatten().double(), expected, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == section.layers  # as without states: none was compiled again for another state
    assert float(states.take(lambda sums: sums)["layers.1.mlp"][:, 0].sum()) == 3 * tokens.numel()


def test_bad_states_are_refused_in_one_line() -> None:
    states = random_decoder(SECTIONS["gpt2"], 5).norm_states
    assert states is not None
    with pytest.raises(ValueError, match=r"'layers.9.mlp' is no norm site.*they are layers.0.qk"):
        states.set({"layers.9.mlp": SiteState()})
    for sigma in (None, 0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"final: alpha 1\.0 needs a positive sigma"):
            states.set({"final": SiteState(1.0, sigma)})
    with pytest.raises(ValueError, match=r"alpha 1\.5 is not between 0 and 1"):
        states.set({"final": SiteState(1.5, 1.0)})
