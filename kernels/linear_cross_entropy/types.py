"""What the linear cross-entropy takes and gives: the vocabulary shard, the constants of a call, the result."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch.distributed as dist
from torch import Tensor

IGNORE_INDEX = -100
"""The target of a token that takes no part in the loss: torch's own default."""

OUTPUTS = ("lse", "logprob", "entropy", "max_prob", "correct")
"""The per-token outputs that can be asked for."""

Reduction = Literal["mean", "sum", "none"]

_shards: weakref.WeakValueDictionary[str, VocabShard] = weakref.WeakValueDictionary()
_numbers = itertools.count()


@dataclass(frozen=True)
class VocabShard:
    """Which rows of the vocabulary a weight holds: global ids start to stop, of which those below vocab_size are real.

    Rows at or beyond vocab_size are padding: they take no probability and get exactly zero gradient. A weight that
    is not sharded has start 0 and as many rows as stop says.

    group              the ranks that hold the vocabulary together: in rank order consecutive ranges from row 0 on, of
                       any lengths; some may hold nothing but padding. None, or a group of one: this rank holds all.
    sequence_parallel  hidden is this rank's equal, contiguous share of the tokens, in rank order, and not all of them.

    The first loss computed with a shard compares it with those of the other ranks: one small collective, for which the
    host waits. So make it once and keep it, on all ranks alike. (What is remembered hangs on the object and not on its
    value: of two calls with equal values on one rank, another rank may see different ones.)

    Raises ValueError where the values cannot be true together, or this process is not in the group.
    """

    start: int
    stop: int
    vocab_size: int
    group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False
    stops: tuple[int, ...] = field(default=(), init=False, repr=False, compare=False)
    """Where each rank's rows end: set by the first loss, and empty before, and always where one rank holds all."""
    ranks: int = field(default=1, init=False, repr=False, compare=False)
    """Ranks that hold the vocabulary together."""
    key: str = field(default="", init=False, repr=False, compare=False)
    """A name for this object in this process, by which a custom operator finds it; empty where one rank holds all."""

    def __post_init__(self) -> None:
        for name in ("start", "stop", "vocab_size"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int):
                raise ValueError(f"VocabShard: {name} must be an int, got {getattr(self, name)!r}")
        if not 0 <= self.start < self.stop:
            raise ValueError(f"VocabShard: 0 <= start < stop must hold, got start={self.start}, stop={self.stop}")
        if self.vocab_size < 1:
            raise ValueError(f"VocabShard: vocab_size must be at least 1, got {self.vocab_size}")
        if self.group is not None and not (dist.is_available() and isinstance(self.group, dist.ProcessGroup)):
            raise ValueError(
                f"VocabShard: group must be a ProcessGroup that this process is in, or None, got {self.group!r}"
            )
        if self.group is not None and self.group.size() > 1:
            object.__setattr__(self, "ranks", self.group.size())
            object.__setattr__(self, "key", f"vocabulary shard {next(_numbers)}")
            _shards[self.key] = self

    def __copy__(self) -> VocabShard:
        """Itself: nothing in it changes, and a copy would not be found by its key."""
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> VocabShard:
        return self

    @classmethod
    def find(cls, key: str) -> VocabShard:
        """The shard over several ranks that has this key. Raises RuntimeError where it is gone."""
        shard = _shards.get(key)
        if shard is None:
            raise RuntimeError(f"{key}: dropped, or of another process; keep the VocabShard as long as its losses")
        return shard

    @property
    def rank(self) -> int:
        """This process's place among the ranks."""
        return 0 if self.group is None else self.group.rank()

    @property
    def columns(self) -> int:
        """Real rows here, that is columns of the logits; 0 where all is padding."""
        return max(0, min(self.stop, self.vocab_size) - self.start)

    @property
    def most_columns(self) -> int:
        """`columns` of the rank that has most: the same number on all ranks."""
        stops = [min(stop, self.vocab_size) for stop in self.stops or (self.stop,)]
        return max(stop - start for start, stop in zip([0, *stops], stops, strict=False))


@dataclass(frozen=True)
class Terms:
    """The constants of one call, checked: what is added to the plain cross-entropy, and what the logits go through."""

    vocab_size: int
    ignore_index: int = IGNORE_INDEX
    shift: int = 0
    tau: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    temperature: float = 1.0


class LossOutput(NamedTuple):
    """A loss, and what was asked for beside it; the outputs that were not asked for are None.

    All but `correct` are differentiable with respect to hidden, weight and bias. The outputs have the shape of the
    targets and hold 0 (False) at ignored tokens. They describe the final logits, after softcap and temperature:

    lse       log-sum-exp over the vocabulary
    logprob   log-probability of the target
    entropy   of the predicted distribution, in nats
    max_prob  probability of the likeliest token; its gradient is that of this one token
    correct   bool: the target is the likeliest token (of equal ones, the one with the lowest id)

    kept_share, 0-dim fp32, is there with a filter_bound: the share of the softmax's tiles that are multiplied out.

    dtype: fp32, or float64 for float64 inputs and for the reference. `implementation` says what ran, where the
    gradients are formed, and how many multiples of N·V·D floating-point operations forward and backward take together:
    "blocked, formed in the forward, 6 NVD".
    """

    loss: Tensor
    implementation: str
    lse: Tensor | None = None
    logprob: Tensor | None = None
    entropy: Tensor | None = None
    max_prob: Tensor | None = None
    correct: Tensor | None = None
    kept_share: Tensor | None = None
