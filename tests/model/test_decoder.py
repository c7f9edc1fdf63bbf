"""The decoder against transformers, and against itself recomputed, compiled, masked and cached."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from harness.model import Decoder, KeyValueCache, LossSection, ModelSection, build_decoder
from tests.model.reference import reference_model
from tests.model.sections import SECTIONS


def random_model(section: ModelSection, **options: object) -> Decoder:
    """A model whose every parameter is random, gains and biases too, so that none can be left out unseen."""
    model = build_decoder(section, seed=3, **options)
    generator = torch.Generator().manual_seed(5)
    for weight in dict(model.named_parameters()).values():
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return model


def draw_tokens(section: ModelSection, batch: int = 2, sequence: int = 37) -> Tensor:
    return torch.randint(section.vocab_size, (batch, sequence), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", SECTIONS)
def test_logits_equal_transformers(name: str) -> None:
    section = SECTIONS[name]
    model = random_model(section)
    tokens = draw_tokens(section)
    with torch.no_grad():
        ours = model.logits(tokens)
        theirs = reference_model(section, model).eval()(tokens).logits
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_softcap_bounds_logits_and_loss_follows() -> None:
    plain = SECTIONS["llama"]
    section = plain.model_copy(update={"logit_softcap": 2.5})
    model = random_model(section)
    model.head.weight.data *= 20
    uncapped = build_decoder(plain, seed=0)
    uncapped.load_state_dict(model.state_dict())
    tokens, targets = draw_tokens(section), draw_tokens(section).roll(1, 0)
    with torch.no_grad():
        expected = 2.5 * torch.tanh(uncapped.logits(tokens).double() / 2.5)
        torch.testing.assert_close(model.logits(tokens).double(), expected, atol=1e-5, rtol=1e-5)
        loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum")
        torch.testing.assert_close(model(tokens, targets).loss.double(), loss, rtol=1e-5, atol=0)


def gradients(model: Decoder, tokens: Tensor, targets: Tensor, **options: object) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(tokens, targets, **options).loss
    loss.backward()
    return loss.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("sequence", [1, 2, 3])
def test_no_token_sees_a_later_one(sequence: int) -> None:
    section = SECTIONS["llama-gqa-tied"]
    model = random_model(section)
    tokens = draw_tokens(section, 2, sequence)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % section.vocab_size
    with torch.no_grad():
        before, after = model.logits(tokens), model.logits(changed)
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


@pytest.mark.parametrize("family", ["gpt2", "llama-gqa-tied"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(family: str, recompute: str) -> None:
    section = SECTIONS[family].model_copy(update={"dropout": 0.2})
    tokens, targets = draw_tokens(section), draw_tokens(section).roll(3, 1)
    results = []
    for mode in ("none", recompute):
        torch.manual_seed(11)  # the same dropout masks, in the recomputation too
        results.append(gradients(random_model(section, recompute=mode).train(), tokens, targets))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)


def test_recomputation_keeps_less() -> None:
    """Bytes that autograd keeps for the backward pass fall from none to selective to full."""
    section = SECTIONS["llama"]
    tokens, kept = draw_tokens(section), {}
    for mode in ("none", "selective", "full"):
        model, total = random_model(section, recompute=mode), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, total=total: total.append(t.nbytes) or t, lambda t: t):
            model.hidden_states(tokens)
        kept[mode] = sum(total)
    assert kept["full"] < kept["none"] / 3
    assert kept["selective"] < kept["none"]


@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile on the CPU needs a C++ compiler"
)
@pytest.mark.parametrize("family", ["gpt2", "llama-gqa-tied"])
def test_compiled_blocks_give_the_same_losses(family: str) -> None:
    section = SECTIONS[family]
    tokens, targets = draw_tokens(section), draw_tokens(section).roll(3, 1)
    plain = gradients(random_model(section), tokens, targets)
    compiled = gradients(random_model(section, compile_blocks=True), tokens, targets)
    torch.testing.assert_close(plain, compiled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama-qk-norm"])
def test_masked_documents_equal_documents_alone(family: str) -> None:
    """Packed and masked, every document has the losses that it has in a batch of its own."""
    section = SECTIONS[family]
    model = random_model(section)
    lengths = [1, 17, 8, 11]
    tokens, targets = draw_tokens(section, 1, sum(lengths)), draw_tokens(section, 2, sum(lengths))[1:]
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        packed = model(tokens, targets, positions, ids, reduction="none").loss
        alone = torch.cat(
            [
                model(part, target, reduction="none").loss
                for part, target in zip(tokens.split(lengths, 1), targets.split(lengths, 1), strict=True)
            ],
            dim=1,
        )
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama-mqa-wide-heads"])
def test_cached_generation_sees_what_a_whole_pass_sees(family: str) -> None:
    section = SECTIONS[family]
    model = random_model(section).eval()
    tokens = draw_tokens(section, 2, 23)
    caches = [KeyValueCache(23) for _ in model.layers]
    with torch.no_grad():
        pieces = [model.logits(piece, caches) for piece in tokens.split([9, 1, 1, 5, 2, 1, 4], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model.logits(tokens), rtol=1e-4, atol=1e-5)


def test_loss_terms_reach_the_training_loss_only() -> None:
    section = SECTIONS["gpt2"]
    model = random_model(section, loss=LossSection(z_loss=0.01, label_smoothing=0.1))
    tokens, targets = draw_tokens(section), draw_tokens(section).roll(3, 1)
    with torch.no_grad():
        logits = model.logits(tokens).flatten(0, 1).double()
        plain = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")
        smooth = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum", label_smoothing=0.1)
        trained = smooth + 0.01 * logits.logsumexp(-1).square().sum()
        torch.testing.assert_close(model(tokens, targets).loss.double(), trained, rtol=1e-5, atol=0)
        torch.testing.assert_close(model(tokens, targets, plain=True).loss.double(), plain, rtol=1e-5, atol=0)
