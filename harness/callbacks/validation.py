"""Validation: cross-entropy and bits per byte on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.data import IGNORED, Batch, DataSection, EvaluationWindows, Prepared
from harness.kernels import LossOutput
from harness.model import Decoder
from harness.parallel import ParallelLayout

from .base import Callback, TrainerView, is_due
from .config import ValidationSection


@dataclass
class Score:
    """Sums over scored tokens, from which every mean follows."""

    nll: float = 0.0
    """Negative log-likelihood, nats."""
    tokens: int = 0
    """Tokens predicted, end-of-text tokens among them."""
    bytes: int = 0
    """UTF-8 bytes that these tokens stand for; an end-of-text token stands for none, but its cost counts."""
    correct: int = 0
    """Tokens that had the largest logit."""
    entropy: float = 0.0
    """Of the predicted distributions, nats."""

    @property
    def loss(self) -> float:
        """Mean cross-entropy, nats a token."""
        return self.nll / self.tokens if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        return self.nll / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def mean_entropy(self) -> float:
        """Nats a token: what the model itself takes its loss to be."""
        return self.entropy / self.tokens if self.tokens else math.nan

    @property
    def accuracy(self) -> float:
        return self.correct / self.tokens if self.tokens else math.nan

    def __add__(self, other: Score) -> Score:
        return Score(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


TokensHandler = Callable[[str, Tensor, LossOutput, Tensor], None]
"""Takes a corpus, a batch's targets, what the model said of them, and which of them have a loss, all of one shape."""


@torch.no_grad()
def score(
    model: Decoder,
    windows: Iterable[tuple[str, Batch]],
    token_bytes: np.ndarray,
    device: torch.device,
    on_tokens: TokensHandler | None = None,
    add_up: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Score]:
    """The score of each corpus; `on_tokens` is called for every batch, in the order of the text.

    `token_bytes` (vocab_size,) is the tokenizer's table of bytes a token. Sums stay on the device until the end, so the
    host waits once a corpus. `add_up` sums a tensor over the ranks that divide `windows` among them.
    """
    table = torch.from_numpy(token_bytes.astype(np.int64)).to(device)
    sums: dict[str, Tensor] = {}
    with evaluating(model):
        for corpus, batch in windows:
            batch = batch.to(device)
            output = model(
                batch.tokens,
                batch.targets,
                batch.positions,
                batch.document_ids,
                plain=True,
                reduction="none",
                outputs=("correct", "entropy"),
            )
            valid = batch.targets != IGNORED
            counts = [valid.sum(), table[batch.targets.clamp(min=0)].mul(valid).sum(), output.correct.sum()]
            nats = [output.loss.double().sum(), output.entropy.double().sum()]
            part = torch.stack([*nats, *(count.double() for count in counts)])
            sums[corpus] = sums[corpus] + part if corpus in sums else part
            if on_tokens is not None:
                on_tokens(corpus, batch.targets, output, valid)
    scores = {}
    for corpus, total in sums.items():
        nll, entropy, tokens, size, correct = (add_up(total) if add_up is not None else total).tolist()
        scores[corpus] = Score(nll, int(tokens), int(size), int(correct), entropy)
    return scores


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in evaluation mode (no dropout)."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class Validation(Callback):
    """Adds validation_loss and validation_bits_per_byte to the record of the steps that are due."""

    name = "validation"

    def __init__(
        self, section: ValidationSection, data: DataSection, prepared: Prepared, layout: ParallelLayout
    ) -> None:
        """Raises HarnessError where a corpus has no held-out text: now, and not when the first validation is due."""
        self.section = section
        self.last: dict[str, Score] = {}
        """The newest scores by corpus."""
        self._windows = None
        if section.enabled:
            self._windows = EvaluationWindows(
                prepared,
                data,
                "validation",
                section.batch_size,
                layout.data_rank,
                layout.data_size,
                limit_samples=section.samples,
            )

    def after_step(self, trainer: TrainerView, record: dict[str, Any]) -> None:
        if is_due(trainer.step, trainer.total_steps, self.section.every_steps):
            record.update(self.measure(trainer))

    def after_training(self, trainer: TrainerView) -> None:
        if not self.last:  # a finished run that was started again
            self.measure(trainer)

    def measure(self, trainer: TrainerView) -> dict[str, float]:
        """Score the validation split now; the columns that go into the record, none where validation is off."""
        if self._windows is None:
            return {}
        layout, table = trainer.layout, trainer.prepared.tokenizer.token_bytes()
        self.last = score(trainer.model, self._checked(trainer), table, layout.device, add_up=layout.sum_over_data)
        total = sum(self.last.values(), Score())
        columns = {"validation_loss": total.loss, "validation_bits_per_byte": total.bits_per_byte}
        if len(self.last) > 1:
            columns.update({f"validation_loss/{corpus}": result.loss for corpus, result in self.last.items()})
        return columns

    def _checked(self, trainer: TrainerView) -> Iterator[tuple[str, Batch]]:
        """The batches; every rank has equally many, so all of them look together whether the run is to stop."""
        assert self._windows is not None
        for number, item in enumerate(self._windows, 1):
            trainer.check_in(f"validation batch {number}")
            yield item
