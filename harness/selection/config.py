"""The configuration of `harness select`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from harness.config import Section
from harness.text import TextSource

from .methods import ScoreSection

BUDGETS = ("documents", "tokens", "bytes", "share", "threshold")


class PoolSection(TextSource):
    """The documents to choose from."""

    name: str = "pool"
    """How messages call it."""

    id_field: str | None = None
    """Key or column with a document's id, for reports and to break ties. A document without one, or with null, is
    called by its file and place there, and so are all with null here."""

    group_field: str | None = None
    """Key or column by whose values the report counts what was chosen, such as source; null: by file or folder.
    Documents without a value count as (none)."""

    on_error: Literal["stop", "skip"] = "stop"
    """What to do at a record that cannot be read (broken JSON, no text field, a truncated archive): stop, or skip and
    count it. Empty documents are always skipped and counted."""

    @property
    def label(self) -> str:
        return self.name

    @model_validator(mode="after")
    def _has_text(self) -> Self:
        if not self.source:
            raise ValueError("has no text: set `source` (files, folders, globs)")
        return self


class TargetSection(TextSource):
    """Texts that the chosen ones should be like."""

    name: str
    """How messages, scores and the report call them."""

    documents: tuple[int, int] | None = None
    """[first, end): a range of the documents in the order of their files, such as [0, 82]; null takes all."""

    share: float = Field(1.0, gt=0)
    """Share of the budget that is chosen for these targets, relative to those of the other targets."""

    @property
    def label(self) -> str:
        return f"targets {self.name!r}"

    @field_validator("documents")
    @classmethod
    def _check_documents(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not 0 <= value[0] < value[1]:
            raise ValueError(f"{list(value)} is no range: [first, end) with 0 <= first < end")
        return value

    @model_validator(mode="after")
    def _has_text(self) -> Self:
        if not self.source:
            raise ValueError("has no text: set `source` (files, folders, globs)")
        return self


class BudgetSection(Section):
    """How much is chosen: exactly one of documents, tokens, bytes, share and threshold."""

    documents: int | None = Field(None, ge=1)
    """Documents."""

    tokens: int | None = Field(None, ge=1)
    """Tokens of `tokenizer`, an end-of-text token a document included. The best documents that fit, in order: the
    first that does not ends the choice."""

    bytes: int | None = Field(None, ge=1)
    """Bytes of UTF-8 text, likewise."""

    share: float | None = Field(None, gt=0, le=1)
    """Part of the pool's documents, after exact duplicates are gone; rounded down, but at least one."""

    threshold: float | None = None
    """Lowest score; takes every document that reaches it for at least one of the targets."""

    tokenizer: str | None = None
    """For tokens: a folder with a tokenizer (data.folder/tokenizer, or a checkpoint's), a .model of sentencepiece or a
    tokenizer.json."""

    when_short: Literal["stop", "take"] = "stop"
    """What to do where the pool has less than the budget: stop, or take all there is."""

    @property
    def unit(self) -> str:
        """Which of the five is set."""
        return next(name for name in BUDGETS if getattr(self, name) is not None)

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"say exactly one of {', '.join(BUDGETS)}; found {found}")
        if (self.tokens is not None) != (self.tokenizer is not None):
            raise ValueError("tokens are counted by a tokenizer: set both `tokens` and `tokenizer`, or neither")
        return self


class RacingSection(Section):
    """Scoring few documents on all targets: those that a cheap estimate leaves in the race."""

    exact: bool = False
    """Whether to score every document on every target instead."""

    audited_documents: int = Field(1024, ge=64)
    """Random documents that are scored on all targets whatever their estimate: to one half the estimate is fitted, on
    the other its recall is measured."""

    headroom: float = Field(1.5, ge=1)
    """How many times the budget is scored on all targets at first."""

    margin: float = Field(1.5, ge=1)
    """A document is out of the race where its estimate falls short of the last chosen score by more than this many
    times the largest shortfall of an estimate that was seen near there."""


