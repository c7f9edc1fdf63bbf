"""The stream's order: by seed and sample number alone, through resumes, layouts, batch sizes and skipped windows."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.config import HarnessError
from harness.data import IGNORED, Batch, DataSection, Prepared, TokenStream, prepare
from harness.data.batch import make_batch
from harness.data.blend import FIRST_SIZE, Blend
from harness.data.prepared import PreparedSplit
from harness.data.samples import CorpusSamples
from harness.data.stream import _take
from harness.text import Progress
from tests.data.helpers import random_documents

MakeConfig = Callable[..., DataSection]
MakePrepared = Callable[..., tuple[DataSection, Prepared]]
NO_SPLIT = {"validation_share": 0.0, "test_share": 0.0}


@contextmanager
def streaming(prepared: Prepared, config: DataSection, seed: int = 1) -> Iterator[TokenStream]:
    stream = TokenStream(prepared, config, seed=seed)
    try:
        yield stream
    finally:
        stream.close()


def read_samples(stream: TokenStream, *batch_sizes: int) -> torch.Tensor:
    """int64 [samples, S + 1]: inputs with the last target, in stream order."""
    rows = [stream.read(size, 1) for size in batch_sizes]
    batches = [batch for step in rows for batch in step]
    return torch.cat([torch.cat([batch.tokens, batch.targets[:, -1:]], 1) for batch in batches])


def same(left: list[Batch], right: list[Batch]) -> bool:
    def tensors(batch: Batch) -> list[torch.Tensor | None]:
        return [batch.tokens, batch.targets, batch.positions, batch.document_ids]

    pairs = [pair for a, b in zip(left, right, strict=True) for pair in zip(tensors(a), tensors(b), strict=True)]
    return all(a is None and b is None if a is None or b is None else torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def blended(make_prepared: MakePrepared, rng: np.random.Generator) -> tuple[DataSection, Prepared]:
    """Three small corpora, several epochs of which pass in a test, with document masking."""
    corpora = {name: random_documents(rng, count) for name, count in (("a", 20), ("b", 9), ("c", 30))}
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    return make_prepared(corpora, weights, document_masking=True, mask_after_end_of_text=True, **NO_SPLIT)


def test_resumed_at_any_step_bit_for_bit(blended: tuple[DataSection, Prepared], rng: np.random.Generator) -> None:
    config, prepared = blended
    with streaming(prepared, config) as stream:
        stream.skip(100, 117)
        states, steps = [stream.state_dict()], []
        for _ in range(40):
            steps.append(stream.read(12, 3))
            states.append(stream.state_dict())
    assert any((batch.targets == IGNORED).any() for step in steps for batch in step)
    assert all(batch.positions is not None and batch.document_ids is not None for step in steps for batch in step)
    for start in (0, 1, 8, 9, *rng.integers(10, 40, 3).tolist()):
        with streaming(prepared, config) as stream:
            stream.load_state_dict(states[start])
            for number in range(start, min(start + 4, 40)):
                assert same(stream.read(12, 3), steps[number])
                assert stream.state_dict() == states[number + 1]
    with streaming(prepared, config) as stream:  # backwards, on a stream that has read ahead
        for start in (30, 3):
            stream.load_state_dict(states[start])
            assert same(stream.read(12, 3), steps[start])
    with streaming(prepared, config, seed=2) as stream:
        assert not same(stream.read(12, 3), steps[0])


def test_order_is_independent_of_batch_size_and_layout(blended: tuple[DataSection, Prepared]) -> None:
    config, prepared = blended
    with streaming(prepared, config) as stream:
        expected = read_samples(stream, *[1] * 96)
    with streaming(prepared, config) as stream:
        assert torch.equal(read_samples(stream, 8, 8, 32, 2, 6, 40), expected)  # changed in the middle of the run
        assert stream.consumed_samples == 96
    for data_size, micro in ((2, 4), (3, 2), (4, 1)):
        seen = {}
        for rank in range(data_size):
            with streaming(prepared, config) as stream:
                for step in range(4):
                    for number, batch in enumerate(stream.read(24, micro, rank, data_size)):
                        assert batch.tokens.shape == (micro, 16)
                        for row in range(micro):
                            seen[step * 24 + (number * data_size + rank) * micro + row] = batch.tokens[row]
        assert torch.equal(torch.stack([seen[number] for number in range(96)]), expected[:, :-1])


class Wide:
    """A tokenizer in name only, of more ids than 16 bits hold."""

    vocab_size = 100_000
    eod = 99_999
    pad = -1
    unique_identifiers = {"name": "wide"}  # noqa: RUF012


def test_an_epoch_holds_every_token_once(tmp_path: Path, rng: np.random.Generator) -> None:
    """Each token has its own id here, so windows can be told apart; documents hold one or two sequences."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "t.bin"), dtype=np.int32)
    lengths = rng.integers(1, 50, 60)
    starts = np.concatenate([[0], np.cumsum(lengths)]) + 70_000
    documents = [np.arange(a, b) for a, b in pairwise(starts)]
    for number, document in enumerate(documents):
        half = len(document) // 2 if number % 3 == 0 and len(document) > 1 else len(document)
        builder.add_document(document, [part for part in (half, len(document) - half) if part])
    builder.finalize(str(tmp_path / "t.idx"))
    first, count = 5, 40  # a range of documents, as `indexed` with `split` has it
    tokens = np.concatenate(documents[first : first + count])
    split = PreparedSplit("t", "train", str(tmp_path / "t"), count, len(tokens), None, first)
    samples = CorpusSamples(split, Wide(), 8, seed=3)  # type: ignore[arg-type]
    assert samples.samples_per_epoch == (len(tokens) - 1) // 8
    orders = []
    for epoch in range(3):
        numbers = range(epoch * samples.samples_per_epoch, (epoch + 1) * samples.samples_per_epoch)
        windows = [samples.read(number) for number in numbers]
        inputs = torch.cat([inputs for inputs, _ in windows]).tolist()
        assert len(set(inputs)) == len(inputs) == 8 * samples.samples_per_epoch
        assert set(inputs) <= set(tokens.tolist())
        for inputs_of_one, targets in windows:
            assert torch.equal(inputs_of_one[1:], targets[:-1])
        orders.append(inputs)
    assert orders[0] != orders[1] != orders[2]
    assert samples.read(0)[0].tolist() == orders[0][:8]  # back to the first epoch
    small = Wide()
    small.vocab_size = 70_100
    late = next(place for place, token in enumerate(orders[0]) if token >= 70_100) // 8
    with pytest.raises(HarnessError, match=r"t.bin holds token id \d+, the tokenizer has 70100 ids"):
        CorpusSamples(split, small, 8, seed=3).read(late)  # type: ignore[arg-type]


