"""The configuration of a study of tokenization."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from harness.config import Section, validate
from harness.data import TokenizerSection
from harness.model import ModelSection
from harness.optim import OptimizerSection, ScheduleSection

from .markov import LETTERS, MarkovSource

LARGEST_TABLE = 1 << 20


class MarkovSection(Section):
    """A Markov source."""

    kind: Literal["switching", "dirichlet"]
    """switching: the symbol of `order` symbols ago again, or with `probability` another one (arXiv 2404.08335).
    dirichlet: probabilities drawn at random for every state."""

    order: int = Field(..., ge=1)
    """k: the next symbol depends on so many."""

    alphabet: int = Field(2, ge=2, le=len(LETTERS))
    """Symbols."""

    probability: float | None = Field(None, gt=0, lt=1)
    """Of switching."""

    concentration: float | None = Field(None, gt=0)
    """Of dirichlet: small ones make a text that is easy to foresee."""

    seed: int = Field(0, ge=0)
    """Of dirichlet's draw."""

    @model_validator(mode="after")
    def _check(self) -> MarkovSection:
        if self.alphabet**self.order > LARGEST_TABLE:
            raise ValueError(
                f"{self.alphabet} symbols to the order {self.order} are more than {LARGEST_TABLE:,} states"
            )
        if (self.probability is None) == (self.kind == "switching"):
            raise ValueError("probability belongs to kind switching, which needs it")
        if (self.concentration is None) == (self.kind == "dirichlet"):
            raise ValueError("concentration belongs to kind dirichlet, which needs it")
        return self

    def source(self) -> MarkovSource:
        if self.probability is not None:
            return MarkovSource.switching(self.order, self.probability, self.alphabet)
        assert self.concentration is not None
        return MarkovSource.dirichlet(self.order, self.alphabet, self.concentration, self.seed)


class TokenizationStudySection(Section):
    """A study of tokenization."""

    kind: Literal["tokenization"]
    """Which kind of study this file is."""

    folder: str
    """The work folder: texts, results, report."""

    workers: int = Field(1, ge=1)
    """Processes at a time, of one thread each."""

    seed: int = Field(1, ge=0)
    """What texts and runs are made of."""

    seeds: int = Field(1, ge=1)
    """Runs of each kind."""

    sources: dict[str, MarkovSection] = Field(..., min_length=1)
    """By name."""

    symbols: int = Field(4_000_000, ge=1000)
    """Of each source's text; validation text is made besides."""

    document_symbols: int = Field(65536, ge=100)
    """Of one document: long, so that what a model loses at ends of documents counts for nothing."""

    validation_documents: int = Field(8, ge=1)
    """Made besides."""

    tokenizers: dict[str, TokenizerSection] = Field(..., min_length=1)
    """By name. Of kind bytes: none, a symbol a token."""

    models: dict[str, dict[str, Any]] = Field(..., min_length=1)
    """By name, as the section `model` of a run."""

    sequence_length: int = Field(256, ge=2)
    """Tokens."""

    sequences: int = Field(16, ge=1)
    """A step."""

    steps: int = Field(1000, ge=1)
    """Of every run."""

    optimizer: OptimizerSection = OptimizerSection()
    """AdamW."""

    schedule: ScheduleSection = ScheduleSection()
    """The learning rate's course."""

    validations: int = Field(40, ge=1)
    """A run."""

    windows: int = Field(128, ge=1)
    """Of validation text."""

    @property
    def path(self) -> Path:
        return Path(self.folder)

    @model_validator(mode="after")
    def _check(self) -> TokenizationStudySection:
        for name, model in self.models.items():
            validate(ModelSection, model, f"models.{name}")
        if self.symbols < self.document_symbols:
            raise ValueError(f"symbols {self.symbols}: should be at least document_symbols, {self.document_symbols}")
        return self
