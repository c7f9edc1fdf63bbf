"""The configuration of a ladder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from harness.config import Section, plain, validate
from harness.data import DataSection
from harness.model import ModelSection
from harness.optim import OptimizerSection, ScheduleSection

COUNTS = {
    "non_embedding": "blocks and norms, without embeddings and head (Kaplan et al.)",
    "total": "all parameters, a tied head once",
    "without_head": "all parameters but an untied head's",
}
"""The conventions of counting parameters, by the names of their columns. A law's exponent depends on which it is."""


class RuleSection(Section):
    """A setting as a power law of a run's compute C, its training FLOPs without those of the head."""

    factor: float = Field(..., gt=0)
    """factor * C^exponent."""

    exponent: float
    """See factor."""

    def __call__(self, flops: float) -> float:
        return float(self.factor * flops**self.exponent)


class LadderSection(Section):
    """A ladder."""

    kind: Literal["ladder"]
    """Which kind of study this file is."""

    folder: str
    """The work folder: runs, results, report."""

    workers: int = Field(1, ge=1)
    """Processes at a time, of one thread each on a CPU."""

    part: int = Field(0, ge=0)
    """Which part of the runs this process does, of `parts`: the task of a SLURM array, see
    launch/slurm/array.sbatch."""

    parts: int = Field(1, ge=1)
    """How many parts there are."""

    seed: int = Field(1, ge=0)
    """What the runs' own seeds are made of."""

    seeds: int = Field(1, ge=1)
    """Runs of each size and length, with other weights and another order of the text."""

    data: DataSection
    """Text and tokenizer."""

    model: dict[str, Any] = Field(default_factory=dict)
    """What the models have in common, as the section `model` of a run."""

    sizes: dict[str, dict[str, Any]] = Field(..., min_length=1)
    """By name, what a size has of its own, as the section `model` of a run: layers, hidden_size, heads, or shape."""

    count: Literal["non_embedding", "total", "without_head"] = "non_embedding"
    """Which parameters tokens_per_parameter counts."""

    tokens_per_parameter: tuple[float, ...] = Field((20.0,), min_length=1)
    """Lengths of training."""

    batch: RuleSection = RuleSection(factor=0.2920, exponent=0.3271)
    """Tokens a step (DeepSeek-AI 2024, arXiv 2401.02954, section 3.1)."""

    learning_rate: RuleSection = RuleSection(factor=0.3118, exponent=-0.1250)
    """Peak learning rate (the same)."""

    warmup_share: float = Field(0.05, ge=0, lt=1)
    """Of a run's steps."""

    micro_batch_tokens: int = Field(16384, ge=1)
    """At most so many a forward pass."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """As train.precision."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """As parallel.device."""

    optimizer: OptimizerSection = OptimizerSection()
    """AdamW; its learning_rate is the rule's."""

    schedule: ScheduleSection = ScheduleSection()
    """The learning rate's course; its warmup_steps are warmup_share's."""

    validations: int = Field(20, ge=1)
    """Validations a run, evenly; the last one is its loss."""

    windows: int = Field(512, ge=1)
    """Validation windows of each."""

    resamples: int = Field(1000, ge=100)
    """Of the bootstrap of fits."""

    @property
    def path(self) -> Path:
        return Path(self.folder)

    def section(self, size: str) -> ModelSection:
        """The model of a size."""
        return validate(ModelSection, {**self.model, **self.sizes[size]}, f"sizes.{size}")

    @model_validator(mode="after")
    def _check(self) -> LadderSection:
        if self.part >= self.parts:
            raise ValueError(f"part {self.part}: should be below parts, which is {self.parts}")
        if any(ratio <= 0 for ratio in self.tokens_per_parameter):
            raise ValueError("tokens_per_parameter: should be positive")
        if len(set(self.tokens_per_parameter)) < len(self.tokens_per_parameter):
            raise ValueError("tokens_per_parameter: has a value twice")
        if "learning_rate" in self.optimizer.model_fields_set or self.schedule.warmup_steps:
            raise ValueError(
                "optimizer.learning_rate and schedule.warmup_steps come from the rules learning_rate and "
                "warmup_share; set those"
            )
        sections: dict[str, str] = {}
        for size in self.sizes:
            described = str(plain(self.section(size)))
            if described in sections:
                raise ValueError(f"sizes.{size}: is the same model as {sections[described]}")
            sections[described] = size
        return self
