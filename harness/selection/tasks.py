"""What is computed of documents: in this process or in others, a batch at a time.

Passes want different things of a text: `measure` everything that ranks it, `estimate` features of one that is in the
race, `score` its exact scores, `inspect` what decides whether a document near the top may be chosen (tokens, MinHash
signature, leaked targets).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from harness.text import Unusable

from .config import SelectSettings
from .documents import Document, Unit, read_document
from .leaks import LeakCheck
from .methods import Scorer, open_scorer
from .pool import read_texts
from .signatures import Signer
from .targets import Targets
from .work import STAGES, Arrays

WORTH_RACING = 4
"""How many times as much a document's score must cost as its estimate; with few targets all documents are scored."""


@dataclass(frozen=True)
class Outcome:
    """Columns of a batch, and why some of its records have no text: (index in the batch, reason)."""

    columns: Arrays
    unusable: list[tuple[int, str]]


class Worker:
    """Everything a process needs to work on batches."""

    def __init__(self, settings: SelectSettings) -> None:
        """Reads the targets. HarnessError where that fails, or a package is missing."""
        self.settings = settings
        texts = [read_texts(target, target.documents) for target in settings.targets]
        against = [text for source in settings.leaks.against for text in read_texts(source)]
        self.targets = [Targets(each) for each in texts]
        self.forbidden = [text for each in texts for text in each] + against
        """What no chosen document may hold."""
        self._scorers: list[Scorer] = [open_scorer(settings.score, each) for each in self.targets]
        self.races = (
            self._scorers[0].can_race
            and not settings.racing.exact
            and all(scorer.probes * WORTH_RACING <= scorer.pairs for scorer in self._scorers)
        )
        self.sketches = self.races and self._scorers[0].can_sketch
        """Whether a race begins with sketches rather than features."""
        self._inspection: _Inspection | None = None

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """For each set of targets: compressions of a window with a target that an estimate and a score take."""
        return [(scorer.probes if self.races else 0, scorer.pairs) for scorer in self._scorers]

    def run(self, task: str, units: list[Unit]) -> Outcome:
        """One of measure, estimate, score and inspect on a batch."""
        documents = [read_document(unit, self.settings.pool) for unit in units]
        texts = [b"" if isinstance(document.text, Unusable) else document.text.encode() for document in documents]
        if task == "measure":
            columns = self._measure(documents, texts)
        elif task == "estimate":
            columns = self._features(texts)
        elif task == "score":  # with the features, so that it is known how well they tell the score
            columns = {"scores": self._scores(texts), **(self._features(texts) if self.sketches else {})}
        else:
            self._inspection = self._inspection or _Inspection(self.settings, self.forbidden)
            columns = self._inspection.columns(texts)
        reasons = [(n, each.text.reason) for n, each in enumerate(documents) if isinstance(each.text, Unusable)]
        return Outcome(columns, reasons)

    def _scores(self, texts: list[bytes]) -> np.ndarray:
        """float64 [texts, sets of targets]."""
        return np.stack([scorer.scores(texts) for scorer in self._scorers], axis=1)

    def _features(self, texts: list[bytes]) -> Arrays:
        return {f"{STAGES[1]}-{index}": scorer.features(texts) for index, scorer in enumerate(self._scorers)}

    def _measure(self, documents: list[Document], texts: list[bytes]) -> Arrays:
        usable = np.array([bool(text) and not text.isspace() for text in texts])
        columns: Arrays = {
            "usable": usable,
            "bytes": np.array([len(text) for text in texts], dtype=np.int64),
            "digest": _digests(texts, 16),
            "id_digest": _digests((document.id.encode(errors="surrogatepass") for document in documents), 8)[:, 0],
            "has_id": np.array([document.has_id for document in documents], dtype=bool),
            "group": np.array([document.group for document in documents], dtype=np.str_),
        }
        scored = [text for text, good in zip(texts, usable, strict=True) if good]
        windows = self._scorers[0].count_windows(scored) if scored else np.zeros(0, dtype=np.int64)
        columns["windows"] = _spread(windows, usable)
        if self.races:
            for index, scorer in enumerate(self._scorers):
                predict = scorer.sketch if self.sketches else scorer.features
                predictors = predict(scored or [b"-"])[: len(scored)]  # their number, where there are no texts
                columns[f"{STAGES[0] if self.sketches else STAGES[1]}-{index}"] = _spread(predictors, usable)
        else:
            columns["scores"] = _spread(self._scores(scored), usable, np.nan)
        return columns


class _Inspection:
    """A closer look at the few documents near the top."""

    def __init__(self, settings: SelectSettings, forbidden: Sequence[bytes]) -> None:
        near = settings.duplicates.remove == "near"
        self._signer = Signer(settings.duplicates) if near else None
        self._leaks = LeakCheck(forbidden, settings.leaks) if settings.leaks.remove else None
        self._tokenizer = None
        if settings.budget.tokenizer is not None:
            from .tokens import open_tokenizer

            self._tokenizer = open_tokenizer(settings.budget.tokenizer)

    def columns(self, texts: list[bytes]) -> Arrays:
        """tokens (-1 where none are counted), leak (share of a target), signature."""
        strings = [text.decode() for text in texts]
        columns: Arrays = {"tokens": np.full(len(texts), -1, dtype=np.int64), "leak": np.zeros(len(texts), np.float32)}
        if self._tokenizer is not None:
            encoded = self._tokenizer.encode_batch(strings)
            columns["tokens"] = np.array([len(ids) + 1 for ids in encoded], dtype=np.int64)
        if self._leaks is not None:
            columns["leak"] = np.array([self._leaks.share(text) for text in strings], dtype=np.float32)
        if self._signer is not None:
            columns["signature"] = np.stack([self._signer.sign(text) for text in strings])
        return columns


def _digests(texts: Iterable[bytes], size: int) -> np.ndarray:
    """Hashes of so many bytes as big-endian numbers, so that numbers sort as bytes do: uint64 [texts, size / 8]."""
    joined = b"".join(hashlib.blake2b(text, digest_size=size).digest() for text in texts)
    return np.frombuffer(joined, dtype=">u8").astype(np.uint64).reshape(-1, size // 8)


def _spread(values: np.ndarray, usable: np.ndarray, missing: float = 0) -> np.ndarray:
    """`values`, a row a usable document, in an array with a row a record."""
    full = np.full((len(usable), *values.shape[1:]), missing, dtype=values.dtype)
    full[usable] = values
    return full


_worker: Worker | None = None
"""A worker process's own; set once when it starts."""


def start_worker(settings: SelectSettings) -> None:
    """What a worker process does first. It reads the targets itself: see `map_in_processes`."""
    global _worker
    _worker = Worker(settings)


def run_in_worker(argument: tuple[str, list[Unit]] | None) -> Outcome | None:
    """`Worker.run` in a worker process; nothing for None, which only marks a place."""
    assert _worker is not None
    return None if argument is None else _worker.run(*argument)
