"""One micro-batch, and what is masked in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

IGNORED = -100
"""Target without a loss."""


@dataclass(frozen=True)
class Batch:
    """Packed sequences. All tensors are int64 [B, S]."""

    tokens: torch.Tensor
    targets: torch.Tensor
    """The token after each input; -100 where there is no loss."""
    positions: torch.Tensor | None = None
    """Position of each token in its document; None stands for 0 to S - 1."""
    document_ids: torch.Tensor | None = None
    """Attention stays within equal ids; None stands for one causal context a row."""

    def valid_tokens(self) -> int:
        """Number of targets that have a loss."""
        return int((self.targets != IGNORED).sum())

    def to(self, device: torch.device | str) -> Self:
        """The same batch on `device`."""

        def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return type(self)(
            self.tokens.to(device, non_blocking=True),
            self.targets.to(device, non_blocking=True),
            move(self.positions),
            move(self.document_ids),
        )


def make_batch(
    tokens: torch.Tensor,
    targets: torch.Tensor,
    *,
    eod: int,
    document_masking: bool,
    mask_after_end_of_text: bool,
) -> Batch:
    """A batch of int64 [B, S] tokens and targets with the masking that the configuration asks for.

    An end-of-text token belongs to the document that it ends. A row that begins inside a document counts positions
    from its own first token, as megatron-core does.
    """
    ends = tokens == eod
    if mask_after_end_of_text:
        targets = targets.masked_fill(ends, IGNORED)
    if not document_masking:
        return Batch(tokens, targets)
    document_ids = ends.cumsum(1) - ends.long()
    place = torch.arange(tokens.shape[1]).expand_as(tokens)
    starts = torch.zeros_like(tokens)
    starts[:, 1:] = torch.where(ends[:, :-1], place[:, 1:], 0)
    return Batch(tokens, targets, place - starts.cummax(1).values, document_ids)
