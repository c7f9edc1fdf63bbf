"""Markov sources against closed forms and counts; the study, tiny: once and no more, and what its report says."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.config import HarnessError, validate
from harness.studies.tokenization import MarkovSource, report, run, status
from harness.studies.tokenization.config import TokenizationStudySection
from harness.studies.tokenization.runs import cells, prepare, run_cells
from harness.studies.tokenization.summary import rows


@pytest.mark.parametrize(("order", "alphabet"), [(1, 2), (2, 2), (3, 3), (5, 2)])
def test_switching_has_its_closed_form(order: int, alphabet: int) -> None:
    probability = float(np.random.default_rng().uniform(0.05, 0.45))
    source = MarkovSource.switching(order, probability, alphabet)
    stays = -(1 - probability) * math.log(1 - probability)
    switches = -probability * math.log(probability / (alphabet - 1))
    assert source.entropy_rate() == pytest.approx(stays + switches, abs=1e-12)
    for symbols in range(order):
        assert source.context_loss(symbols) == pytest.approx(math.log(alphabet), abs=1e-9)


@pytest.mark.parametrize(("order", "alphabet"), [(1, 4), (2, 3), (3, 2)])
def test_any_table_beside_its_eigenvector_and_its_text(order: int, alphabet: int) -> None:
    generator = np.random.default_rng()
    source = MarkovSource.dirichlet(order, alphabet, 0.5, int(generator.integers(1 << 30)))
    states = alphabet**order
    moves = np.zeros((states, states))
    for state in range(states):
        for symbol in range(alphabet):
            moves[state, (state * alphabet + symbol) % states] += source.table[state, symbol]
    values, vectors = np.linalg.eig(moves.T)
    vector = np.real(vectors[:, np.argmin(abs(values - 1))])
    np.testing.assert_allclose(source.stationary(), vector / vector.sum(), atol=1e-9)

    symbols = source.sample(200, 2000, generator)
    counts = Counter(tuple(row[place : place + order + 1]) for row in symbols for place in range(2000 - order))
    total = sum(counts.values())
    contexts: Counter[tuple[int, ...]] = Counter()
    for gram, count in counts.items():
        contexts[gram[:-1]] += count
    measured = -sum(count / total * math.log(count / contexts[gram[:-1]]) for gram, count in counts.items())
    assert measured == pytest.approx(source.entropy_rate(), abs=0.01)
    ones = np.bincount(symbols.ravel(), minlength=alphabet) / symbols.size
    assert -(ones[ones > 0] * np.log(ones[ones > 0])).sum() == pytest.approx(source.unigram_loss(), abs=0.02)
    losses = [source.context_loss(length) for length in range(order + 1)]
    assert losses == sorted(losses, reverse=True), "more context never hurts"
    assert losses[-1] == source.entropy_rate()


def test_text_is_its_symbols() -> None:
    source = MarkovSource.dirichlet(2, 5, 1.0, 3)
    symbols = source.sample(3, 50, np.random.default_rng(7))
    text = source.text(3, 50, np.random.default_rng(7))
    assert text == ["".join("abcde"[symbol] for symbol in row) for row in symbols]


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "tokenization",
        "folder": str(folder / "study"),
        "workers": 1,
        "seeds": 2,
        "sources": {"switching": {"kind": "switching", "order": 2, "probability": 0.1}},
        "symbols": 60_000,
        "document_symbols": 3000,
        "validation_documents": 8,
        "tokenizers": {"none": {"kind": "bytes"}, "bpe": {"kind": "sentencepiece", "vocab_size": 300}},
        "models": {"llama": {"family": "llama", "layers": 1, "hidden_size": 32, "heads": 2}},
        "sequence_length": 32,
        "sequences": 8,
        "steps": 60,
        "optimizer": {"learning_rate": 1e-2},
        "validations": 3,
        "windows": 16,
        **changes,
    }


def write(folder: Path, **changes: Any) -> tuple[Path, TokenizationStudySection]:
    path = folder / "study.yaml"
    path.write_text(json.dumps(values(folder, **changes)))  # JSON is YAML
    return path, validate(TokenizationStudySection, values(folder, **changes), "test")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TokenizationStudySection]:
    path, config = write(tmp_path_factory.mktemp("tokenization"))
    run(path)
    return path, config


def test_losses_lie_between_the_bounds(finished: tuple[Path, TokenizationStudySection]) -> None:
    """In nats a symbol, whatever a token is."""
    _, config = finished
    results = [cell.result(config) for cell in cells(config)]
    assert all(result is not None for result in results)
    by_tokenizer = {row["tokenizer"]: row for row in rows([result for result in results if result is not None])}
    for row in by_tokenizer.values():
        assert 0.98 * row["entropy_rate"] < row["loss"] < 0.95 * row["unigram_loss"]
    assert by_tokenizer["bpe"]["symbols_a_token"] > 2
    assert by_tokenizer["none"]["symbols_a_token"] == 1.0
    assert by_tokenizer["none"]["token_unigram_loss"] == pytest.approx(math.log(2), abs=1e-2)


def test_token_statistics_are_those_of_the_text(finished: tuple[Path, TokenizationStudySection]) -> None:
    _, config = finished
    prepared = prepare(config, "switching", "bpe")
    split = prepared.split("markov", "train")
    tokens = [token for token in split.flat.tolist() if token != prepared.tokenizer.eod]
    counts = Counter(tokens)
    symbols = len(prepared.tokenizer.decode(tokens))
    entropy = -sum(count / len(tokens) * math.log(count / len(tokens)) for count in counts.values())
    result = cells(config)[1].result(config)
    assert result is not None
    assert result["symbols_a_token"] == pytest.approx(symbols / len(tokens))
    assert result["distinct_tokens"] == len(counts)
    assert result["token_unigram_loss"] == pytest.approx(entropy * len(tokens) / symbols)


def test_a_second_run_does_nothing(
    finished: tuple[Path, TokenizationStudySection], capsys: pytest.CaptureFixture[str]
) -> None:
    path, config = finished
    assert run_cells(config) == 0
    status(path)
    assert "4 of 4 runs are done" in capsys.readouterr().out


def test_the_report_has_the_bounds(finished: tuple[Path, TokenizationStudySection]) -> None:
    path, config = finished
    report(path)
    found = json.loads((config.path / "report.json").read_text())
    assert len(found["runs"]) == 4
    assert len(found["rows"]) == 2
    page = (config.path / "report.html").read_text()
    assert "entropy rate" in page
    assert str(config.path.parent) not in page


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": {"s": {"kind": "switching", "order": 2}}}, "probability belongs to kind switching"),
        ({"sources": {"s": {"kind": "dirichlet", "order": 30, "concentration": 1}}}, "more than 1,048,576 states"),
        ({"models": {"m": {"family": "llama", "layers": 1, "hidden_size": 8}}}, "models.m"),
        ({"symbols": 2000}, "should be at least document_symbols"),
    ],
)
def test_bad_configurations_are_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HarnessError, match=message) as caught:
        write(tmp_path, **changes)
    assert "\n" not in str(caught.value)
