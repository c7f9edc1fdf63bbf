"""The head: it owns the output weight, and turns hidden states into losses without ever holding the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from harness.kernels import LossOutput, VocabShard, linear_cross_entropy

from .config import LossSection, ModelSection

Reduction = Literal["mean", "sum", "none"]


class Head(nn.Module):
    """A linear map to the vocabulary, used inside its own forward so that sharding engines can gather its weight there.

    A tied head registers the token embedding's parameter as its own (Decoder.tie_head).
    """

    def __init__(self, section: ModelSection, loss: LossSection) -> None:
        super().__init__()
        assert section.vocab_size is not None
        rows = section.padded_vocab_size
        self.weight = nn.Parameter(torch.empty(rows, section.hidden_size))
        self.shard = VocabShard(start=0, stop=rows, vocab_size=section.vocab_size)
        self.softcap = section.logit_softcap
        self.loss = loss

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor,
        *,
        plain: bool = False,
        reduction: Reduction = "sum",
        outputs: Sequence[str] = (),
    ) -> LossOutput:
        """Losses of hidden (..., H) against int64 targets (...), -100 where there is none.

        `plain` leaves out what is only for training (z-loss, label smoothing).
        """
        return linear_cross_entropy(
            hidden,
            self.weight,
            targets,
            label_smoothing=0.0 if plain else self.loss.label_smoothing,
            z_loss=0.0 if plain else self.loss.z_loss,
            softcap=self.softcap,
            reduction=reduction,
            outputs=tuple(outputs),
            shard=self.shard,
            implementation=self.loss.implementation,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits (..., vocab_size) of hidden (..., H): for generation and proofs, never in training."""
        logits = nn.functional.linear(hidden, self.weight[: self.shard.vocab_size]).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
