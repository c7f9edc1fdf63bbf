"""What the settings of a run look like from this room, which lies below them."""

from __future__ import annotations

from typing import Protocol

from harness.callbacks import CheckpointSection
from harness.data import DataSection
from harness.model import LossSection, ModelSection
from harness.optim import OptimizerSection
from harness.parallel import ParallelSection

from .config import DryRunSection


class TrainView(Protocol):
    """What is read of the `train` section."""

    @property
    def global_batch_size(self) -> int: ...

    @property
    def precision(self) -> str: ...

    @property
    def recompute(self) -> str: ...

    def micro_batch_on(self, data_size: int) -> int: ...


class Job(Protocol):
    """What is read of harness.settings.Settings."""

    @property
    def dry_run(self) -> DryRunSection: ...

    @property
    def parallel(self) -> ParallelSection: ...

    @property
    def data(self) -> DataSection: ...

    @property
    def model(self) -> ModelSection: ...

    @property
    def loss(self) -> LossSection: ...

    @property
    def optimizer(self) -> OptimizerSection: ...

    @property
    def train(self) -> TrainView: ...

    @property
    def checkpoint(self) -> CheckpointSection: ...

    def check_sequences(self, parallel: ParallelSection) -> None: ...

    def resolved(self, vocab_size: int) -> Job: ...
