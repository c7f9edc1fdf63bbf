"""What the linear cross-entropy takes and gives: the vocabulary shard, the terms of the loss, the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

IGNORE_INDEX = -100
"""The target of a token that takes no part in the loss: torch's own default."""

OUTPUTS = ("lse", "logprob", "entropy", "max_prob", "correct")
"""The per-token outputs that can be asked for."""

Reduction = Literal["mean", "sum", "none"]


@dataclass(frozen=True)
class VocabShard:
    """Which rows of the vocabulary a weight holds: global ids start to stop, of which those below vocab_size are real.

    Rows at or beyond vocab_size are padding: they take no probability and get exactly zero gradient. A weight that
    is not sharded has start 0 and as many rows as stop says. Raises ValueError where the three cannot be true together.
    """

    start: int
    stop: int
    vocab_size: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"VocabShard: 0 <= start < stop must hold, got start={self.start}, stop={self.stop}")
        if self.vocab_size < 1:
            raise ValueError(f"VocabShard: vocab_size must be at least 1, got {self.vocab_size}")


@dataclass(frozen=True)
class Terms:
    """The constants of one call, checked: what is added to the plain cross-entropy, and what the logits go through."""

    vocab_size: int
    ignore_index: int = IGNORE_INDEX
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    temperature: float = 1.0


@dataclass(frozen=True)
class LossOutput:
    """A loss, and what was asked for beside it; the outputs that were not asked for are None.

    `loss` is differentiable with respect to hidden, weight and bias. The other tensors have the shape of the targets,
    are detached, and hold 0 (False) at ignored tokens. They describe the final logits, after softcap and temperature:

    lse       log-sum-exp over the vocabulary
    logprob   log-probability of the target
    entropy   of the predicted distribution, in nats
    max_prob  probability of the likeliest token
    correct   bool: the target is the likeliest token (of equal ones, the one with the lowest id)

    dtype: fp32, or float64 for float64 inputs and for the reference. `implementation` says what ran, and how many
    multiples of N·V·D floating-point operations its forward and backward take together: "blocked, 6 NVD".
    """

    loss: Tensor
    implementation: str
    lse: Tensor | None = None
    logprob: Tensor | None = None
    entropy: Tensor | None = None
    max_prob: Tensor | None = None
    correct: Tensor | None = None
