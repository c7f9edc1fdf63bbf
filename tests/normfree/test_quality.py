"""Each measurement of quality beside float64, numpy or a count by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from harness.data import IGNORED, Batch, Tokenizer, TokenizerSection, open_tokenizer
from harness.data.tokenizer_training import train_sentencepiece
from harness.model import Decoder, ModelSection, SiteState, build_decoder, norm_sites, ordinary_tokens, spliced
from harness.normfree.proof import _paired
from harness.normfree.quality import calibration_error, freezing_cost, measure, rare_tokens, site_statistics
from tests.normfree.frozen import KINDS, FrozenSource, fill, fresh, frozen_decoder

END = 5


def batches_of(section: ModelSection, generator: torch.Generator, shapes: tuple[tuple[int, int], ...]) -> list[Batch]:
    """Random tokens and targets, some of which are ignored, in rows of several documents."""
    made = []
    assert section.vocab_size is not None
    for shape in shapes:
        tokens, targets = (torch.randint(section.vocab_size, shape, generator=generator) for _ in range(2))
        tokens[torch.rand(shape, generator=generator) < 0.1] = END
        targets[torch.rand(shape, generator=generator) < 0.2] = IGNORED
        targets[0, 0] = 3
        ends = tokens == END
        made.append(Batch(tokens, targets, None, ends.cumsum(1) - ends.long()))
    return made


def real_model(kind: str, **changes: object) -> Decoder:
    section = KINDS[kind].model_copy(update=changes)
    model = fill(build_decoder(section, seed=0, switchable_norms=True), FrozenSource(section).weights).eval()
    model.end_of_text = END
    return model


@pytest.mark.parametrize("kind", ["gpt2", "llama-gqa-tied-wide-heads"])
def test_losses_and_what_is_made_of_them(kind: str) -> None:
    generator = fresh()
    model = real_model(kind)
    batches = batches_of(model.section, generator, ((3, 20), (1, 7), (2, 30)))
    model.train()
    quality, losses = measure(model, batches)
    assert model.training, "as it was"
    truth, entropies, confidences, hits = [], [], [], []
    with torch.no_grad():
        for batch in batches:
            hidden = model.eval().hidden_states(batch.tokens, batch.positions, batch.document_ids).double()
            chances = (hidden @ model.head.weight.double()[:97].T).log_softmax(-1)
            for row in range(len(batch.tokens)):
                for place in range(batch.tokens.shape[1]):
                    target, here = int(batch.targets[row, place]), chances[row, place].numpy()
                    if target != IGNORED:
                        truth.append(-here[target])
                        entropies.append(-(np.exp(here) * here).sum())
                        confidences.append(np.exp(here.max()))
                        hits.append(float(here.argmax() == target))
    assert losses.dtype == np.float64
    assert losses == pytest.approx(np.array(truth), abs=2e-5)
    ordered = np.sort(truth)
    place = 0.999 * (len(ordered) - 1)
    p999 = ordered[int(place)] + (place % 1) * (ordered[int(place) + 1] - ordered[int(place)])
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    found = (quality.mean, quality.median, quality.p999, quality.largest, quality.entropy)
    assert found == pytest.approx((sum(truth) / len(truth), middle, p999, ordered[-1], np.mean(entropies)), abs=2e-5)
    assert quality.tokens == len(truth)
    errors = 0.0
    for bin_ in range(15):
        inside = [at for at, confidence in enumerate(confidences) if bin_ / 15 <= confidence < (bin_ + 1) / 15]
        errors += abs(sum(hits[at] - confidences[at] for at in inside))
    assert quality.calibration_error == pytest.approx(errors / len(truth), abs=1e-4)


def test_calibration_by_hand() -> None:
    """Bins [0, 1/15), ..., [14/15, 1]: two of 0.5 with one hit (0), two of 0.9 with none (0.9), one of 1 that hits."""
    confidence = np.array([0.5, 0.51, 0.9, 0.92, 1.0, 0.0])
    correct = np.array([1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    expected = (abs(1 - 1.01) + 1.82 + 0 + 0) / 6
    assert calibration_error(confidence, correct) == pytest.approx(expected)
    assert calibration_error(np.full(10, 0.7), np.array([1.0] * 7 + [0.0] * 3)) == pytest.approx(0)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@pytest.mark.parametrize(("rows", "length"), [(8, 64), (3, 257), (1, 511), (8, 256)])
def test_rare_tokens_are_the_single_bytes(kind: str, rows: int, length: int) -> None:
    if kind == "bytes":
        tokenizer = open_tokenizer(TokenizerSection(kind="bytes"))
    else:
        texts = [f"def name_{n}(self):\n    return {n}\n\n" for n in range(200)]
        tokenizer = train_sentencepiece(texts, TokenizerSection(vocab_size=340))
    text = torch.randint(256, (rows * length,))
    [batch], missing = rare_tokens(tokenizer, text, rows, length, seed=7)
    assert missing == 0
    assert batch.tokens.shape == batch.targets.shape == (rows, length)
    half = length // 2
    assert torch.equal(batch.tokens[:, :half], text[: rows * half].view(rows, half))
    valid = batch.targets != IGNORED
    assert torch.equal(valid.sum(1), torch.full((rows,), length - half + 1))
    assert torch.equal(batch.targets[:, half - 1 : -1], batch.tokens[:, half:])
    wanted = batch.targets[valid].tolist()
    assert {len(tokenizer.pieces[token]) for token in wanted} == {1}
    assert {tokenizer.pieces[token] for token in wanted} == {bytes([value]) for value in range(256)}
    assert wanted[:256] != wanted[256:512], "in random order"
    assert not torch.equal(rare_tokens(tokenizer, text, rows, length, seed=8)[0][0].targets, batch.targets)


def test_bytes_without_a_token_are_counted() -> None:
    class Few(Tokenizer):
        kind, file_name, definition, eod = "few", None, b"", 0

        def encode(self, text: str) -> list[int]:
            raise NotImplementedError

        def _read_pieces(self) -> list[bytes]:
            return [b"", b"ab", b"x", b"y", b"z", b"abc"]

    [batch], missing = rare_tokens(Few(), torch.ones(40, dtype=torch.int64), 2, 9, seed=0)
    assert missing == 253
    assert set(batch.targets[batch.targets != IGNORED].tolist()) == {2, 3, 4}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_sigma_at_every_site(kind: str, dropout: float) -> None:
    """Beside numpy on the residual streams of the model in evaluation; the model is left as it was."""
    generator = fresh()
    model = real_model(kind, dropout=dropout)
    batches = batches_of(model.section, generator, ((3, 20), (1, 7)))
    section, weights = model.section, {name: weight.clone() for name, weight in model.state_dict().items()}
    found = site_statistics(model, batches).sites
    assert found.keys() == {site.name for site in norm_sites(section)}
    sigmas: dict[str, list[np.ndarray]] = {}
    places = {"layers.0.residual_before": ("layers.0.qk", "layers.0.v"), "layers.0.residual_between": ("layers.0.mlp",)}
    places |= {
        name.replace(".0.", ".1."): tuple(s.replace(".0.", ".1.") for s in sites) for name, sites in places.items()
    }
    places["final_residual"] = ("final",)

    def keeper(sites: tuple[str, ...]):  # type: ignore[no-untyped-def]
        def keep(x: torch.Tensor) -> torch.Tensor:
            z = x.double().numpy()
            z = z - z.mean(-1, keepdims=True) if section.norm == "layernorm" else z
            for site in sites:
                sigmas.setdefault(site, []).append(np.sqrt((z**2).mean(-1) + section.norm_epsilon).ravel())
            return x

        return keep

    with torch.no_grad(), spliced(model, {name: keeper(sites) for name, sites in places.items()}):
        for batch in batches:
            model.hidden_states(batch.tokens, batch.positions, batch.document_ids)
    plain = np.concatenate([ordinary_tokens(b.tokens, b.document_ids, END).numpy().ravel() for b in batches])
    assert 0 < plain.sum() < len(plain) - 4, "ends and first tokens of documents inside a row are others, too"
    for site, average in found.items():
        sigma = np.concatenate(sigmas[site])
        expected = (sigma.mean(), sigma[plain].mean(), sigma[~plain].mean())
        assert (average.sigma, average.ordinary, average.others) == pytest.approx(expected, rel=1e-5), site
    assert model.section is section
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert site_statistics(model, batches).sites == found, "nothing is left over in the sums"


@pytest.mark.parametrize("kind", ["gpt2", "llama-qk-norm-mqa"])
def test_what_freezing_costs(kind: str) -> None:
    """Beside a model that was built frozen, at sigmas that were measured on other text."""
    generator = fresh()
    model = real_model(kind)
    text = batches_of(model.section, generator, ((4, 20),))
    held_out = batches_of(model.section, generator, ((3, 25), (2, 9)))
    before, whole = measure(model, held_out)
    cost = freezing_cost(model, text, held_out)
    states = {site: SiteState(1.0, average.sigma) for site, average in site_statistics(model, text).sites.items()}
    weights = {
        name: model.get_parameter(name).detach()[: place.global_shape[0]] for name, place in model.placements().items()
    }
    frozen = frozen_decoder(model.section, weights, states)
    assert cost == pytest.approx(measure(frozen.float(), held_out)[0].mean - before.mean, abs=1e-5)
    assert abs(cost) > 1e-3
    assert model.norm_states is not None
    assert set(model.norm_states.states.values()) == {SiteState()}
    assert (measure(model, held_out)[1] == whole).all()


def test_a_model_partly_frozen_gets_its_states_back() -> None:
    model = real_model("gpt2")
    batches = batches_of(model.section, fresh(), ((2, 20),))
    assert model.norm_states is not None
    model.norm_states.set({"layers.0.mlp": SiteState(1.0, 1.5), "layers.1.v": SiteState(0.25, 3.0)})
    states, before = dict(model.norm_states.states), measure(model, batches)[1]
    freezing_cost(model, batches, batches)
    assert model.norm_states.states == states
    assert (measure(model, batches)[1] == before).all()


def paired_case(generator: np.random.Generator, lengths: np.ndarray, shared: float) -> tuple[np.ndarray, list[Batch]]:
    """Differences of tokens, those of a window with a part in common, and the batches they came from."""
    per_window = generator.normal(scale=shared, size=len(lengths))
    difference = np.concatenate(
        [0.3 + own + generator.normal(size=n) for own, n in zip(per_window, lengths, strict=True)]
    )
    batches = []
    for start in range(0, len(lengths), 4):
        targets = torch.full((len(lengths[start : start + 4]), 40), IGNORED)
        for row, count in enumerate(lengths[start : start + 4]):
            targets[row, generator.permutation(40)[:count]] = 1
        batches.append(Batch(torch.zeros_like(targets), targets))
    return difference, batches


def test_a_paired_gap_and_its_error() -> None:
    generator = np.random.default_rng()
    lengths = generator.integers(1, 40, 30)
    lengths[[3, 7]] = 0  # windows without a target count for nothing
    theirs = generator.normal(size=lengths.sum())
    difference, batches = paired_case(generator, lengths, 1.0)
    found = _paired(theirs + difference, theirs, batches)
    assert found["nats"] == pytest.approx(difference.mean())
    sums, counts, at = [], [], 0
    for count in lengths[lengths > 0]:
        sums.append(difference[at : at + count].sum())
        counts.append(count)
        at += count
    n, mean = len(counts), sum(sums) / sum(counts)
    residuals = [(total - mean * count) ** 2 for total, count in zip(sums, counts, strict=True)]
    assert found["standard_error"] == pytest.approx((sum(residuals) / (n - 1) / n) ** 0.5 / np.mean(counts))


def test_the_error_is_what_repetition_shows() -> None:
    """The standard deviation of the gap over many draws of windows; per-token independence would give a third of it."""
    generator = np.random.default_rng(5)
    means, errors = [], []
    for _ in range(400):
        difference, batches = paired_case(generator, generator.integers(5, 40, 48), 1.0)
        found = _paired(difference, np.zeros_like(difference), batches)
        means.append(found["nats"])
        errors.append(found["standard_error"])
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.12)
    assert np.std(means) > 2.5 / np.sqrt(48 * 22)
