"""The configuration of what happens now and then during a run."""

from __future__ import annotations

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
