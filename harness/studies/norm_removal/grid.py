"""The runs of the study: the removals, and the controls that read as many tokens as each of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import ArmSection, NormRemovalStudySection


@dataclass(frozen=True)
class Cell:
    """One fine-tuning."""

    family: str
    arm: str
    seed: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.family}-{self.arm}-{self.steps}-seed{self.seed}"

    def result_file(self, config: NormRemovalStudySection) -> Path:
        return config.path / "results" / f"{self.name}.json"

    def result(self, config: NormRemovalStudySection) -> dict[str, Any] | None:
        """None where it is not done yet."""
        file = self.result_file(config)
        return json.loads(file.read_text()) if file.exists() else None

    def arm_of(self, config: NormRemovalStudySection) -> ArmSection:
        return next(arm for arm in config.arms if arm.name == self.arm)


def removal_cells(config: NormRemovalStudySection) -> list[Cell]:
    """Seed after seed, so that wherever it stops all arms have as many."""
    return [
        Cell(family, arm.name, seed, config.removal.steps)
        for seed in range(config.seeds)
        for arm in config.removals
        for family in config.families
    ]


def control_cells(config: NormRemovalStudySection) -> list[Cell]:
    """For every removal that is done, the controls of as many steps as it read samples for: what its rollbacks lost
    was read, too."""
    found = []
    for cell in removal_cells(config):
        result = cell.result(config)
        if result is not None and "failed" not in result:
            found += [
                Cell(cell.family, control.name, cell.seed, result["consumed_steps"]) for control in config.controls
            ]
    return list(dict.fromkeys(found))
