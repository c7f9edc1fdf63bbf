"""The configuration of a dry run."""

from __future__ import annotations

from pydantic import Field

from harness.config import Section


class DryRunSection(Section):
    """What `train.dry_run=true` is to lay out; without effect on training."""

    processes: int | None = Field(None, ge=1)
    """Processes of the pretended job. null: as many as the launcher started, and without one parallel.tensor."""

    rank: int = Field(0, ge=0)
    """The rank whose part is shown."""

    processes_per_machine: int | None = Field(None, ge=1)
    """Processes on one machine, so that it is said where a rank lies and whether tensor-parallel ranks share a
    machine. null: not said."""