class DuplicatesSection(Section):
    """What counts as said before. Of duplicates the best-scored one is kept."""

    remove: Literal["near", "exact", "none"] = "near"
    """near: also documents whose word shingles are much the same, by MinHash among the chosen; exact: equal texts."""

    similarity: float = Field(0.8, gt=0, le=1)
    """Jaccard similarity of two documents' sets of shingles from which on the lower-scored one is dropped."""

    shingle_words: int = Field(5, ge=1)
    """Words in a row that make a shingle."""

    permutations: int = Field(128, ge=16)
    """Hash functions of MinHash: the similarity's standard error is about 0.5 / sqrt(permutations)."""


class LeaksSection(Section):
    """Documents that hold a target itself: chosen, they would teach the answers."""

    remove: bool = True
    """Whether to leave such documents out."""

    against: tuple[TextSource, ...] = ()
    """Further texts that must not be chosen, such as the evaluation's own."""

    words: int = Field(13, ge=3)
    """Words in a row that are compared, in lower case and without punctuation; shorter targets are compared whole."""

    least_words: int = Field(5, ge=1)
    """Targets of fewer words are not looked for: documents have such by chance."""

    share: float = Field(0.3, gt=0, le=1)
    """Part of a target's word runs from which on a document holds it."""

    @field_validator("against")
    @classmethod
    def _check_against(cls, value: tuple[TextSource, ...]) -> tuple[TextSource, ...]:
        for each in value:
            if not each.source:
                raise ValueError(f"{each.name!r} has no text: set `source` (files, folders, globs)")
        return value


class OutputSection(Section):
    """What is written, and where."""

    folder: str
    """Folder of the selection: chosen/, selection.json, report.json, report.html."""

    work: str | None = None
    """Folder of the scores, from which a restart goes on, and from which another budget is cheap; null: work/ in
    `folder`. May be deleted afterwards."""

    rejected: bool = False
    """Whether to write what was not chosen too, as rejected/; documents that left the race have no score (null)."""

    score_field: str = "score"
    """Key or column that is added to each document."""

    target_field: str = "score_target"
    """Key or column with the name of the targets that a document was chosen for; added where there are several."""


class DistributedSection(Section):
    """Running on many machines, by datatrove."""

    engine: Literal["none", "local", "slurm", "ray"] = "none"
    """none: this process and its workers. local: datatrove's tasks on this machine. slurm, ray: on a cluster, with a
    file system that all machines share; this process submits, waits and decides."""

    tasks: int = Field(8, ge=1)
    """Tasks that the shards are dealt out to; no more than there are shards (a jsonl or parquet file is one, or several
    small ones together)."""

    workers: int | None = Field(None, ge=1)
    """Tasks at a time; null: all."""

    partition: str = ""
    """For slurm: the partition."""

    time: str = "04:00:00"
    """For slurm: the time limit of a task."""

    options: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    """Further arguments of datatrove's executor: for slurm cpus_per_task, mem_per_cpu_gb, qos, venv_path, env_command;
    for ray cpus_per_task, mem_per_cpu_gb."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.engine == "slurm" and not self.partition:
            raise ValueError("slurm needs a `partition`")
        return self


class SelectSettings(Section):
    """A selection, whole."""

    pool: PoolSection
    """The documents to choose from."""

    targets: tuple[TargetSection, ...]
    """What the chosen ones should be like; several divide the budget by their shares, in this order."""

    score: ScoreSection = ScoreSection()
    """How alike is measured."""

    budget: BudgetSection
    """How much is chosen."""

    racing: RacingSection = RacingSection()
    """How work is saved."""

    duplicates: DuplicatesSection = DuplicatesSection()
    """What is said twice."""

    leaks: LeaksSection = LeaksSection()
    """Targets in the pool."""

    output: OutputSection
    """What is written, and where."""

    distributed: DistributedSection = DistributedSection()
    """Many machines."""

    workers: int | None = Field(None, ge=1)
    """Processes that score; null takes the machine's cores, fewer for little text. The result is the same with any
    number."""

    @field_validator("targets")
    @classmethod
    def _check_targets(cls, value: tuple[TargetSection, ...]) -> tuple[TargetSection, ...]:
        if not value:
            raise ValueError("is empty: name at least one, `- name: mine` with `source: [mine.jsonl]`")
        names = [target.name for target in value]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two are named {name!r}; give each its own name")
        return value
