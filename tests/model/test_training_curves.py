"""Training with the fused loss beside training with plain torch's, on full logits: the same curve."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.config import validate
from harness.model import Decoder, LossSection, ModelSection, build_decoder

STEPS = 60
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2", "layers": 2, "hidden_size": 48, "heads": 3, "max_positions": 32},
    "llama": {"family": "llama", "layers": 2, "hidden_size": 48, "heads": 4, "kv_heads": 2, "tied_head": False},
}
LOSSES: dict[str, dict[str, float]] = {
    "cross-entropy": {},
    "smoothed, with z-loss and softcap": {"label_smoothing": 0.1, "z_loss": 1e-2, "logit_softcap": 3.0},
}


def plain_loss(model: Decoder, tokens: Tensor, targets: Tensor, loss: LossSection) -> Tensor:
    logits = model.logits(tokens).flatten(0, 1)
    smoothed = F.cross_entropy(logits, targets.flatten(), label_smoothing=loss.label_smoothing, reduction="sum")
    return smoothed + loss.z_loss * logits.logsumexp(-1).square().sum()


def curve(shape: dict[str, Any], constants: dict[str, float], fused: bool, seed: int) -> list[float]:
    softcap = constants.get("logit_softcap")
    loss = validate(LossSection, {key: value for key, value in constants.items() if key != "logit_softcap"}, "test")
    section = validate(ModelSection, {**shape, "vocab_size": 101, "logit_softcap": softcap}, "test")
    model = build_decoder(section, loss=loss, seed=seed % 1000)
    # An epsilon with which a gradient that is rounding alone doesn't move its weight.
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-4)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(STEPS):
        # A walk over the vocabulary: each token says much of the next.
        text = torch.randint(0, 4, (6, 25), generator=generator).cumsum(1) % 101
        tokens, targets = text[:, :-1], text[:, 1:]
        total = model(tokens, targets).loss if fused else plain_loss(model, tokens, targets, loss)
        optimizer.zero_grad()
        (total / targets.numel()).backward()
        optimizer.step()
        losses.append(total.item() / targets.numel())
    return losses


@pytest.mark.parametrize("constants", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_fused_loss_trains_as_plain_torch_does(shape: dict[str, Any], constants: dict[str, float]) -> None:
    seed = torch.seed() % 2**31
    fused, plain = (curve(shape, constants, fused, seed) for fused in (True, False))
    assert plain[-1] < 0.85 * plain[0], "the model learns"
    assert fused == pytest.approx(plain, rel=1e-5), f"seed {seed}"
