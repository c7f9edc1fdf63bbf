"""The configuration of a study of selection scores."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from harness.config import ConfigError, Section
from harness.data import TokenizerSection
from harness.model import ModelSection
from harness.optim import OptimizerSection, ScheduleSection
from harness.selection import ScoreSection
from harness.text import TextSource

DATA_FOLDER = "HARNESS_TEST_DATA"
SHARED = "shared"
"""What stands for the target where a run serves all of them."""


class PoolSourceSection(TextSource):
    """One kind of text in the pool."""

    windows: int = Field(..., ge=1)
    """Windows that are cut from it at most, before duplicates are removed; from documents in a seeded order."""

    windows_a_draw: int = Field(..., ge=1)
    """Windows of it in each draw of the pool."""

    windows_a_document: int = Field(4, ge=1)
    """Windows that one document gives at most, so that a long book is not the pool."""

    joined: bool = False
    """Cut windows from all documents in a row, a blank line between them, in a seeded order: for documents that are
    much shorter than a window."""


class PoolSection(Section):
    """Where the windows come from and what is removed."""

    sources: tuple[PoolSourceSection, ...]
    """The kinds of text; a window keeps the name of its own."""

    window_bytes: tuple[int, int] = (1500, 2500)
    """Least and most that a window aims at: its aim is drawn evenly between them, whatever the source, and it ends at
    the line end nearest to its aim."""

    near_duplicate: float = Field(0.6, gt=0, le=1)
    """Windows whose sets of 5-word shingles have at least this Jaccard similarity, by MinHash, count as one."""

    overlap_words: int = Field(13, ge=1)
    """A window that shares so many consecutive words with a target or with an item of evaluation is dropped."""

    @field_validator("window_bytes")
    @classmethod
    def _check_range(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 16 <= value[0] <= value[1]:
            raise ValueError(f"{list(value)} should be the least and the most bytes of a window, 16 or more")
        return value

    @field_validator("sources")
    @classmethod
    def _check_sources(cls, value: tuple[PoolSourceSection, ...]) -> tuple[PoolSourceSection, ...]:
        names = [source.name for source in value]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"needs sources with names of their own, has {names}")
        return value


class ItemsSection(TextSource):
    """Texts of a benchmark: what is selected for, or what is predicted."""

    part: Literal["all", "first half", "second half"] = "all"
    """Which of the file's records: so that target and evaluation can be halves of one file."""

    shuffle_seed: int | None = None
    """Shuffle the records before they are halved; the same seed for both halves. null: as they lie."""

    least_bytes: int = Field(1, ge=1)
    """Leave out shorter texts (before halving)."""

    most: int | None = Field(None, ge=1)
    """Take the first so many of the part. null: all."""


class TargetSection(Section):
    """What text is selected for, and how the outcome is measured."""

    name: str
    """Its name in the results."""

    target: ItemsSection
    """The texts that the scores see."""

    evaluation: ItemsSection
    """The texts whose bits per byte are the outcome; no score sees them."""

    in_domain: str | None = None
    """The pool's source that a file-type filter would take; null: there is none, and no such arm."""

    held_back: bool = False
    """Untouched until `confirm` is set: for confirming, once, what the others have decided."""


class ArmSection(Section):
    """One way to choose windows."""

    name: str
    """Its name in the results."""

    kind: Literal["random", "length-matched", "file-type", "score", "dsir"]
    """random: windows at random. length-matched: at random, with the lengths of what `matches` chooses. file-type: at
    random within the target's in_domain source. score: the best by `score`. dsir: hashed n-gram importance weights
    (Xie et al., arXiv 2302.03169)."""

    score: ScoreSection | None = None
    """Of kind score: the method."""

    matches: str | None = None
    """Of kind length-matched: the name of the arm whose lengths are taken."""

    sampled: bool = True
    """Of kind dsir: importance resampling as published (Gumbel top-k), or false: the largest weights."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.kind == "score") != (self.score is not None):
            raise ValueError(f"arm {self.name!r}: `score` belongs to kind score, and only to it")
        if (self.kind == "length-matched") != (self.matches is not None):
            raise ValueError(f"arm {self.name!r}: `matches` belongs to kind length-matched, and only to it")
        return self

    @property
    def is_stochastic(self) -> bool:
        """Whether another seed chooses otherwise."""
        return self.kind in ("random", "length-matched", "file-type") or (self.kind == "dsir" and self.sampled)


class RecipeSection(Section):
    """One kind of training run."""

    seen_tokens: int = Field(..., ge=1)
    """Tokens of training, rounded up to whole steps; over the unique tokens these are its epochs."""

    optimizer: OptimizerSection
    """AdamW and its peak learning rate."""

    schedule: ScheduleSection
    """The rate's course."""


