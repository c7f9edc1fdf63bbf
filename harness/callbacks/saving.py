"""Saving: on a cadence, after the last step, when the run stops, and again where the disk refused."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from harness.checkpoint import CannotWriteError, CheckpointStore, Pruner, Retention, Saver
from harness.parallel import Fragment, ParallelLayout
from harness.runs import RunFolder

from .base import Callback, TrainerView, is_due
from .config import CheckpointSection

logger = logging.getLogger(__name__)

LAST_RETRY_SECONDS = 5.0


class Saving(Callback):
    """Commits checkpoints while training goes on, one after the other, and deletes those that are not to be kept.

    A disk that is full or out of reach does not end the run: that is an event, and the next attempt follows. Any other
    failure is raised in the loop, on all ranks at the same step.
    """

    name = "saving"

    def __init__(
        self, section: CheckpointSection, store: CheckpointStore, layout: ParallelLayout, run: RunFolder
    ) -> None:
        self.section, self._store, self._run, self._layout = section, store, run, layout
        self.last_step: int | None = None
        """Of the newest save that was begun."""
        self._retry_step: int | None = None
        retention = Retention(section.keep_last, section.keep_every_steps, section.keep_best)
        self._pruner = Pruner(store, retention) if layout.rank == 0 else None
        self._saver = Saver(
            store,
            asynchronous=section.asynchronous,
            after_commit=self._prune,
            on_written=lambda size: layout.watchdog.alive("writing a checkpoint"),
        )

    def before_training(self, trainer: TrainerView) -> None:
        self._saver.reserve(trainer.engine.fragments(owned=True))

    def after_record(self, trainer: TrainerView, record: dict[str, Any]) -> None:
        due = is_due(trainer.step, trainer.total_steps, self.section.every_steps)
        if due or (self._retry_step is not None and trainer.step >= self._retry_step):
            trainer.save()

    def begin(self, step: int, fragments: Iterable[Fragment], state: dict[str, Any]) -> None:
        """Begin a checkpoint, when the one before has ended."""
        self.settle(step)
        self._retry_step = None
        self._saver.start(step, fragments, state)
        self.last_step = step
        if not self.section.asynchronous:
            self.settle(step)

    def take_note(self, step: int) -> None:
        """Record the end of a save, if it has come and was a good one. Each rank at its own time."""
        if self._saver.ended() and not self.has_failed():
            self.settle(step)

    def has_failed(self) -> bool:
        """Whether a save has ended badly, as far as this rank knows; all ranks must then `settle` at the same step."""
        return self._saver.failed()

    def settle(self, step: int) -> bool:
        """Wait for the save that is going on and record how it ended, at `step`; False where the disk refused it."""
        saved = self._saver.wait()
        if saved is None:
            return True
        if saved.error is None:
            timing = {"seconds": round(saved.seconds, 3), "stall_seconds": round(saved.stall_seconds, 3)}
            self._run.log_event("saved", step=saved.step, **timing)
            return True
        self.last_step = None
        if not isinstance(saved.error, CannotWriteError):
            raise saved.error
        self._retry_step = step + self.section.retry_steps
        self._run.log_event("save_failed", step=saved.step, reason=str(saved.error))
        logger.warning("%s; the run goes on, and tries again at step %d at the latest", saved.error, self._retry_step)
        return False

    def finish(self, step: int, save: Callable[[], None]) -> None:
        """See to it that `step`, the last one, is committed: wait, and `save` again while the disk refuses. Raises
        CannotWriteError after section.retry_seconds."""
        deadline = time.monotonic() + self.section.retry_seconds
        while True:
            if self.settle(step) and self.last_step == step:
                return
            if self.last_step is None and self._retry_step is not None:  # refused
                if self._layout.all_max([time.monotonic() > deadline])[0]:
                    raise CannotWriteError(
                        f"the checkpoint of step {step} could not be written for {self.section.retry_seconds:g} s "
                        f"(checkpoint.retry_seconds); train.log has the reasons, and earlier checkpoints are untouched"
                    )
                time.sleep(LAST_RETRY_SECONDS)
            self._layout.watchdog.alive("waiting for the disk")
            save()

    def delete_after(self, step: int) -> None:
        """Delete the checkpoints of steps after `step`, a good one, while nothing is being written.

        Raises CannotWriteError where one resists: a resume would take it for the newest of the run.
        """
        if self._pruner is None:
            return
        for later in [later for later in self._store.steps() if later > step]:
            try:
                self._store.delete(later)
            except OSError as error:
                raise CannotWriteError(
                    f"{self._store.folder}: step {later}, which the run goes back behind, cannot be deleted: {error}"
                ) from error

    def protect(self, step: int | None) -> None:
        """Let retention spare the checkpoint of `step`, and of no other."""
        if self._pruner is not None:
            self._pruner.protected = step

    def close(self) -> None:
        """Wait for what is being written."""
        self._saver.close()

    def _prune(self, step: int) -> None:
        """On the writing thread, when `step` is committed."""
        if self._pruner is not None:
            self._pruner.prune()
