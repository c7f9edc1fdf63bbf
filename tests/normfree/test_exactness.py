"""The proof's measurements against numbers worked out in another way."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.data import IGNORED, Batch, TokenizerSection, open_tokenizer
from harness.evaluate import read_model
from harness.model import Decoder, SiteState, build_decoder, norm_sites
from harness.normfree import FoldedSource, freezing_cost, measure, site_statistics
from harness.normfree.exactness import (
    attribution_error,
    logit_gap,
    norm_operations,
    operations,
    superposition_error,
)
from harness.normfree.proof import _paired
from harness.normfree.quality import calibration_error, rare_tokens
from tests.convert.sources import DecoderSource
from tests.model.frozen_reference import reference_logits, sigmas
from tests.model.test_switchable import random_decoder
from tests.normfree.frozen import KINDS, FrozenSource, fresh, frozen_decoder, residual_inputs

FAMILIES = ("gpt2", "llama")


def models(kind: str) -> tuple[Decoder, Decoder, Decoder, Tensor]:
    """With norms, frozen in float64, folded in fp32, and tokens."""
    generator = fresh()
    source = FrozenSource(KINDS[kind], generator)
    frozen = frozen_decoder(source.section, source.weights, source.norm_states)
    plain = random_decoder(KINDS[kind], 3).eval()
    return plain, frozen, read_model(FoldedSource(source)).eval(), residual_inputs(source.section, generator)


def test_logit_gap_is_the_largest_difference_and_where_the_top_is_another() -> None:
    truth = torch.randn(4, 7, 11, dtype=torch.float64)
    other = truth + 1e-3 * torch.randn_like(truth)
    other[1, 2] = truth[1, 2].flip(-1)
    other[3, 6, truth[3, 6].argmin()] += 50
    batches = [torch.arange(2)[:, None].expand(-1, 7), torch.arange(2, 4)[:, None].expand(-1, 7)]
    gap = logit_gap(lambda rows: truth[rows[:, 0]], lambda rows: other[rows[:, 0]], batches)
    assert gap.largest == pytest.approx((truth - other).abs().max().item())
    assert gap.relative == pytest.approx(gap.largest / truth.abs().max().item())
    assert gap.tokens == 28
    assert gap.same_top == int((truth.argmax(-1) == other.argmax(-1)).sum()) < 28


@pytest.mark.parametrize("kind", FAMILIES)
def test_superposition_is_of_order_one_with_norms_and_rounding_without(kind: str) -> None:
    plain, _, folded, tokens = models(kind)
    assert superposition_error(folded, tokens, fresh()) < 1e-5
    assert superposition_error(plain, tokens, fresh()) > 0.5


@pytest.mark.parametrize("kind", FAMILIES)
def test_attribution_error_is_that_of_the_definition(kind: str) -> None:
    plain, _, folded, tokens = models(kind)
    targets = tokens.roll(1, 1)
    assert attribution_error(folded, tokens, targets) < 1e-4
    plain = plain.double()
    layernorm, eps = plain.section.norm == "layernorm", plain.section.norm_epsilon
    seen: dict[str, Tensor] = {}
    reference_logits(plain, tokens, {}, seen)
    gain, bias = plain.final_norm.weight, getattr(plain.final_norm, "bias", None)

    def normed(x: Tensor, sigma: Tensor | None = None) -> Tensor:
        sigma = sigmas(x, layernorm, eps) if sigma is None else sigma
        centred = x - x.mean(-1, keepdim=True) if layernorm else x
        return centred / sigma[..., None] * gain + (0 if bias is None else bias)

    x, weight = seen["final"], plain.head.weight[targets]
    order = [name for layer in range(2) for name in (f"layers.{layer}.qk", f"layers.{layer}.mlp")] + ["final"]
    parts = [seen[after] - seen[before] for before, after in pairwise(order)]
    effects = [((normed(x) - normed(x - part)) * weight).sum(-1) for part in parts]
    zero = torch.zeros_like(x)
    held, nothing = sigmas(x, layernorm, eps), normed(zero, torch.ones(x.shape[:2]))
    shares = [((normed(part, held) - nothing) * weight).sum(-1) for part in parts]
    expected = sum(float((a - b).abs().sum()) for a, b in zip(shares, effects, strict=True))
    expected /= sum(float(effect.abs().sum()) for effect in effects)
    assert attribution_error(plain, tokens, targets) == pytest.approx(expected, rel=1e-6)
    assert expected > 0.01


@pytest.mark.parametrize("kind", [*FAMILIES, "llama-qk-norm-mqa"])
def test_the_graph_of_a_folded_model_has_no_norm_and_that_of_a_frozen_one_has(kind: str) -> None:
    plain, frozen, folded, tokens = models(kind)
    assert norm_operations(operations(folded, tokens)) == []
    assert norm_operations(operations(frozen, tokens)) != []
    assert norm_operations(operations(build_decoder(plain.section, seed=0).eval(), tokens)) != []


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_wrong_sigma_or_a_disturbed_weight_shows(kind: str) -> None:
    generator = fresh()
    source = FrozenSource(KINDS[kind], generator)
    frozen = frozen_decoder(source.section, source.weights, source.norm_states)
    tokens = [residual_inputs(source.section, generator)]
    good = logit_gap(frozen.logits, read_model(FoldedSource(source)).eval().logits, tokens)
    assert good.relative < 1e-5
    name = "layers.1.v"
    source.norm_states[name] = SiteState(1.0, source.norm_states[name].sigma * 1.001)
    assert logit_gap(frozen.logits, read_model(FoldedSource(source)).eval().logits, tokens).relative > 2e-5


def batches_of(count: int = 3) -> list[Batch]:
    made = []
    for _ in range(count):
        tokens = torch.randint(97, (4, 21))
        targets = torch.randint(97, (4, 21))
        targets[torch.rand(4, 21) < 0.3] = IGNORED
        made.append(Batch(tokens, targets))
    return made


def test_quality_is_that_of_full_logits() -> None:
    model = random_decoder(KINDS["gpt2"], 8).eval()
    batches = batches_of()
    quality, losses = measure(model, batches)
    with torch.no_grad():
        logits = torch.cat([model.logits(batch.tokens).flatten(0, 1) for batch in batches]).double()
    targets = torch.cat([batch.targets.flatten() for batch in batches])
    logits, targets = logits[targets != IGNORED], targets[targets != IGNORED]
    expected = F.cross_entropy(logits, targets, reduction="none").numpy()
    np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-5)
    probabilities = logits.softmax(-1)
    entropy = -(probabilities * probabilities.log()).sum(-1).mean()
    assert quality.mean == pytest.approx(expected.mean(), rel=1e-5)
    assert quality.median == pytest.approx(np.median(expected), rel=1e-4)
    assert quality.largest == pytest.approx(expected.max(), rel=1e-4)
    assert quality.p999 == pytest.approx(np.quantile(expected, 0.999), rel=1e-4)
    assert quality.entropy == pytest.approx(entropy.item(), rel=1e-4)
    assert quality.tokens == len(expected)


def test_calibration_error_by_hand() -> None:
    confidence = np.array([0.01, 0.02, 0.5, 0.51, 0.52, 0.99, 1.0])
    correct = np.array([0, 1, 0, 0, 1, 1, 1])
    # Bins of a fifteenth: two of 0.015 on average with half correct, three of 0.51 with a third, two of 0.995 with all.
    expected = (2 * abs(0.5 - 0.015) + 3 * abs(1 / 3 - 0.51) + 2 * abs(1 - 0.995)) / 7
    assert calibration_error(confidence, correct) == pytest.approx(expected)
    assert calibration_error(np.array([0.7, 0.7, 0.7]), np.array([0.7, 0.7, 0.7])) == pytest.approx(0, abs=1e-12)


def test_the_probe_has_every_single_byte_and_scores_nothing_else() -> None:
    tokenizer = open_tokenizer(TokenizerSection(kind="bytes"))
    text = torch.randint(256, (4 * 600,))
    (batch,), missing = rare_tokens(tokenizer, text, rows=4, length=600, seed=1)
    assert missing == 0
    assert batch.tokens.shape == batch.targets.shape == (4, 600)
    scored = batch.targets[batch.targets != IGNORED]
    assert {tokenizer.pieces[number] for number in scored.tolist()} == {bytes([value]) for value in range(256)}
    for row in range(4):
        assert torch.equal(batch.tokens[row, :300], text[row * 300 : (row + 1) * 300])
        kept = batch.targets[row] != IGNORED
        assert not kept[:299].any()
        assert kept[299:].all()
        assert torch.equal(batch.targets[row, :-1][kept[:-1]], batch.tokens[row, 1:][kept[:-1]])


@pytest.mark.parametrize("kind", [*FAMILIES, "llama-qk-norm-mqa"])
def test_site_statistics_and_the_cost_of_freezing_leave_the_model_as_it_was(kind: str) -> None:
    section = KINDS[kind].model_copy(update={"dropout": 0.5})
    model = random_decoder(section, 9).eval()
    batches = batches_of(2)
    states = model.norm_states
    assert states is not None
    before = dict(states.states)
    found = site_statistics(model, batches).sites
    for site, average in found.items():
        values = []
        for batch in batches:
            seen: dict[str, Tensor] = {}
            with torch.no_grad():
                reference_logits(model, batch.tokens, {}, seen)
            layernorm = section.norm == "layernorm" and not site.endswith("_norm")
            values.append(sigmas(seen[site], layernorm, section.norm_epsilon).flatten())
        assert average.sigma == pytest.approx(torch.cat(values).mean().item(), rel=1e-5), site
    cost = freezing_cost(model, batches, batches)
    assert states.states == before
    assert not model.training
    assert model.section is section
    real = measure(model, batches)[0].mean
    states.set({site.name: SiteState(1.0, found[site.name].sigma) for site in norm_sites(section)})
    assert cost == pytest.approx(measure(model, batches)[0].mean - real, rel=1e-9)
    assert abs(cost) > 1e-4


def test_the_standard_error_is_that_of_a_ratio_over_windows() -> None:
    generator = np.random.default_rng()
    lengths = generator.integers(3, 40, size=200)
    offsets = generator.normal(0.1, 1.0, size=200)  # a window's tokens go together

    def batch_of(length: int) -> Batch:
        targets = torch.full((1, 40), IGNORED)
        targets[0, :length] = 1
        return Batch(torch.zeros(1, 40, dtype=torch.int64), targets)

    batches = [batch_of(int(length)) for length in lengths]
    difference = np.repeat(offsets, lengths)
    found = _paired(difference, np.zeros_like(difference), batches)
    assert found["nats"] == pytest.approx(difference.mean())
    resampled = []
    for _ in range(2000):
        rows = generator.integers(0, 200, size=200)
        resampled.append((offsets[rows] * lengths[rows]).sum() / lengths[rows].sum())
    assert found["standard_error"] == pytest.approx(np.std(resampled), rel=0.2)
    assert found["standard_error"] > 3 * difference.std() / np.sqrt(len(difference)), "tokens are not independent"


def test_models_with_norms_are_read_with_their_own() -> None:
    source = DecoderSource(KINDS["llama"], seed=4)
    model = read_model(source)
    assert model.norm_states is None
    assert read_model(source, switchable_norms=True).norm_states is not None
