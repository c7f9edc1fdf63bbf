"""The root of a run's configuration: every room's section under its name."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from harness.callbacks import CheckpointSection, FaultsSection, ValidationSection
from harness.config import ConfigError, Section
from harness.data import DataSection
from harness.evaluate import EvaluateSection, GenerateSection, SummarySection
from harness.forecast import ForecastSection
from harness.model import LossSection, ModelSection
from harness.normfree import NormRemovalSection, check_schedule
from harness.optim import OptimizerSection, ScheduleSection, decay_steps
from harness.parallel import ParallelSection
from harness.plan import DryRunSection
from harness.runs import RunSection


class TrainSection(Section):
    """The loop: how long, how much a step, in which precision."""

    steps: int = Field(..., ge=1)
    """Optimizer steps in all."""

    global_batch_size: int = Field(..., ge=1)
    """Sequences a step, over all ranks and micro-batches. Tokens a step: this times data.sequence_length."""

    micro_batch_size: int | None = Field(None, ge=1)
    """Sequences a forward pass on one data-parallel rank; the rest of the step is gradient accumulation. null: all of
    the rank's share of the step at once."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32; or bf16 weights and activations with fp32 masters, moments and gradient sums."""

    recompute: Literal["none", "selective", "full"] = "none"
    """Activation checkpointing: keep all; keep products and attention and recompute the rest; keep block inputs
    only."""

    compile: bool = False
    """Compile the blocks with torch.compile. The first step then takes up to minutes."""

    seed: int = Field(1234, ge=0)
    """Where all randomness comes from: weights, order of samples, dropout."""

    resume: Literal["auto", "never", "must"] = "auto"
    """auto: go on from the run's newest good checkpoint if there is one. never: refuse a run folder that was used.
    must: refuse to start without a checkpoint."""

    init_from: str | None = None
    """A run or checkpoint folder, or a Hugging Face folder, to begin with the weights of: step 0, new optimizer, own
    data and schedule. The model's shape and the tokenizer must be the same; each rank reads its own part. Without
    effect where the run goes on from a checkpoint of its own: that is a resume, which takes everything. null: new
    weights."""

    dry_run: bool = False
    """Train nothing: lay the job out on this one process and print what the rank that `dry_run` names would be and
    hold. Needs no data, no GPU and no other processes, and writes nothing."""

    @model_validator(mode="after")
    def _micro_batches_fit(self) -> TrainSection:
        if self.global_batch_size % (self.micro_batch_size or 1):
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} does not divide global_batch_size {self.global_batch_size}"
            )
        return self

    def micro_batch_on(self, data_size: int) -> int:
        """Sequences a forward pass where the step is divided over so many ranks. Raises ConfigError where it doesn't
        divide."""
        micro = self.micro_batch_size or max(self.global_batch_size // data_size, 1)
        if self.global_batch_size % (micro * data_size):
            raise ConfigError(
                f"train.global_batch_size: {self.global_batch_size} sequences do not divide into micro-batches of "
                f"{micro} on {data_size} data-parallel ranks; make it a multiple of {micro * data_size}, or change "
                f"train.micro_batch_size or the number of processes"
            )
        return micro


class Settings(Section):
    """One run, whole."""

    run: RunSection = RunSection()
    """The run folder."""
    parallel: ParallelSection = ParallelSection()
    """Devices and processes."""
    data: DataSection
    """Corpora, tokenizer, and how samples are cut from them."""
    model: ModelSection
    """The decoder."""
    loss: LossSection = LossSection()
    """The training loss."""
    optimizer: OptimizerSection = OptimizerSection()
    """AdamW and clipping."""
    schedule: ScheduleSection = ScheduleSection()
    """The learning rate's course."""
    train: TrainSection
    """The loop."""
    validation: ValidationSection = ValidationSection()
    """Held-out loss during training."""
    checkpoint: CheckpointSection = CheckpointSection()
    """When to save and what to keep."""
    faults: FaultsSection = FaultsSection()
    """Bad steps and hung runs."""
    forecast: ForecastSection = ForecastSection()
    """The final loss, predicted while the run goes on."""
    norm_removal: NormRemovalSection = NormRemovalSection()
    """`harness remove-norms`."""
    summary: SummarySection = SummarySection()
    """What is printed after the last step."""
    evaluate: EvaluateSection = EvaluateSection()
    """`harness evaluate`."""
    generate: GenerateSection = GenerateSection()
    """`harness generate`."""
    dry_run: DryRunSection = DryRunSection()
    """What `train.dry_run=true` lays out."""

    @model_validator(mode="after")
    def _check(self) -> Settings:
        steps, warmup = self.train.steps, self.schedule.warmup_steps
        if warmup > steps:
            raise ValueError(f"schedule.warmup_steps {warmup} is more than train.steps {steps}; lower it")
        if self.schedule.kind == "wsd" and warmup + decay_steps(self.schedule, steps) > steps:
            raise ValueError(
                f"schedule: warmup_steps {warmup} and decay_steps {decay_steps(self.schedule, steps)} together are "
                f"more than train.steps {steps}"
            )
        limit = self.model.max_positions
        if limit is not None and self.data.sequence_length > limit:
            raise ValueError(
                f"data.sequence_length {self.data.sequence_length} is more than model.max_positions {limit}"
            )
        return self

    def check_norm_removal(self) -> None:
        """Raises ConfigError where the run cannot keep the schedule of its norm removal."""
        if not self.norm_removal.enabled:
            return
        inside = "train.compile" if self.train.compile else None
        if self.train.recompute != "none":
            inside = f"train.recompute={self.train.recompute}"
        check_schedule(self.norm_removal, self.model, self.train.steps, inside=inside)

    def check_sequences(self, parallel: ParallelSection) -> None:
        """Raises ConfigError where sequence parallelism cannot divide the tokens of a micro-batch equally."""
        if parallel.sequence_parallel and self.data.sequence_length % parallel.tensor:
            raise ConfigError(
                f"data.sequence_length: {self.data.sequence_length} does not divide by parallel.tensor "
                f"{parallel.tensor}, which parallel.sequence_parallel needs; choose a multiple"
            )

    def resolved(self, vocab_size: int) -> Settings:
        """With what follows from other values filled in: the model's vocabulary and longest sequence."""
        if self.model.vocab_size is not None and self.model.vocab_size < vocab_size:
            raise ConfigError(
                f"model.vocab_size: {self.model.vocab_size} is less than the tokenizer's {vocab_size}; leave it "
                f"null, or set at least {vocab_size}"
            )
        filled: dict[str, int | None] = {"vocab_size": self.model.vocab_size or vocab_size}
        if self.model.positions == "learned" and self.model.max_positions is None:
            filled["max_positions"] = self.data.sequence_length
        return self.model_copy(update={"model": self.model.model_copy(update=filled)})
