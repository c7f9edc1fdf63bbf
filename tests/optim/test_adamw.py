"""Parameter groups: what is decayed and what is not."""

from __future__ import annotations

import torch

from harness.model import build_decoder
from harness.optim import OptimizerSection, build_adamw
from tests.model.sections import SECTIONS


def test_decay_acts_on_matrices_only() -> None:
    """With zero gradients AdamW's step is the decay alone: w * (1 - lr * decay)."""
    for name, decay_embeddings in (("gpt2", True), ("llama-qk-norm", True), ("gpt2-untied", False)):
        model = build_decoder(SECTIONS[name], seed=0)
        section = OptimizerSection(learning_rate=0.5, weight_decay=0.25, decay_embeddings=decay_embeddings)
        masters = dict(model.named_parameters())
        before = {name: weight.detach().clone() + 1 for name, weight in masters.items()}
        for name, weight in masters.items():
            weight.data.copy_(before[name])
            weight.grad = torch.zeros_like(weight)
        build_adamw(section, masters).step()
        for name, weight in masters.items():
            decayed = weight.dim() == 2 and (decay_embeddings or "embedding" not in name)
            expected = before[name] * (0.875 if decayed else 1.0)
            torch.testing.assert_close(weight.detach(), expected, msg=name)