def test_blend_proportions(make_prepared: MakePrepared, rng: np.random.Generator) -> None:
    weights = {"a": 5.0, "b": 3.0, "c": 2.0}
    config, prepared = make_prepared({name: [name * 500] * 3 for name in weights}, weights, **NO_SPLIT)
    with streaming(prepared, config) as stream:
        rows = read_samples(stream, 500)
    letters = ["".join(sorted({chr(token) for token in row if token != 256})) for row in rows.tolist()]
    for count in (10, 100, 500):
        found = Counter(letters[:count])
        assert all(abs(found[name] - count * weight / 10) <= 1 for name, weight in weights.items())


def test_blend_by_token_count(make_prepared: MakePrepared) -> None:
    """Without weights a corpus counts by its tokens, so that epochs go round together."""
    config, prepared = make_prepared({"a": ["a" * 99] * 60, "b": ["b" * 99] * 20}, **NO_SPLIT)
    with streaming(prepared, config) as stream:
        rows = read_samples(stream, 400)
    assert sum(97 in row for row in rows.tolist()) == 300


def test_blend_table(rng: np.random.Generator) -> None:
    """Against the rule itself, and a longer table begins with the shorter."""
    weights = rng.random(4) + 0.05
    share = weights / weights.sum()
    taken = np.zeros(4)
    corpora, places = [], []
    for number in range(300):
        corpus = int(np.argmax(share * max(number, 1) - taken))
        corpora.append(corpus)
        places.append(int(taken[corpus]))
        taken[corpus] += 1
    short = Blend(weights.tolist())
    found = short.locate(np.arange(300))
    assert found[0].tolist() == corpora
    assert found[1].tolist() == places
    far = np.arange(FIRST_SIZE - 50, FIRST_SIZE + 50)
    before = short.locate(far[:50])
    after = short.locate(far)  # makes the table longer
    direct = Blend(weights.tolist()).locate(far)
    for place in range(2):
        assert np.array_equal(before[place], after[place][:50])
        assert np.array_equal(after[place], direct[place])


