"""The head: it owns the output weight, and turns hidden states into losses without ever holding the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from harness.kernels import CompSum, CrossEntropy, LossOutput, VocabShard, linear_cross_entropy
from harness.parallel import TensorParallel

from .config import LossSection, ModelSection

Reduction = Literal["mean", "sum", "none"]


class Head(nn.Module):
    """A linear map to the vocabulary, used inside its own forward so that sharding engines can gather its weight there.

    The tensor-parallel ranks hold consecutive rows. A tied head registers the token embedding's parameter as its own
    (Decoder.tie_head).
    """

    tensor_sharded = {"weight": 0}  # noqa: RUF012

    def __init__(self, section: ModelSection, loss: LossSection, tensor: TensorParallel) -> None:
        super().__init__()
        assert section.vocab_size is not None
        self.tensor = tensor
        rows = section.padded_vocab_size(tensor.size) // tensor.size
        start = tensor.rank * rows
        # Kept, since the first loss with a shard compares it over the ranks; by whether tokens are split.
        self.shards = {
            split: VocabShard(
                start,
                start + rows,
                section.vocab_size,
                group=tensor.group if tensor.size > 1 else None,
                sequence_parallel=split,
            )
            for split in {False, tensor.splits_tokens}
        }
        self.weight = nn.Parameter(torch.empty(rows, section.hidden_size))
        self.softcap = section.logit_softcap
        self.loss = loss
        self.comp_sum = CompSum(tau=loss.tau)

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor,
        *,
        plain: bool = False,
        reduction: Reduction = "sum",
        outputs: Sequence[str] = (),
    ) -> LossOutput:
        """Losses of hidden (..., H) against int64 targets (...), -100 where there is none, the same on all
        tensor-parallel ranks. Where tokens are split, hidden is (tokens / ranks, H), this rank's.

        `plain` leaves out what is only for training (tau, z-loss, label smoothing).
        """
        return linear_cross_entropy(
            hidden,
            self.weight,
            targets,
            loss=CrossEntropy() if plain else self.comp_sum,
            label_smoothing=0.0 if plain else self.loss.label_smoothing,
            z_loss=0.0 if plain else self.loss.z_loss,
            softcap=self.softcap,
            reduction=reduction,
            outputs=tuple(outputs),
            shard=self.shards[self.tensor.splits_tokens],
            # Autograd rounds it to a bf16 weight's dtype, unless the engine has asked for fp32 (`grad_dtype`).
            weight_grad_dtype=torch.promote_types(self.weight.dtype, torch.float32),
            implementation=self.loss.implementation,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits (..., vocab_size) of hidden (..., H), float64 of a float64 model: for generation and proofs,
        never in training."""
        shard = self.shards[False]
        logits = nn.functional.linear(hidden, self.weight[: shard.columns])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = self.tensor.gather_columns(logits, shard.start, shard.vocab_size)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
