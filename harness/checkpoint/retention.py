"""Which checkpoints stay, and the deletion of the others."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import stat_result
from typing import Any

from .disk import plain_file_problem
from .errors import CheckpointError
from .manifest import DIGEST, MANIFEST, StoredFile, read_manifest
from .store import CheckpointStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retention:
    """Kept are the newest `keep_last` (None: all), the multiples of `keep_every_steps` for ever, and the `keep_best`
    of the lowest validation loss; the newest is kept in any case."""

    keep_last: int | None
    keep_every_steps: int | None = None
    keep_best: int | None = None

    def reasons(self, scores: Mapping[int, float | None]) -> dict[int, list[str]]:
        """Why each step is kept, ascending; no reason: it is to be deleted.

        `scores`: by step, of whole checkpoints alone, the validation loss at that step in nats a token, or None. Of
        equal losses the newer is the better one.
        """
        reasons: dict[int, list[str]] = {step: [] for step in sorted(scores)}
        newest_first = sorted(scores, reverse=True)
        for step in newest_first[: self.keep_last]:
            reasons[step].append("all are kept" if self.keep_last is None else f"of the newest {self.keep_last}")
        for step in newest_first:
            if self.keep_every_steps is not None and step % self.keep_every_steps == 0:
                reasons[step].append(f"a multiple of {self.keep_every_steps}")
        judged = {step: score for step, score in scores.items() if score is not None and not math.isnan(score)}
        for step in sorted(judged, key=lambda step: (judged[step], -step))[: self.keep_best or 0]:
            reasons[step].append(f"validation loss {judged[step]:.4f}, of the best {self.keep_best}")
        if newest_first and not reasons[newest_first[0]]:
            reasons[newest_first[0]].append("the newest")
        return reasons

    def doomed(self, scores: Mapping[int, float | None]) -> list[int]:
        """The steps that are to be deleted, ascending; `scores` as for `reasons`."""
        return [step for step, why in self.reasons(scores).items() if not why]


@dataclass(frozen=True)
class _Seen:
    """What was read of a manifest, and of which one: a step may be saved again."""

    identity: tuple[tuple[int, int, int], ...]
    score: float | None
    files: dict[str, StoredFile]


class Pruner:
    """Deletes from `store` what `retention` does not keep. One of all writers does it, between saves.

    A manifest may have many megabytes, so it is read once; then a look at the sizes and times of the files is enough.
    """

    def __init__(self, store: CheckpointStore, retention: Retention) -> None:
        self.store = store
        self.retention = retention
        self.damaged: dict[int, str] = {}
        """What is wrong with steps that are not whole, as `scores` last found them."""
        self.protected: int | None = None
        """A step that stays whatever the retention says."""
        self._seen: dict[int, _Seen] = {}

    def prune(self) -> list[int]:
        """Delete what is not kept, the oldest first, and return what was deleted.

        Damaged steps are neither counted nor deleted: somebody may want to look at them. The log names each, once.
        """
        named = dict(self.damaged)
        scores = self.scores()
        for step, problem in self.damaged.items():
            if named.get(step) != problem:
                logger.warning("checkpoint of step %d is neither counted nor deleted: %s", step, problem)
        return self.delete(step for step in self.retention.doomed(scores) if step != self.protected)

    def delete(self, steps: Iterable[int]) -> list[int]:
        """Delete `steps`, one after the other, and return those that are gone; one that resists is a warning."""
        deleted = []
        for step in steps:
            try:
                self.store.delete(step)
            except (OSError, CheckpointError) as error:
                logger.warning("checkpoint of step %d could not be deleted: %s", step, error)
            else:
                deleted.append(step)
        return deleted

    def scores(self) -> dict[int, float | None]:
        """The steps that are whole (bytes are not read), each with the validation loss that it was saved with."""
        scores: dict[int, float | None] = {}
        self.damaged = {}
        for step in self.store.steps():
            try:
                scores[step] = self._look_at(step)
            except CheckpointError as error:
                self.damaged[step] = str(error)
        self._seen = {step: seen for step, seen in self._seen.items() if step in scores}
        return scores

    def _look_at(self, step: int) -> float | None:
        folder = self.store.folder_of(step)
        try:
            identity = tuple(_identity_of((folder / name).lstat()) for name in (MANIFEST, DIGEST))
        except OSError:
            identity = ()
        seen = self._seen.get(step)
        if seen is None or seen.identity != identity:
            manifest = read_manifest(folder, step)
            seen = self._seen[step] = _Seen(identity, score_in(manifest.state), manifest.files)
        for name, file in seen.files.items():
            problem = plain_file_problem(folder / name, file.bytes)
            if problem:
                raise CheckpointError(f"{folder / name}: {problem}")
        return seen.score


def score_in(state: Mapping[str, Any]) -> float | None:
    """The validation loss that a checkpoint's state has; None where it has none, or one that is no number."""
    value = state.get("validation_loss")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _identity_of(status: stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns
