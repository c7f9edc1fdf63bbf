"""The configuration of what happens now and then during a run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from harness.config import Section


class ValidationSection(Section):
    """Loss on held-out text, on a cadence and after the last step."""

    enabled: bool = True
    """false: never, and no held-out text is needed (data.validation_share may be 0)."""

    every_steps: int | None = Field(200, ge=1)
    """Steps between validations. null: only after the last step."""

    samples: int | None = Field(None, ge=1)
    """Windows of data.sequence_length that a validation reads of each corpus, spread evenly over it. null: all."""

    batch_size: int = Field(16, ge=1)
    """Windows a forward pass."""


class CheckpointSection(Section):
    """When checkpoints are written, and how many are kept."""

    every_steps: int | None = Field(500, ge=1)
    """Steps between checkpoints. null: only after the last step."""

    keep_last: int | None = Field(3, ge=1)
    """How many of the newest checkpoints to keep; older ones are deleted once a newer one is committed. null: all."""

    keep_every_steps: int | None = Field(None, ge=1)
    """Checkpoints of steps that are multiples of this are kept for ever. null: none for that reason."""

    keep_best: int | None = Field(None, ge=1)
    """How many checkpoints of the lowest validation loss to keep; only steps that were validated count, so let
    every_steps be a multiple of validation.every_steps. null: none for that reason."""

    asynchronous: bool = True
    """Go on training while a checkpoint is written: from a copy of the state, which takes that much host memory on each
    rank (12 bytes a parameter, divided over the ranks). false: wait until it is written."""

    strict: bool = False
    """Refuse to start where the newest checkpoint is damaged. false: it is named, and the last good one is used."""

    retry_steps: int = Field(10, ge=1)
    """Where the disk refused a checkpoint (it is full, say), steps until the next attempt; the run goes on."""

    retry_seconds: float = Field(600.0, ge=0)
    """Where the disk refuses the last checkpoint of a run, how long to try again before the run ends in an error."""


class FaultsSection(Section):
    """What is done about steps that go wrong, before they touch the weights, and about runs that hang."""

    non_finite: Literal["stop", "skip", "rollback"] = "stop"
    """Where the loss or the gradient norm is not a number. stop: the run ends with an error. skip: the step's gradient
    is dropped; weights and moments stay, the step counts. rollback: the run goes back to the newest checkpoint that is
    rollback_steps older and passes over the samples of the last rollback_steps steps; without such a checkpoint it
    stops."""

    spike: Literal["ignore", "stop", "skip", "rollback"] = "ignore"
    """The same where the loss (or the gradient norm, with grad_norm_deviations) rises far above its running mean."""

    spike_deviations: float = Field(6.0, gt=0)
    """A spike is a loss of more than so many standard deviations above the mean of the last window_steps steps ..."""

    spike_least: float = Field(0.1, ge=0)
    """... and by at least so many nats a token."""

    grad_norm_deviations: float | None = Field(None, gt=0)
    """A spike is also a gradient norm (before clipping) of so many standard deviations above its mean, and at least
    twice that mean. null: gradient norms are not judged."""

    window_steps: int = Field(128, ge=4)
    """Steps whose losses and norms the running mean and deviation are of; nothing is judged before half as many."""

    rollback_steps: int = Field(20, ge=1)
    """How far a rollback goes back, at least, and how many steps' samples it passes over. Keep enough checkpoints
    (checkpoint.keep_last) that one is so old."""

    most: int = Field(10, ge=1)
    """Stop at the next fault after so many skips and rollbacks without window_steps good steps in a row in between."""

    hung_after_seconds: float | None = Field(540.0, ge=1)
    """End a run (with exit status 75, and the stack traces of all ranks) in which some rank makes no progress for so
    long; a step (the first one with train.compile, too) and a batch of validation must be shorter. Keep it below
    parallel.timeout_seconds, which ends a collective in an error. null: never."""
