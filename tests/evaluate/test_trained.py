"""A trained run put to use: restored, scored token by token, and made to write."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from harness import runs
from harness.cli import main
from harness.config import HarnessError
from harness.data import EvaluationWindows, prepare
from harness.evaluate import EvaluateSection, GenerateSection, complete, evaluate, generate, restore
from harness.settings import Settings
from harness.train import train
from tests.model.reference import reference_model
from tests.small_run import small_settings


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Settings]:
    folder = tmp_path_factory.mktemp("trained")
    settings = small_settings(
        folder,
        train={"steps": 60, "precision": "bf16"},
        validation={"samples": None},
        checkpoint={"every_steps": 30},
        data={"mask_after_end_of_text": True},
        # In training only: validation is plain cross-entropy without dropout.
        loss={"z_loss": 0.02, "label_smoothing": 0.1, "tau": 1.2},
        model={"dropout": 0.3},
    )
    return train(settings).folder, settings


def test_evaluate_gives_the_loss_of_an_independent_model(run: tuple[Path, Settings]) -> None:
    folder, settings = run
    result = evaluate(folder, EvaluateSection(), settings.data, settings.parallel)
    restored = restore(folder)
    model = reference_model(restored.model.section, restored.model).eval()
    nll, entropy, tokens, correct = 0.0, 0.0, 0, 0
    for _, batch in EvaluationWindows(prepare(settings.data), settings.data, "validation", 3):
        with torch.no_grad():
            logits = model(batch.tokens).logits.double()
        valid = batch.targets >= 0
        nll += torch.nn.functional.cross_entropy(logits[valid], batch.targets[valid], reduction="sum").item()
        entropy += torch.distributions.Categorical(logits=logits[valid]).entropy().sum().item()
        correct += int((logits.argmax(-1) == batch.targets)[valid].sum())
        tokens += int(valid.sum())
    assert result["tokens"] == tokens
    assert result["loss"] == pytest.approx(nll / tokens, rel=1e-5)
    assert result["accuracy"] == correct / tokens
    assert result["entropy"] == pytest.approx(entropy / tokens, rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(nll / math.log(2) / result["bytes"], rel=1e-5)
    assert set(result["corpora"]) == {"first", "second"}
    # bf16 working weights in the run, fp32 masters here.
    assert runs.read(folder).metrics[-1]["validation_loss"] == pytest.approx(result["loss"], rel=0.01)


def test_per_token_losses_add_up(run: tuple[Path, Settings], tmp_path: Path) -> None:
    folder, settings = run
    section = EvaluateSection(split="test", per_token=str(tmp_path / "losses.npz"), batch_size=3)
    result = evaluate(folder, section, settings.data, settings.parallel)
    with np.load(tmp_path / "losses.npz") as arrays:
        columns = {"losses": "loss", "entropies": "entropy", "correct": "accuracy"}
        assert set(arrays) == {f"{corpus}/{name}" for corpus in ("first", "second") for name in ("tokens", *columns)}
        for corpus in ("first", "second"):
            for name, total in columns.items():
                assert len(arrays[f"{corpus}/{name}"]) == len(arrays[f"{corpus}/tokens"])
                mean = arrays[f"{corpus}/{name}"].astype(np.float64).mean()
                assert mean == pytest.approx(result["corpora"][corpus][total], rel=1e-5)
            # Without end-of-text tokens, the byte tokens are the text.
            text = bytes(token for token in arrays[f"{corpus}/tokens"] if token < 256).decode()
            assert " the " in text


def test_restore_finds_steps_and_checkpoint_folders(run: tuple[Path, Settings]) -> None:
    folder, _ = run
    newest, older = restore(folder), restore(folder, step=30)
    assert (newest.step, older.step) == (60, 30)
    same = restore(folder / "checkpoints" / "step-00000030")
    for (name, weight), other in zip(same.model.named_parameters(), older.model.parameters(), strict=True):
        assert torch.equal(weight, other), name
    assert any(not torch.equal(a, b) for a, b in zip(newest.model.parameters(), older.model.parameters(), strict=True))
    with pytest.raises(HarnessError, match="not a checkpoint; expected a folder such as step-00000200"):
        restore(folder / "checkpoints" / "latest")


def test_greedy_completion_is_the_argmax_of_whole_passes(run: tuple[Path, Settings]) -> None:
    restored = restore(run[0])
    section = GenerateSection(prompt="the of", max_tokens=20, temperature=0.0)
    tokens = restored.tokenizer.encode(section.prompt)
    for _ in range(section.max_tokens):
        with torch.no_grad():
            token = int(restored.model.logits(torch.tensor([tokens]))[0, -1].argmax())
        if token == restored.tokenizer.eod:
            break
        tokens.append(token)
    text = complete(restored.model, restored.tokenizer, section)
    assert text
    assert section.prompt + text == restored.tokenizer.decode(tokens)


def test_sampling_follows_the_distribution_it_was_asked_for(run: tuple[Path, Settings]) -> None:
    restored = restore(run[0])
    prompt = "the "
    with torch.no_grad():
        logits = restored.model.logits(torch.tensor([restored.tokenizer.encode(prompt)]))[0, -1].double()
    order = logits.argsort(descending=True)

    def draws(**options: float) -> Counter[str]:
        section = GenerateSection(prompt=prompt, max_tokens=1, **options)
        generator = torch.Generator().manual_seed(4)
        return Counter(complete(restored.model, restored.tokenizer, section, generator) for _ in range(600))

    top = draws(temperature=0.7, top_k=3)
    expected = (logits[order[:3]] / 0.7).softmax(0)
    names = [restored.tokenizer.decode([int(token)]) for token in order[:3]]
    assert set(top) == set(names)
    for name, probability in zip(names, expected.tolist(), strict=True):
        assert abs(top[name] / 600 - probability) < 4 * math.sqrt(probability * (1 - probability) / 600)
    probabilities = logits.softmax(0)[order]
    nucleus = int((probabilities.cumsum(0) < 0.5).sum()) + 1
    allowed = {restored.tokenizer.decode([int(token)]) for token in order[:nucleus]}
    assert set(draws(temperature=1.0, top_p=0.5)) <= allowed


def test_generation_stops_at_the_models_last_position(run: tuple[Path, Settings]) -> None:
    restored = restore(run[0])
    section = GenerateSection(prompt="the of", max_tokens=500, temperature=1.5)
    lengths = []
    for seed in range(5):
        text = complete(restored.model, restored.tokenizer, section, torch.Generator().manual_seed(seed))
        lengths.append(len(text))  # a byte a token; bytes that are no character make fewer characters
    assert 10 < max(lengths) <= 32 + 1 - len("the of")


def test_the_verbs_print_what_the_functions_return(
    run: tuple[Path, Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, settings = run
    capsys.readouterr()
    assert main(["evaluate", str(folder), "evaluate.split=test"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == evaluate(folder, EvaluateSection(split="test"), settings.data, settings.parallel)
    options = ["generate.prompt=the of", "generate.max_tokens=8", "generate.samples=2", "generate.seed=3"]
    assert main(["generate", str(folder), *options]) == 0
    out = capsys.readouterr().out
    texts = generate(folder, GenerateSection(prompt="the of", max_tokens=8, samples=2, seed=3), settings.parallel)
    assert out == "".join(f"the of{text}\n" for text in texts)
