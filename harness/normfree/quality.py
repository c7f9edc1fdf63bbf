"""How good a model is, with or without norms: losses and their tail, calibration, and what freezing would cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from harness.callbacks import evaluating
from harness.data import IGNORED, Batch, Tokenizer
from harness.model import Decoder, SiteState

from .statistics import Averages

BINS = 15
"""Of confidence, for the calibration error (Guo et al., arXiv 1706.04599)."""


@dataclass(frozen=True)
class Quality:
    """Of the loss in nats a token; entropy in nats; calibration error: the mean over tokens of |share correct -
    confidence| of their bin."""

    mean: float
    median: float
    p999: float
    largest: float
    entropy: float
    calibration_error: float
    tokens: int


@torch.no_grad()
def measure(model: Decoder, batches: Iterable[Batch]) -> tuple[Quality, np.ndarray]:
    """The quality over all valid targets, and their losses (tokens,), float64, in the order of the text."""
    losses: list[np.ndarray] = []
    entropies: list[np.ndarray] = []
    confidences: list[np.ndarray] = []
    hits: list[np.ndarray] = []
    with evaluating(model):
        for batch in batches:
            wanted = ("entropy", "max_prob", "correct")
            output = model(
                batch.tokens,
                batch.targets,
                batch.positions,
                batch.document_ids,
                plain=True,
                reduction="none",
                outputs=wanted,
            )
            valid = batch.targets != IGNORED
            columns = (output.loss, output.entropy, output.max_prob, output.correct)
            for kept, column in zip((losses, entropies, confidences, hits), columns, strict=True):
                kept.append(column[valid].double().cpu().numpy())
    loss, confidence, hit = np.concatenate(losses), np.concatenate(confidences), np.concatenate(hits)
    quality = Quality(
        mean=float(loss.mean()),
        median=float(np.median(loss)),
        p999=float(np.quantile(loss, 0.999)),
        largest=float(loss.max()),
        entropy=float(np.concatenate(entropies).mean()),
        calibration_error=calibration_error(confidence, hit),
        tokens=len(loss),
    )
    return quality, loss


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Expected calibration error of confidences in [0, 1] and hits (0 or 1), in BINS equal bins."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def rare_tokens(tokenizer: Tokenizer, text: Tensor, rows: int, length: int, seed: int) -> tuple[list[Batch], int]:
    """A probe of what is seldom seen: rows that begin with `text` (int64, at least rows x length / 2 tokens) and go on
    with the tokens of all 256 single bytes in random order, one row going on where the row before ends, and then from
    the first in another order. Targets are those alone. Also how many bytes have no token of their own, and are left
    out."""
    single = {piece: number for number, piece in enumerate(tokenizer.pieces) if len(piece) == 1}
    ids = torch.tensor([number for _, number in sorted(single.items())])
    generator = torch.Generator().manual_seed(seed)
    half = length // 2
    tokens = torch.empty(rows, length + 1, dtype=torch.int64)
    tokens[:, :half] = text[: rows * half].view(rows, half)
    wanted = rows * (length + 1 - half)
    orders = [torch.randperm(len(ids), generator=generator) for _ in range(-(-wanted // len(ids)))]
    tokens[:, half:] = ids[torch.cat(orders)][:wanted].view(rows, -1)
    targets = tokens[:, 1:].clone()
    targets[:, : half - 1] = IGNORED
    return [Batch(tokens[:, :-1].contiguous(), targets)], 256 - len(ids)


@torch.no_grad()
def site_statistics(model: Decoder, batches: Iterable[Batch]) -> Averages:
    """Sigma at every site of a model with switchable norms, over these batches."""
    assert model.norm_states is not None
    averages = Averages(1)
    training, section = model.training, model.section
    model.section = section.model_copy(update={"dropout": 0.0})
    model.train()  # only then are tokens counted
    model.norm_states.gather(True)
    for batch in batches:
        model.hidden_states(batch.tokens, batch.positions, batch.document_ids)
    model.norm_states.gather(False)
    averages.update(model.norm_states.take(lambda sums: sums))
    model.train(training)
    model.section = section
    return averages


def freezing_cost(model: Decoder, statistics: list[Batch], batches: list[Batch]) -> float:
    """How many nats a token it costs to freeze all norms of a model at once, at their mean sigma over `statistics`,
    without any training: the difference over `batches`. The model, with switchable norms, is left as it was."""
    states = model.norm_states
    assert states is not None
    before = dict(states.states)
    sigma = site_statistics(model, statistics).sites
    real, _ = measure(model, batches)
    states.set({site: SiteState(1.0, average.sigma) for site, average in sigma.items()})
    frozen, _ = measure(model, batches)
    states.set(before)
    return frozen.mean - real.mean
