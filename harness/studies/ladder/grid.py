"""The runs of a ladder, and what its rules make of each."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from harness.config import plain, validate
from harness.data import TokenizerSection, open_tokenizer
from harness.model import ModelSection, count_parameters, flops_per_token
from harness.parallel import derive_seed
from harness.settings import Settings

from .config import LadderSection


@dataclass(frozen=True)
class Cell:
    """One run."""

    size: str
    ratio: float
    """Tokens a parameter, by the ladder's count."""
    seed: int

    @property
    def name(self) -> str:
        return f"{self.size}-{self.ratio:g}-seed{self.seed}"

    def result(self, config: LadderSection) -> dict[str, Any] | None:
        """None where it is not done yet."""
        file = config.path / "results" / f"{self.name}.json"
        return json.loads(file.read_text()) if file.exists() else None


@dataclass(frozen=True)
class Recipe:
    """What the rules make of a size and a length. Every convention of counting is here, since fits depend on it."""

    total: int
    non_embedding: int
    without_head: int
    head: int
    products: int
    """Weights of the matrix products, the head's among them."""
    steps: int
    sequences: int
    """A step."""
    micro_batch: int
    """Sequences of a forward pass."""
    tokens: int
    """In all: steps x sequences x sequence length."""
    learning_rate: float
    warmup_steps: int
    flops: float
    """Training FLOPs as the trainer counts them: 6 x products + attention, times tokens."""
    flops_without_head: float
    """What the rules are given."""
    flops_6nd: float
    """6 x non-embedding parameters x tokens, as most published fits count."""


def cells(config: LadderSection) -> list[Cell]:
    """Seed after seed and the cheap ones first, so that wherever it stops the small sizes are whole; of this process's
    part."""
    found = [
        Cell(size, ratio, seed)
        for seed in range(config.seeds)
        for size, ratio in sorted(
            ((size, ratio) for size in config.sizes for ratio in config.tokens_per_parameter),
            key=lambda pair: recipe(config, *pair).flops,
        )
    ]
    return found[config.part :: config.parts]


def recipe(config: LadderSection, size: str, ratio: float) -> Recipe:
    section, length = _resolved(config, size), config.data.sequence_length
    counts = count_parameters(section)
    counted = {
        "total": counts.total,
        "non_embedding": counts.blocks,
        "without_head": counts.total - (0 if section.tied_head else counts.head),
    }
    wanted = ratio * counted[config.count]
    a_token = flops_per_token(section, length)
    without_head = a_token - 6 * counts.head
    compute = without_head * wanted
    accumulated, micro = _divided(max(1, round(config.batch(compute) / length)), config.micro_batch_tokens // length)
    sequences = accumulated * micro
    steps = max(1, math.ceil(wanted / (sequences * length)))
    tokens = steps * sequences * length
    return Recipe(
        **counted,
        head=counts.head,
        products=counts.products,
        steps=steps,
        sequences=sequences,
        micro_batch=micro,
        tokens=tokens,
        learning_rate=float(f"{config.learning_rate(compute):.4g}"),
        warmup_steps=round(config.warmup_share * steps),
        flops=float(a_token * tokens),
        flops_without_head=float(without_head * tokens),
        flops_6nd=6.0 * counts.blocks * tokens,
    )


def settings_of(config: LadderSection, cell: Cell) -> Settings:
    """The run of a cell, as `harness train` takes it."""
    found = recipe(config, cell.size, cell.ratio)
    values = {
        "run": {"name": cell.name, "folder": str(config.path / "runs"), "log_every_steps": 100},
        "parallel": {"device": config.device, "threads": 1 if config.device == "cpu" else None},
        "data": plain(config.data),
        "model": {**config.model, **config.sizes[cell.size]},
        "optimizer": {**plain(config.optimizer), "learning_rate": found.learning_rate},
        "schedule": {**plain(config.schedule), "warmup_steps": found.warmup_steps},
        "train": {
            "steps": found.steps,
            "global_batch_size": found.sequences,
            "micro_batch_size": found.micro_batch,
            "precision": config.precision,
            "seed": derive_seed("ladder", config.seed, cell.seed) % 2**31,
        },
        "validation": {"every_steps": max(found.steps // config.validations, 1), "samples": config.windows},
        "checkpoint": {"every_steps": max(found.steps // 4, 1), "keep_last": 1},
    }
    return validate(Settings, values, f"the run {cell.name}")


def as_row(config: LadderSection, cell: Cell) -> dict[str, Any]:
    """What is known of a run before it starts."""
    row = {**asdict(cell), "name": cell.name, **asdict(recipe(config, cell.size, cell.ratio))}
    row["tokens_per_parameter"] = row["tokens"] / row[config.count]
    return row


def _resolved(config: LadderSection, size: str) -> ModelSection:
    section = config.section(size)
    tokenizer: TokenizerSection = config.data.tokenizer
    if section.vocab_size is None:
        vocabulary = tokenizer.vocab_size if tokenizer.is_trained_here else open_tokenizer(tokenizer).vocab_size
        section = section.model_copy(update={"vocab_size": vocabulary})
    if section.positions == "learned" and section.max_positions is None:
        section = section.model_copy(update={"max_positions": config.data.sequence_length})
    return section


def _divided(sequences: int, most: int) -> tuple[int, int]:
    """About so many sequences as micro-batches of equal size, at most `most` each: how many, and their size."""
    accumulated = math.ceil(sequences / max(most, 1))
    return accumulated, math.ceil(sequences / accumulated)
