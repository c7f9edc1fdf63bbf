"""The configuration of a study of norm removal."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from harness.config import Section
from harness.data import DataSection
from harness.model import ModelSection
from harness.normfree import NormRemovalSection
from harness.optim import OptimizerSection, ScheduleSection


class RecipeSection(Section):
    """How long and how models are trained."""

    steps: int = Field(..., ge=1)
    """Optimizer steps."""

    sequences: int = Field(..., ge=1)
    """Windows a step."""

    micro_batch_size: int | None = Field(None, ge=1)
    """Windows a forward pass. null: all of a step."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """As train.precision."""

    optimizer: OptimizerSection = OptimizerSection()
    """AdamW."""

    schedule: ScheduleSection = ScheduleSection()
    """The learning rate's course."""


class SourceSection(RecipeSection):
    """The models that norms are taken from: one a family, from new weights."""

    norm_removal: NormRemovalSection = NormRemovalSection()
    """For its injection: a model so small grows no outlier at first positions by itself, and without one there is
    nothing hard to remove."""


class ArmSection(Section):
    """One way to fine-tune a source."""

    name: str = Field(..., pattern=r"^[a-z][a-z0-9-]*$")
    """Its name in results and tables."""

    norm_removal: NormRemovalSection
    """With control plain or aux: a baseline, run once for every number of steps that a removal took."""


class NormRemovalStudySection(Section):
    """A study of norm removal."""

    kind: Literal["norm_removal"]
    """Which kind of study this file is."""

    folder: str
    """The work folder: sources, results, report."""

    workers: int = Field(2, ge=1)
    """Processes at a time, of one thread each."""

    seed: int = Field(1, ge=0)
    """Of the sources."""

    seeds: int = Field(3, ge=1)
    """Fine-tunings of each source by each arm: with other orders of the text."""

    data: DataSection
    """Text and tokenizer of sources and fine-tunings."""

    families: dict[str, ModelSection]
    """The models."""

    source: SourceSection
    """How they are trained."""

    removal: RecipeSection
    """How they are fine-tuned."""

    arms: tuple[ArmSection, ...]
    """The ways to do it."""

    windows: int = Field(256, ge=1)
    """Validation windows that results are measured on."""

    @property
    def path(self) -> Path:
        return Path(self.folder)

    @property
    def removals(self) -> list[ArmSection]:
        return [arm for arm in self.arms if arm.norm_removal.control == "none"]

    @property
    def controls(self) -> list[ArmSection]:
        return [arm for arm in self.arms if arm.norm_removal.control != "none"]

    @model_validator(mode="after")
    def _check(self) -> NormRemovalStudySection:
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise ValueError(f"arms: {', '.join(names)} has a name twice")
        if not self.removals:
            raise ValueError("arms: all are controls; name at least one that removes norms")
        return self
