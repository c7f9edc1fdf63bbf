"""Any boxes to any boxes, one writer or several, against numpy slicing."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.checkpoint import CheckpointError, CheckpointStore
from harness.parallel import Fragment
from tests.checkpoint.states import (
    assert_same_bits,
    blank_like,
    fragment_at,
    random_tensors,
    random_tiling,
    whole_fragments,
)


@pytest.mark.parametrize("shape", [(), (1,), (17,), (6, 9), (4, 5, 6), (3, 2, 4, 5), (5, 0, 3)])
def test_random_boxes_to_random_boxes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng()
    for trial in range(6):
        truth = torch.from_numpy(np.asarray(rng.normal(size=shape)))
        cuts = int(rng.integers(0, 9)) if shape else 0
        stored = [fragment_at("w", "master", truth, box) for box in random_tiling(rng, shape, cuts)]
        rng.shuffle(stored)  # type: ignore[arg-type]
        store = CheckpointStore(tmp_path / str(trial), max_file_bytes=int(rng.integers(1, 400)))
        store.save(trial, stored, {})
        requested = []
        for _ in range(8):
            starts = [int(rng.integers(0, size + 1)) for size in shape]
            stops = [int(rng.integers(start, size + 1)) for start, size in zip(starts, shape, strict=True)]
            steps = [int(rng.integers(1, 3)) for _ in shape]
            extents = [(stop - start) * step for start, stop, step in zip(starts, stops, steps, strict=True)]
            view = torch.full(extents, 99.0, dtype=torch.float64)[tuple(slice(None, None, step) for step in steps)]
            requested.append(Fragment("w", "master", shape, tuple(starts), view))
        store.load(trial, requested)
        for fragment in requested:
            box = tuple(slice(o, o + s) for o, s in zip(fragment.offsets, fragment.tensor.shape, strict=True))
            np.testing.assert_array_equal(fragment.tensor.numpy(), truth.numpy()[box])


class Agreement:
    """What an all-reduce does, among threads."""

    def __init__(self, writers: int) -> None:
        self._votes: list[Sequence[int]] = []
        self._result: list[int] = []
        self._barrier = threading.Barrier(writers, self._count, timeout=60)

    def _count(self) -> None:
        self._result, self._votes = [sum(numbers) for numbers in zip(*self._votes, strict=True)], []

    def __call__(self, numbers: Sequence[int]) -> list[int]:
        self._votes.append(numbers)
        self._barrier.wait()
        return self._result


def save_together(folder: Path, step: int, shares: list[list[Fragment]], state: dict) -> list[Exception | None]:
    add_up = Agreement(len(shares))

    def save(writer: int) -> Exception | None:
        store = CheckpointStore(folder, writer, len(shares), add_up=add_up, max_file_bytes=200)
        try:
            store.save(step, shares[writer], state)
        except Exception as error:
            return error
        return None

    with ThreadPoolExecutor(len(shares)) as pool:
        return list(pool.map(save, range(len(shares))))


@pytest.mark.parametrize("writers", [2, 3, 5])
def test_several_writers_save_one_checkpoint(tmp_path: Path, writers: int) -> None:
    rng = np.random.default_rng()
    tensors = random_tensors(4)
    shares: list[list[Fragment]] = [[] for _ in range(writers)]
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        for box in random_tiling(rng, tuple(tensor.shape), 4 if tensor.dim() else 0):
            shares[rng.integers(writers)].append(fragment_at(name, kind, tensor, box))
    if writers == 5:  # one that owns nothing
        shares[0] += shares[3]
        shares[3] = []
    assert save_together(tmp_path, 40, shares, {"a": 1}) == [None] * writers
    store = CheckpointStore(tmp_path)
    assert store.verify(40) == []
    assert not list((tmp_path / "step-00000040").glob("part-*"))
    loaded = blank_like(tensors)
    assert store.load(40, whole_fragments(loaded)) == {"a": 1}
    assert_same_bits(loaded, tensors)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_one_writer_that_fails_stops_all(tmp_path: Path, failing: int) -> None:
    tensor = torch.arange(6.0)
    shares = [[Fragment("w", "master", (6,), (2 * rank,), tensor[2 * rank : 2 * rank + 2])] for rank in range(3)]
    assert save_together(tmp_path, 1, shares, {}) == [None] * 3

    class Broken(list):
        def __iter__(self):  # type: ignore[no-untyped-def]
            raise RuntimeError("the device is lost")

    shares[failing] = Broken()
    failures = save_together(tmp_path, 2, shares, {})
    for rank, failure in enumerate(failures):
        if rank == failing:
            assert "the device is lost" in str(failure)
        else:
            assert isinstance(failure, CheckpointError)
            assert "another writer failed" in str(failure)
    assert CheckpointStore(tmp_path).latest_good(verify=True) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_fragments_of_several_writers_must_tile(tmp_path: Path) -> None:
    tensor = torch.arange(6.0)
    shares = [[Fragment("w", "master", (6,), (start,), tensor[start : start + 3])] for start in (0, 2)]
    failures = save_together(tmp_path, 2, shares, {})
    assert "tensor master/w: the parts (3,) at (0,) and (3,) at (2,) overlap" in str(failures[0])
    assert "another writer failed" in str(failures[1])
    assert CheckpointStore(tmp_path).steps() == []
