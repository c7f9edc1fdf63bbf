"""The configuration of evaluation, generation and the closing summary."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from harness.config import Section


class EvaluateSection(Section):
    """`harness evaluate`: a checkpoint's loss on held-out text."""

    split: Literal["validation", "test", "train"] = "validation"
    """Which split of the run's corpora to read."""

    step: int | None = Field(None, ge=0)
    """Which checkpoint of the run. null: the newest good one."""

    samples: int | None = Field(None, ge=1)
    """Windows a corpus, spread evenly over the split. null: all."""

    batch_size: int = Field(16, ge=1)
    """Windows a forward pass."""

    per_token: str | None = None
    """A .npz file to write: for each corpus, of every predicted token, its id (CORPUS/tokens), its loss and the
    entropy of the predicted distribution, in nats (CORPUS/losses, CORPUS/entropies), and whether it was the
    likeliest (CORPUS/correct). null: none."""


class GenerateSection(Section):
    """`harness generate`: text from a checkpoint."""

    prompt: str = ""
    """Text to go on from; empty: start after an end-of-text token."""

    step: int | None = Field(None, ge=0)
    """Which checkpoint of the run. null: the newest good one."""

    max_tokens: int = Field(100, ge=1)
    """Tokens to add at most; generation ends earlier at an end-of-text token."""

    temperature: float = Field(0.8, ge=0)
    """Divides the logits; 0: always the most probable token."""

    top_k: int | None = Field(None, ge=1)
    """Draw from the k most probable tokens only. null: from all."""

    top_p: float = Field(1.0, gt=0, le=1)
    """Draw from the smallest set of tokens whose probability reaches this (Holtzman et al., arXiv 1904.09751)."""

    samples: int = Field(1, ge=1)
    """How many continuations."""

    seed: int = Field(1, ge=0, lt=2**63)
    """The same seed gives the same text on the same machine."""


class SummarySection(Section):
    """What a run prints after its last step."""

    baselines: bool = False
    """Set the validation bits per byte beside those of an order-2 byte model and of gzip -9 on the same text."""

    prompt: str | None = None
    """Print a completion of this prompt, drawn at temperature 0.5 with a fixed seed. null: none."""

    tokens: int = Field(48, ge=1)
    """Length of that completion."""
