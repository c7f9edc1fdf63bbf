"""The cells of the study, in an order that is balanced wherever it stops."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .config import SHARED, SelectionStudySection


@dataclass(frozen=True)
class Cell:
    """One training run."""

    mode: str
    """scratch or continued."""
    arm: str
    target: str
    """A target's name, or SHARED for the random arm, which serves all targets that are not held back."""
    draw: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.mode}-{self.target}-{self.arm}-draw{self.draw}-seed{self.seed}"

    def result_file(self, config: SelectionStudySection) -> Path:
        return config.path / "results" / f"{self.name}.json"


def cells(config: SelectionStudySection) -> list[Cell]:
    """Every cell that the configuration asks for: all arms of seed 0 in draw 0 first, then of seed 0 in draw 1, ..."""
    return [
        Cell(mode, arm, target, draw, seed)
        for seed in range(config.seeds)
        for draw in range(config.draws)
        for mode in config.modes
        for arm, target in arms_and_targets(config)
    ]


def arms_and_targets(config: SelectionStudySection) -> list[tuple[str, str]]:
    """Which arm is run for which target; arms without a use for a target leave it out."""
    pairs: list[tuple[str, str]] = []
    held_back = {target.name for target in config.targets if target.held_back}
    for arm in config.arms:
        for target in config.active_targets:
            if arm.kind == "file-type" and target.in_domain is None:
                continue
            shared = arm.kind == "random" and target.name not in held_back
            pair = (arm.name, SHARED if shared else target.name)
            if pair not in pairs:
                pairs.append(pair)
    return pairs


def evaluated_targets(config: SelectionStudySection, cell: Cell) -> list[str]:
    """The targets that a cell's model is evaluated on."""
    if cell.target != SHARED:
        return [cell.target]
    return [target.name for target in config.targets if not target.held_back]
