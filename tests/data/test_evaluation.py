"""A split read as windows, against a loop over its tokens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from harness.config import HarnessError
from harness.data import IGNORED, Batch, DataSection, EvaluationWindows, Prepared, text_bytes
from harness.data.batch import make_batch
from tests.data.helpers import random_documents

MakePrepared = Callable[..., tuple[DataSection, Prepared]]


def expected_windows(flat: list[int], length: int) -> list[tuple[list[int], list[int]]]:
    """Inputs and targets of each window, filled up with end-of-text and ignored targets."""
    windows = []
    for start in range(0, len(flat) - 1, length):
        pairs = [(flat[n], flat[n + 1]) for n in range(start, min(start + length, len(flat) - 1))]
        pairs += [(256, IGNORED)] * (length - len(pairs))
        windows.append(([a for a, _ in pairs], [b for _, b in pairs]))
    return windows


def expected_batch(windows: list[tuple[list[int], list[int]]], masking: bool) -> Batch:
    tokens, targets = torch.tensor([w[0] for w in windows]), torch.tensor([w[1] for w in windows])
    return make_batch(tokens, targets, eod=256, document_masking=masking, mask_after_end_of_text=masking)


@pytest.mark.parametrize("masking", [False, True])
def test_windows_against_a_loop(make_prepared: MakePrepared, rng: np.random.Generator, masking: bool) -> None:
    config, prepared = make_prepared(
        {"a": random_documents(rng, 80), "b": random_documents(rng, 80, longest=20)},
        document_masking=masking,
        mask_after_end_of_text=masking,
        sequence_length=13,
    )
    truth = {}
    for name in ("a", "b"):
        documents = list(text_bytes(prepared, name, "validation"))
        flat = [token for text in documents for token in [*text, 256]]
        assert flat == prepared.split(name, "validation").flat.tolist()
        truth[name] = expected_windows(flat, 13)
        assert sum(t != IGNORED for _, targets in truth[name] for t in targets) == len(flat) - 1
    empty = ([256] * 13, [IGNORED] * 13)
    for data_size, batch_size in ((1, 4), (2, 3), (3, 5), (1, 1000), (4, 1)):
        ranks = [EvaluationWindows(prepared, config, "validation", batch_size, r, data_size) for r in range(data_size)]
        assert len({len(rank) for rank in ranks}) == 1
        read = [list(rank) for rank in ranks]
        assert all(len(batches) == len(ranks[0]) for batches in read)
        assert read[0][0][1].tokens.equal(next(iter(ranks[0]))[1].tokens)  # can be iterated again
        for name in ("a", "b"):
            # The ranks take turns, so reading them in turn gives the windows in order.
            turns = zip(*[[b for n, b in batches if n == name] for batches in read], strict=True)
            got = [batch for turn in turns for batch in turn]
            rows = got[0].tokens.shape[0]
            assert {batch.tokens.shape for batch in got} == {(rows, 13)}
            assert rows == min(batch_size, -(-len(truth[name]) // data_size))
            windows = truth[name] + [empty] * (len(got) * rows - len(truth[name]))
            assert len(windows) == len(got) * rows < len(truth[name]) + rows * data_size
            for number, batch in enumerate(got):
                expected = expected_batch(windows[number * rows : (number + 1) * rows], masking)
                assert torch.equal(batch.tokens, expected.tokens)
                assert torch.equal(batch.targets, expected.targets)
                assert (batch.positions is None) == (not masking)
                if batch.positions is not None and expected.positions is not None:
                    assert torch.equal(batch.positions, expected.positions)


def test_limited_windows_are_spread_over_the_split(make_prepared: MakePrepared, rng: np.random.Generator) -> None:
    config, prepared = make_prepared({"a": random_documents(rng, 80)})
    flat = prepared.split("a", "validation").flat.tolist()
    windows = expected_windows(flat, 16)
    for limit in (1, 7, len(windows), len(windows) + 9):
        batches = [batch for _, batch in EvaluationWindows(prepared, config, "validation", 3, limit_samples=limit)]
        rows = torch.cat([batch.tokens for batch in batches])
        count = min(limit, len(windows))
        chosen = [number * len(windows) // count for number in range(count)]
        assert rows[:count].tolist() == [windows[number][0] for number in chosen]
        assert all((batch_row == 256).all() for batch_row in rows[count:])
    with pytest.raises(HarnessError, match="should be at least 1"):
        EvaluationWindows(prepared, config, "validation", 3, limit_samples=0)


def test_bits_per_byte_is_exact(make_prepared: MakePrepared, rng: np.random.Generator) -> None:
    """Bytes of the targets, summed over all windows, are the bytes of the text less those of the first token."""
    documents = random_documents(rng, 80)
    config, prepared = make_prepared({"a": documents}, tokenizer={"vocab_size": 500})
    table = torch.from_numpy(prepared.tokenizer.token_bytes().copy())
    total = 0
    for _, batch in EvaluationWindows(prepared, config, "validation", 4):
        total += int(table[batch.targets[batch.targets != IGNORED]].sum())
    part = prepared.split("a", "validation")
    text = b"".join(text_bytes(prepared, "a", "validation"))
    assert part.bytes == len(text)
    assert total == len(text) - int(table[int(part.flat[0])])


def test_text_bytes_up_to_a_limit(make_prepared: MakePrepared, rng: np.random.Generator) -> None:
    _, prepared = make_prepared({"a": random_documents(rng, 200)})
    everything = list(text_bytes(prepared, "a", "validation"))
    limit = sum(map(len, everything[:3])) + 1
    limited = list(text_bytes(prepared, "a", "validation", limit))
    assert limited == [*everything[:3], everything[3][:1]]
    assert list(text_bytes(prepared, "a", "validation", 10**9)) == everything
