"""Parameter groups and the optimizer over them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .config import OptimizerSection


def is_decayed(name: str, section: OptimizerSection) -> bool:
    """Whether weight decay applies to the parameter of this name.

    By name and not by dimension: a sharded parameter may be held flat or empty on a rank.
    """
    *modules, last = name.split(".")
    if last == "bias" or any(module.endswith("norm") for module in modules):
        return False
    return section.decay_embeddings or not any(module.endswith("embedding") for module in modules)


def build_adamw(section: OptimizerSection, masters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """torch's AdamW over a decayed and an undecayed group, each in the order of `masters`."""
    decayed = [weight for name, weight in masters.items() if is_decayed(name, section)]
    undecayed = [weight for name, weight in masters.items() if not is_decayed(name, section)]
    groups = [
        {"params": decayed, "weight_decay": section.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=section.learning_rate,
        betas=(section.beta1, section.beta2),
        eps=section.epsilon,
        fused=True,  # one kernel a group; exists for CPU and CUDA
    )