def test_skipped_windows(blended: tuple[DataSection, Prepared], rng: np.random.Generator) -> None:
    config, prepared = blended
    with streaming(prepared, config) as stream:
        everything = read_samples(stream, 80)
    with streaming(prepared, config) as stream:
        first = read_samples(stream, 10)
        stream.skip(5, 12)  # its first half has been read already
        stream.skip(20, 23)
        stream.skip(22, 30)
        stream.skip(78, 90)
        rest = read_samples(stream, 10, 40, 8)
        state = stream.state_dict()
    kept = [*range(10), *range(12, 20), *range(30, 78)]
    assert torch.equal(torch.cat([first, rest])[: len(kept)], everything[kept])
    assert state == {"consumed_samples": 92, "skipped": [[5, 12], [20, 30], [78, 90]]}
    windows = [(2, 5), (7, 8), (8 + 3, 30)]
    for start in range(35):
        numbers = [n for n in range(start, 100) if not any(a <= n < b for a, b in windows)]
        for count in (1, 4, 20):
            assert _take(start, count, windows).tolist() == numbers[:count]


def test_bad_states_and_sizes(blended: tuple[DataSection, Prepared]) -> None:
    config, prepared = blended
    with streaming(prepared, config) as stream:
        bad_states: list[dict[str, Any]] = [
            {},
            {"consumed_samples": -1, "skipped": []},
            {"consumed_samples": 1.5, "skipped": []},
            {"consumed_samples": 1, "skipped": [[3, 2]]},
            {"consumed_samples": 1, "skipped": [3]},
        ]
        for state in bad_states:
            with pytest.raises(HarnessError, match=r"^not the state of a token stream"):
                stream.load_state_dict(state)
        for sizes in ((0, 1, 0, 1), (10, 4, 0, 1), (12, 4, 0, 2)):
            with pytest.raises(HarnessError, match="should be a multiple of"):
                stream.read(*sizes)
        with pytest.raises(HarnessError, match=r"samples \[5, 5\) to skip"):
            stream.skip(5, 5)
        assert stream.state_dict() == {"consumed_samples": 0, "skipped": []}


