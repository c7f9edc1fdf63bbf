"""Checkpoints of norm removal: what they are evaluated as, what they refuse, and what folding makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from harness.checkpoint import CheckpointStore
from harness.cli import main
from harness.config import HarnessError, plain
from harness.convert import RunSource, convert
from harness.data import TokenizerSection, open_tokenizer
from harness.evaluate import restore
from harness.model import ModelSection, SiteState
from harness.normfree import open_folded
from harness.parallel import Fragment
from harness.train import train
from tests.convert.refusals import refusal
from tests.normfree.frozen import FrozenSource, fresh, frozen_decoder, residual_inputs
from tests.small_run import small_settings

SECTIONS = {
    "gpt2": ModelSection(
        family="gpt2", layers=2, hidden_size=48, heads=3, bias=False, vocab_size=257, max_positions=32
    ),
    "llama": ModelSection(layers=2, hidden_size=32, heads=4, kv_heads=2, qk_norm=True, vocab_size=257),
}


def save_run(folder: Path, source: FrozenSource, states: dict[str, SiteState]) -> Path:
    """A run whose checkpoint of step 7 is as norm removal leaves it."""
    tokenizer = open_tokenizer(TokenizerSection(kind="bytes"))
    tokenizer.save(folder / "tokenizer")
    sites = {name: {"alpha": state.alpha, "sigma": state.sigma} for name, state in states.items()}
    state = {
        "step": 7,
        "saved_at": "2030-01-01T00:00:00+00:00",
        "tokenizer": tokenizer.fingerprint,
        "settings": {"model": plain(source.section), "data": {"sequence_length": 32}},
        "callbacks": {"saving": {}, "norm_removal": {"sites": sites, "event": 3}},
    }
    masters = [Fragment.whole(name, "master", weight.clone()) for name, weight in source.weights.items()]
    CheckpointStore(folder / "checkpoints").save(7, masters, state)
    return folder


def some_frozen(source: FrozenSource) -> dict[str, SiteState]:
    """One site on its way, some frozen, the rest real."""
    states = dict.fromkeys(source.norm_states, SiteState())
    chosen = {"layers.0.mlp": 1.0, "layers.1.v": 0.3, "layers.0.qk": 1.0, "final": 0.9}
    return {**states, **{name: SiteState(alpha, source.norm_states[name].sigma) for name, alpha in chosen.items()}}


@pytest.mark.parametrize("kind", SECTIONS)
@pytest.mark.parametrize("whole", [False, True])
def test_restored_as_the_training_had_it(tmp_path: Path, kind: str, whole: bool) -> None:
    generator = fresh()
    source = FrozenSource(SECTIONS[kind], generator)
    states = source.norm_states if whole else some_frozen(source)
    restored = restore(save_run(tmp_path / "run", source, dict(states)))
    tokens = residual_inputs(source.section, generator)
    with torch.no_grad():
        expected = frozen_decoder(source.section, source.weights, states).hidden_states(tokens)
        real = frozen_decoder(source.section, source.weights, dict.fromkeys(states, SiteState())).hidden_states(tokens)
        found = restored.model.hidden_states(tokens)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (real - expected).abs().max() > 1e-2 * expected.abs().max()


def test_nothing_else_takes_it_before_it_is_folded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = FrozenSource(SECTIONS["llama"])
    run = save_run(tmp_path / "run", source, some_frozen(source))
    line = "step-00000007: norm removal has changed 4 of its 11 norm sites, which its weights do not say: fold it first"
    assert line in refusal(lambda: convert(run, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    model = {key: value for key, value in plain(source.section).items() if value is not None}
    settings = small_settings(tmp_path / "next", model=model, train={"init_from": str(run), "steps": 4})
    with pytest.raises(HarnessError, match=r"train.init_from: .*norm removal has changed 4 of its 11"):
        train(settings)
    said = refusal(lambda: open_folded(run))
    assert "these sites are not frozen: layers.0.v, layers.0.q_norm, layers.0.k_norm, layers.1.qk" in said

    # Where nothing has been frozen yet, it is a model like any other.
    untouched = save_run(tmp_path / "early", source, dict.fromkeys(source.norm_states, SiteState()))
    assert RunSource(untouched).norm_states == {}
    convert(untouched, tmp_path / "early-out", proof="streamed")
    strange = save_run(tmp_path / "strange", source, {"layers.9.v": SiteState(1.0, 2.0)})
    assert "norm removal speaks of a site layers.9.v, which its model has not" in refusal(lambda: RunSource(strange))


@pytest.mark.parametrize("kind", SECTIONS)
def test_folded_it_is_a_run_like_any_other(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    generator = fresh()
    source = FrozenSource(SECTIONS[kind], generator)
    run = save_run(tmp_path / "run", source, dict(source.norm_states))
    conversion = convert(open_folded(run / "checkpoints" / "step-00000007"), tmp_path / "free", to="harness")
    assert conversion.proof is not None
    record = json.loads((tmp_path / "free" / "conversion.json").read_text())["source"]
    assert record["step"] == 7
    assert record["folded_norms"] == {name: state.sigma for name, state in source.norm_states.items()}

    tokens = residual_inputs(source.section, generator)
    frozen, free = restore(run).model, restore(tmp_path / "free").model
    assert free.section.norm_free
    with torch.no_grad():
        expected, found = frozen.logits(tokens), free.logits(tokens)
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    options = ["generate.prompt=the of", "generate.temperature=0", "generate.max_tokens=20"]
    texts = []
    for folder in (run, tmp_path / "free"):
        capsys.readouterr()
        assert main(["generate", str(folder), *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]

    # A run begins with it, without norms and within a first step of where it was.
    model = {key: value for key, value in plain(free.section).items() if value is not None}
    settings = small_settings(
        tmp_path / "next",
        model=model,
        train={"init_from": str(tmp_path / "free"), "steps": 4},
        data={"sequence_length": 32},
    )
    assert train(settings).folder.is_dir()
