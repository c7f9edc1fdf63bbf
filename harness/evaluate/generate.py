"""Text from a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from harness.config import HarnessError
from harness.data import Tokenizer
from harness.model import Decoder, KeyValueCache
from harness.parallel import ParallelLayout, ParallelSection

from .config import GenerateSection
from .restore import restore


def generate(target: Path, section: GenerateSection, parallel: ParallelSection) -> list[str]:
    """`section.samples` continuations of `section.prompt` by the model of a run or checkpoint folder."""
    with ParallelLayout(parallel.on_one_process()) as layout:
        restored = restore(target, step=section.step, device=layout.device)
        generator = torch.Generator().manual_seed(section.seed)
        return [complete(restored.model, restored.tokenizer, section, generator) for _ in range(section.samples)]


@torch.no_grad()
def complete(
    model: Decoder,
    tokenizer: Tokenizer,
    section: GenerateSection,
    generator: torch.Generator | None = None,
    agree: Callable[[int], int] | None = None,
) -> str:
    """One continuation, without the prompt. Each token is computed once: keys and values are kept.

    Where several ranks run one model, `agree` makes one rank's token everyone's.
    """
    device = next(model.parameters()).device
    prompt = tokenizer.encode(section.prompt) or [tokenizer.eod]
    limit = model.section.max_positions
    if limit is not None and len(prompt) >= limit:
        raise HarnessError(
            f"generate.prompt: {len(prompt)} tokens leave no room in the model's {limit} positions; shorten the prompt"
        )
    capacity = len(prompt) + section.max_tokens
    if limit is not None:
        capacity = min(capacity, limit)
    caches = [KeyValueCache(capacity) for _ in model.layers]
    tokens = torch.tensor([prompt], device=device)
    new: list[int] = []
    while len(new) < section.max_tokens and caches[0].length + tokens.shape[1] <= capacity:
        logits = model.logits(tokens, caches)[0, -1, : tokenizer.vocab_size]  # beyond are rows that stand for no token
        token = choose(logits.cpu(), section, generator)
        token = agree(token) if agree is not None else token
        if token == tokenizer.eod:
            break
        new.append(token)
        tokens = torch.tensor([[token]], device=device)
    return tokenizer.decode(new)


def choose(logits: Tensor, section: GenerateSection, generator: torch.Generator | None) -> int:
    """The next token from fp32 logits (vocab_size,): greedy at temperature 0, else drawn after top-k and top-p."""
    if section.temperature == 0:
        return int(logits.argmax())
    logits = (logits - logits.max()) / section.temperature  # at most 0, so a tiny temperature overflows to no weight
    order = logits.argsort(descending=True, stable=True)
    if section.top_k is not None:
        order = order[: section.top_k]
    probabilities = logits[order].softmax(dim=0)
    if section.top_p < 1:
        before = probabilities.cumsum(dim=0) - probabilities  # the mass of all more probable tokens
        probabilities = probabilities.masked_fill(before >= section.top_p, 0.0)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
