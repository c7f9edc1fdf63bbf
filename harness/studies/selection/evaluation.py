"""The cost of held-out items under a trained model, item by item."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from harness.callbacks import Callback, TrainerView, evaluating
from harness.data import IGNORED, Tokenizer
from harness.model import Decoder

ROWS = 32
"""Windows a forward pass."""


class ItemScores(Callback):
    """After the last step: the nats of every item under the model as it is then."""

    name = "item_scores"

    def __init__(self, items: dict[str, list[str]], sequence_length: int) -> None:
        """`items` by target."""
        self.items, self.sequence_length = items, sequence_length
        self.scores: dict[str, dict[str, list[Any]]] = {}
        """By target: `nats` and `bytes` of each item."""

    def after_training(self, trainer: TrainerView) -> None:
        for target, texts in self.items.items():
            nats = item_nats(trainer.model, trainer.prepared.tokenizer, texts, self.sequence_length)
            self.scores[target] = {"nats": nats, "bytes": [len(text.encode()) for text in texts]}


@torch.no_grad()
def item_nats(model: Decoder, tokenizer: Tokenizer, texts: Sequence[str], sequence_length: int) -> list[float]:
    """Negative log-likelihood of each text, in nats, summed over its tokens.

    Each text stands alone behind an end-of-text token. It is read in windows of `sequence_length` inputs, one behind
    the other, each with no sight of those before it; the end of text itself is not predicted.
    """
    rows: list[tuple[int, list[int], list[int]]] = []
    for number, ids in enumerate(tokenizer.encode_batch(texts)):
        inputs = [tokenizer.eod, *ids[:-1]]
        for start in range(0, len(ids), sequence_length):
            part = slice(start, start + sequence_length)
            rows.append((number, inputs[part], ids[part]))
    rows.sort(key=lambda row: len(row[1]))  # rows of a batch are of like length, so little is padding
    sums = [0.0] * len(texts)
    with evaluating(model):
        for first in range(0, len(rows), ROWS):
            batch = rows[first : first + ROWS]
            longest = max(len(inputs) for _, inputs, _ in batch)
            tokens = torch.full((len(batch), longest), tokenizer.eod)
            targets = torch.full((len(batch), longest), IGNORED)
            for row, (_, inputs, wanted) in enumerate(batch):
                tokens[row, : len(inputs)] = torch.tensor(inputs)
                targets[row, : len(wanted)] = torch.tensor(wanted)
            losses = model(tokens, targets, plain=True, reduction="none").loss.double()
            for (number, _, _), value in zip(batch, losses.sum(dim=1).tolist(), strict=True):
                sums[number] += value
    return sums
