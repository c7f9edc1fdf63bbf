"""Where a run writes, and how often it speaks."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from harness.config import Section


class RunSection(Section):
    """The `run` section."""

    name: str = "run"
    """Name of the run: its folder's name. Two runs under one name are two runs in one folder, so it is refused."""
    folder: str = "runs"
    """Folder that holds the folders of runs, relative to the working directory."""
    tensorboard: bool = True
    """Write TensorBoard event files beside metrics.jsonl, with the same values."""
    log_every_steps: int = Field(default=10, ge=1)
    """Steps between two lines in train.log, and on the console where it is not a terminal. metrics.jsonl has every
    step in any case."""

    @field_validator("name")
    @classmethod
    def _refuse_paths(cls, name: str) -> str:
        if not name.strip() or name.startswith(".") or "/" in name or "\\" in name:
            raise ValueError(
                f"{name!r} is not a plain name: leave out slashes and leading dots; run.folder takes a path"
            )
        return name

    @property
    def path(self) -> Path:
        """The run folder."""
        return Path(self.folder) / self.name