class BaseSection(RecipeSection):
    """The model that the continued runs begin with."""

    unique_tokens: int = Field(..., ge=1)
    """Tokens of the random sample of the whole pool that it is trained on."""


class SelectionStudySection(Section):
    """A study of which selection score helps training."""

    kind: Literal["selection"]
    """The kind of study that this file describes."""

    folder: str = "runs/studies/selection"
    """Where pool, scores and results are kept. What is finished there is not done again."""

    data_folder: str | None = None
    """What `{data}` stands for in paths. null: the environment variable HARNESS_TEST_DATA."""

    seed: int = Field(8, ge=0)
    """Where the pool, its draws and random choices come from; the runs add their own seeds."""

    pool: PoolSection
    """The text to choose from."""

    targets: tuple[TargetSection, ...]
    """What to choose for."""

    confirm: bool = False
    """Run the targets that are held back, too: once, after a default has been chosen on the others."""

    arms: tuple[ArmSection, ...]
    """The ways to choose; the first is what all others are compared with."""

    second_baseline: str | None = None
    """Name of an arm that all arms are compared with besides. null: none."""

    draws: int = Field(3, ge=1)
    """Draws of the pool."""

    seeds: int = Field(5, ge=1)
    """Runs of every arm in every draw, which differ in initial weights, order of text, and random choices."""

    budget_tokens: int = Field(..., ge=1)
    """Unique tokens that every arm chooses."""

    largest_share: float = Field(0.25, gt=0, le=1)
    """The budget may not be more than this share of the in-domain tokens of any draw."""

    tokenizer: TokenizerSection = TokenizerSection()
    """Trained once, on the whole pool."""

    sequence_length: int = Field(128, ge=2)
    """Tokens of a training sequence, and of context in evaluation."""

    batch_sequences: int = Field(16, ge=1)
    """Sequences of a step."""

    model: ModelSection
    """The model that every arm trains."""

    scratch: RecipeSection | None = None
    """Training from new weights. null: not done."""

    continued: RecipeSection | None = None
    """Training on from the base. null: not done."""

    base: BaseSection | None = None
    """The common base; needed for `continued`."""

    workers: int = Field(2, ge=1)
    """Processes, each with one thread; more can be started at any time with the same command."""

    resamples: int = Field(10_000, ge=100)
    """Of the bootstrap."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [arm.name for arm in self.arms]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"arms: need names of their own, are {names}")
        for name in [arm.matches for arm in self.arms] + [self.second_baseline]:
            if name is not None and name not in names:
                raise ValueError(f"there is no arm {name!r} (arms: {', '.join(names)})")
        sources = [source.name for source in self.pool.sources]
        for target in self.targets:
            if target.in_domain is not None and target.in_domain not in sources:
                raise ValueError(f"target {target.name!r}: in_domain {target.in_domain!r} is no source of the pool")
            if target.name == SHARED:
                raise ValueError(f"a target cannot be named {SHARED!r}")
        if self.arms[0].kind != "random":
            raise ValueError(f"the first arm is what all are compared with: kind random, not {self.arms[0].kind}")
        if self.continued is not None and self.base is None:
            raise ValueError("continued needs a base to begin with")
        if self.scratch is None and self.continued is None:
            raise ValueError("nothing to train: set scratch, continued, or both")
        return self

    @property
    def path(self) -> Path:
        """The work folder."""
        return Path(self.folder).expanduser()

    @property
    def modes(self) -> dict[str, RecipeSection]:
        """The kinds of run by name."""
        modes = {"scratch": self.scratch, "continued": self.continued}
        return {name: recipe for name, recipe in modes.items() if recipe is not None}

    @property
    def active_targets(self) -> list[TargetSection]:
        """Those that are run now."""
        return [target for target in self.targets if self.confirm or not target.held_back]

    def arm(self, name: str) -> ArmSection:
        """An arm by its name."""
        return next(arm for arm in self.arms if arm.name == name)

    def target(self, name: str) -> TargetSection:
        """A target by its name."""
        return next(target for target in self.targets if target.name == name)

    def located(self, source: TextSource) -> Any:
        """The source with `{data}` filled in. ConfigError where nothing says what that is."""
        if not any("{data}" in entry for entry in source.source):
            return source
        data = self.data_folder or os.environ.get(DATA_FOLDER)
        if data is None:
            raise ConfigError(f"data_folder: is null and {DATA_FOLDER} is not set; {{data}} in {source.name} needs one")
        return source.model_copy(update={"source": tuple(entry.replace("{data}", data) for entry in source.source)})