def test_errors_of_the_reading_thread_arrive(
    blended: tuple[DataSection, Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, prepared = blended
    read = CorpusSamples.read

    def fail_late(self: CorpusSamples, number: int) -> Any:
        if failing:
            raise HarnessError("the disk is gone")
        return read(self, number)

    failing = False
    monkeypatch.setattr(CorpusSamples, "read", fail_late)
    before = threading.active_count()
    with streaming(prepared, config) as stream:
        stream.read(4, 2)
        stream.read(4, 2)
        failing = True
        said: list[str] = []
        while not said:  # what was read ahead in time still comes
            try:
                stream.read(4, 2)
            except HarnessError as error:
                said.append(str(error))
        assert said == ["the disk is gone"]
        position = stream.consumed_samples
        failing = False
        stream.read(4, 2)
        assert stream.consumed_samples == position + 4
    assert threading.active_count() == before


def test_masking_against_a_loop(rng: np.random.Generator) -> None:
    eod = 9
    for _ in range(30):
        rows, length = int(rng.integers(1, 5)), int(rng.integers(2, 20))
        tokens = torch.from_numpy(rng.choice([1, 2, eod], (rows, length)))
        targets = torch.from_numpy(rng.choice([1, 2, eod, IGNORED], (rows, length)))
        batch = make_batch(tokens, targets, eod=eod, document_masking=True, mask_after_end_of_text=True)
        assert batch.positions is not None
        assert batch.document_ids is not None
        valid = 0
        for row in range(rows):
            position = document = 0
            for place in range(length):
                assert batch.positions[row, place] == position
                assert batch.document_ids[row, place] == document
                ends = tokens[row, place] == eod
                assert batch.targets[row, place] == (IGNORED if ends else targets[row, place])
                valid += int(batch.targets[row, place] != IGNORED)
                position, document = (0, document + 1) if ends else (position + 1, document)
        assert batch.valid_tokens() == valid
        assert batch.positions.dtype == batch.document_ids.dtype == batch.targets.dtype == torch.int64
        plain = make_batch(tokens, targets, eod=eod, document_masking=False, mask_after_end_of_text=False)
        assert plain.positions is None
        assert plain.document_ids is None
        assert torch.equal(plain.targets, targets)
        assert plain.to("cpu").valid_tokens() == int((targets != IGNORED).sum())


def test_existing_megatron_dataset(
    tmp_path: Path, make_config: MakeConfig, make_prepared: MakePrepared, rng: np.random.Generator, quiet: Progress
) -> None:
    _, source = make_prepared({"a": random_documents(rng, 100)}, **NO_SPLIT)
    prefix = source.split("a", "train").prefix
    config = make_config(
        folder=str(tmp_path / "other"),
        corpora=[{"name": "there", "indexed": prefix + ".bin", "split": [0.8, 0.15, 0.05]}],
        document_masking=True,
    )
    prepared = prepare(config, progress=quiet)
    parts = prepared.corpora["there"]
    assert [parts[split].documents for split in parts] == [80, 15, 5]
    flat = np.array(source.split("a", "train").flat)
    assert np.array_equal(np.concatenate([parts[split].flat for split in parts]), flat)
    with streaming(prepared, config) as stream:
        held_out = len(parts["validation"].flat) + len(parts["test"].flat)
        text = bytes(token for token in flat[: len(flat) - held_out].tolist() if token < 256)
        for row in read_samples(stream, 30).tolist():
            for piece in bytes(min(token, 255) for token in row).split(b"\xff"):
                assert piece in text
    # Another tokenizer is noticed: by ids that it does not have, or by documents that do not end.
    bad = flat.copy()
    bad[len(bad) // 2] = 300
    Path(prefix + ".bin").write_bytes(bad.tobytes())
    with pytest.raises(HarnessError, match=r"train.bin holds token id 300, the tokenizer has ids 0 to 256"):
        prepare(config, progress=quiet)
    Path(prefix + ".bin").write_bytes(np.where(flat == 256, 10, flat).tobytes())
    with pytest.raises(HarnessError, match=r"no document of .*train.bin ends with end-of-text \(id 256\)"):
        prepare(config, progress=quiet)
    prepare(config.model_copy(update={"document_masking": False}), progress=quiet)


def test_in_a_process_group(blended: tuple[DataSection, Prepared], tmp_path: Path) -> None:
    """megatron-core takes other branches where torch.distributed is up; the samples are the same."""
    config, prepared = blended
    with streaming(prepared, config) as stream:
        expected = read_samples(stream, 20)
    if torch.distributed.is_initialized():
        pytest.skip("another test left a process group behind")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with streaming(prepared, config) as stream:
            assert torch.equal(read_samples(stream, 20), expected)
    finally:
        torch.distributed.destroy_process_group()
