"""Saving on a cadence."""

from __future__ import annotations

from typing import Any

from .base import Callback, TrainerView, is_due
from .config import CheckpointSection


class Saving(Callback):
    """Commits a checkpoint every so many steps and after the last."""

    name = "saving"

    def __init__(self, section: CheckpointSection) -> None:
        self.section = section

    def after_record(self, trainer: TrainerView, record: dict[str, Any]) -> None:
        if is_due(trainer.step, trainer.total_steps, self.section.every_steps):
            trainer.save()
