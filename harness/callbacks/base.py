"""The callback protocol: what runs beside the loop, and when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from harness.data import Batch, Prepared
from harness.model import Decoder
from harness.parallel import Engine, ParallelLayout
from harness.runs import RunFolder

if TYPE_CHECKING:
    from .faults import Fault


class TrainerView(Protocol):
    """What a callback may see of the run."""

    @property
    def step(self) -> int:
        """The last completed step; 0 before the first."""

    @property
    def total_steps(self) -> int: ...

    @property
    def model(self) -> Decoder: ...

    @property
    def engine(self) -> Engine: ...

    @property
    def layout(self) -> ParallelLayout: ...

    @property
    def prepared(self) -> Prepared: ...

    @property
    def run(self) -> RunFolder: ...

    def protect(self, step: int | None) -> None:
        """Let the checkpoint of `step` be deleted by no retention, until another one is named; None: none."""

    @property
    def saved_step(self) -> int | None:
        """The step of the newest checkpoint that was begun, and not refused."""

    def save(self) -> None:
        """Begin a checkpoint of the last completed step."""

    def check_in(self, what: str) -> None:
        """To be called by all ranks between the pieces of long work; `what` has just been done: "validation batch 7".

        Raises Interrupted on all of them where one was asked to stop.
        """


class Interrupted(BaseException):
    """The run stops in the middle of what follows a step. The step itself is done; the callbacks' part of it, and its
    record, are done again when the run goes on."""


@dataclass
class RollBack(Exception):  # noqa: N818 (no error, a decision)
    """The run goes back to the newest good checkpoint of `to_step` or before, and on with new samples. Raised by all
    ranks alike, from `Callback.after_step`."""

    to_step: int
    kind: str
    reason: str


class Callback:
    """Something periodic. A hook's name says when it runs; the base class's hooks do nothing.

    `name` is its key in a checkpoint. State that must survive a resume goes through state_dict and load_state_dict and
    must be JSON.
    """

    name = "callback"

    def before_training(self, trainer: TrainerView) -> None:
        """Once, after everything is built and a checkpoint is loaded, before the first step."""

    def before_step(self, trainer: TrainerView) -> None:
        """Before the batch of step `trainer.step + 1` is read; may save, of `trainer.step`."""

    def before_forward(self, trainer: TrainerView, batch: Batch) -> None:
        """Before the forward pass of a micro-batch in training."""

    def after_forward(self, trainer: TrainerView, batch: Batch) -> Tensor | None:
        """After it, before its backward pass. What is returned, a scalar, is added to the step's mean loss before the
        backward pass, for its gradient; the recorded loss is without it."""

    def claim(self, fault: Fault, step: int) -> RollBack | None:
        """Asked on all ranks before a policy decides about a bad step: the way back, where this callback caused it."""

    def after_roll_back(self, trainer: TrainerView) -> None:
        """After the state of `trainer.step` is restored, before it is saved again with what was learnt."""

    def after_step(self, trainer: TrainerView, record: dict[str, Any]) -> None:
        """After the optimizer step; may add columns to the step's record, which is then written to metrics.jsonl."""

    def after_record(self, trainer: TrainerView, record: dict[str, Any]) -> None:
        """After the record is written: the place to save, since a checkpoint must not be ahead of the metrics."""

    def after_training(self, trainer: TrainerView) -> None:
        """Once, after the last step."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what state_dict gave."""


def is_due(step: int, total_steps: int, every_steps: int | None) -> bool:
    """Whether something that happens every so many steps, and after the last, happens after this one."""
    return step == total_steps or (every_steps is not None and step % every_steps == 0)
