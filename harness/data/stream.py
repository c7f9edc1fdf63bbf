"""The training stream: sample k is a function of (seed, k), whoever reads it and in what batches."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from harness.config import HarnessError

from .batch import Batch, make_batch
from .blend import Blend
from .config import DataSection
from .prepared import Prepared
from .samples import CorpusSamples


@dataclass(frozen=True)
class _Request:
    """What one rank asks for at one step."""

    start: int
    global_batch_size: int
    micro_batch_size: int
    data_rank: int
    data_size: int


@dataclass(frozen=True)
class _Answer:
    batches: list[Batch]
    stop: int
    """The sample number after the last one that the step took, on any rank."""


class TokenStream:
    """Blended, shuffled, endless training samples.

    A sample's number in the stream decides what it is: which corpus (by the blend), which epoch and place in it (by
    the corpus's own count). Layout, batch size and length of the run have no part in it. The next step is read ahead
    on a thread. One consumer at a time.
    """

    def __init__(self, prepared: Prepared, config: DataSection, *, seed: int) -> None:
        """Raises HarnessError where a corpus's training split holds no whole sample."""
        prepared.require("train", config.sequence_length + 1)
        splits = [prepared.split(corpus.name, "train") for corpus in config.corpora]
        self._corpora = [CorpusSamples(split, prepared.tokenizer, config.sequence_length, seed) for split in splits]
        self._blend = Blend(
            [
                split.tokens if corpus.weight is None else corpus.weight
                for corpus, split in zip(config.corpora, splits, strict=True)
            ]
        )
        self._eod = prepared.tokenizer.eod
        self._config = config
        self._consumed_samples = 0
        self._skipped: list[tuple[int, int]] = []
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="token-stream")
        self._ahead: tuple[_Request, Future[_Answer]] | None = None

    @property
    def consumed_samples(self) -> int:
        """The sample number that comes next: all below it were returned or are skipped."""
        return self._consumed_samples

    def read(
        self, global_batch_size: int, micro_batch_size: int, data_rank: int = 0, data_size: int = 1
    ) -> list[Batch]:
        """This rank's micro-batches of the next step.

        The step takes the next `global_batch_size` samples that are not skipped; micro-batch m of rank r is the
        (m * data_size + r)-th group of `micro_batch_size` of them. Raises HarnessError where the sizes do not divide,
        and whatever reading raised.
        """
        if global_batch_size < 1 or global_batch_size % (micro_batch_size * data_size):
            raise HarnessError(
                f"a global batch of {global_batch_size} samples does not divide into micro-batches of "
                f"{micro_batch_size} on {data_size} data-parallel ranks: it should be a multiple of "
                f"{micro_batch_size * data_size}"
            )
        request = _Request(self._consumed_samples, global_batch_size, micro_batch_size, data_rank, data_size)
        if self._ahead is not None and self._ahead[0] == request:
            future = self._ahead[1]
        else:
            self._drop_ahead()
            future = self._reader.submit(self._produce, request, list(self._skipped))
        self._ahead = None
        answer = future.result()
        self._consumed_samples = answer.stop
        following = _Request(answer.stop, global_batch_size, micro_batch_size, data_rank, data_size)
        self._ahead = (following, self._reader.submit(self._produce, following, list(self._skipped)))
        return answer.batches

    def skip(self, start: int, stop: int) -> None:
        """Pass over samples [start, stop) when the stream comes to them; what was returned already is not undone."""
        if not 0 <= start < stop:
            raise HarnessError(f"samples [{start}, {stop}) to skip should be a range of numbers from 0 on")
        self._skipped = _merge([*self._skipped, (start, stop)])
        self._drop_ahead()

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: what `read` returned counts, what was read ahead does not. JSON."""
        return {"consumed_samples": self._consumed_samples, "skipped": [list(window) for window in self._skipped]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken. Raises HarnessError where it is no such state."""
        try:
            consumed = state["consumed_samples"]
            skipped = [(start, stop) for start, stop in state["skipped"]]
        except (KeyError, TypeError, ValueError) as error:
            raise HarnessError(f"not the state of a token stream ({error!r}): {state!r}"[:300]) from None
        numbers = [consumed, *(number for window in skipped for number in window)]
        if not all(type(number) is int and number >= 0 for number in numbers) or any(a >= b for a, b in skipped):
            raise HarnessError(f"not the state of a token stream: {state!r}"[:300])
        self._drop_ahead()
        self._consumed_samples = consumed
        self._skipped = _merge(skipped)

    def close(self) -> None:
        """End the reading thread."""
        self._drop_ahead()
        self._reader.shutdown(wait=True)

    def _drop_ahead(self) -> None:
        """Forget the step that was read ahead. The thread takes one step at a time, so nothing runs beside it."""
        if self._ahead is not None:
            self._ahead[1].cancel()
            self._ahead = None

    def _produce(self, request: _Request, skipped: list[tuple[int, int]]) -> _Answer:
        """The micro-batches of a step; runs on the reading thread."""
        numbers = _take(request.start, request.global_batch_size, skipped)
        mine = numbers.reshape(-1, request.data_size, request.micro_batch_size)[:, request.data_rank]
        batches = []
        for micro in mine:
            corpora, places = self._blend.locate(micro)
            samples = [
                self._corpora[corpus].read(place)
                for corpus, place in zip(corpora.tolist(), places.tolist(), strict=True)
            ]
            batches.append(
                make_batch(
                    torch.stack([tokens for tokens, _ in samples]),
                    torch.stack([targets for _, targets in samples]),
                    eod=self._eod,
                    document_masking=self._config.document_masking,
                    mask_after_end_of_text=self._config.mask_after_end_of_text,
                )
            )
        return _Answer(batches, int(numbers[-1]) + 1)


def _take(start: int, count: int, skipped: list[tuple[int, int]]) -> np.ndarray:
    """int64 [count]: the first `count` numbers from `start` on that lie in no skipped window (sorted, disjoint)."""
    parts = []
    for first, stop in skipped:
        if stop <= start:
            continue
        if first > start:
            parts.append(np.arange(start, min(first, start + count), dtype=np.int64))
            count -= len(parts[-1])
        if count == 0:
            break
        start = stop
    if count:
        parts.append(np.arange(start, start + count, dtype=np.int64))
    return np.concatenate(parts)


def _merge(windows: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same numbers as sorted, disjoint windows."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(windows):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged
