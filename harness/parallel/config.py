"""The configuration of where a run computes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from harness.config import Section


class ParallelSection(Section):
    """Devices and processes. One process trains on one device."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. `auto` takes the GPU where torch sees one, else the CPU; the choice is in environment.json."""

    threads: int | None = Field(None, ge=1)
    """CPU threads that torch computes with. null: as torch chooses (one a core)."""

    timeout_seconds: float = Field(600.0, gt=0)
    """How long a collective operation may wait for the other ranks before the run ends with an error, in seconds."""
