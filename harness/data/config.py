"""The `data` section: which text, which tokenizer, how it is split and packed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from harness.config import Section
from harness.text import TextSource

TOKENIZER_FOLDER = "tokenizer"
"""The name beside the corpora in a prepared folder; so no corpus may have it."""


class TokenizerSection(Section):
    """How text becomes token ids."""

    kind: Literal["sentencepiece", "huggingface", "bytes"] = "sentencepiece"
    """sentencepiece (trained here or loaded), huggingface (a tokenizer.json), or bytes (ids 0-255, end of text 256)."""

    path: str | None = None
    """The .model (sentencepiece) or tokenizer.json (huggingface) to load; null with sentencepiece trains one on the
    corpora's training split and keeps it in the prepared folder."""

    vocab_size: int = Field(4096, ge=300)
    """Number of pieces of a sentencepiece model that is trained here, its 256 byte pieces included."""

    model_type: Literal["bpe", "unigram"] = "bpe"
    """Algorithm of a sentencepiece model that is trained here: bpe trains in seconds, unigram takes minutes."""

    max_training_bytes: int = Field(10_000_000, ge=1)
    """Bytes of text that a sentencepiece model is trained on: a sample by content hash of the training split."""

    end_of_text: str | None = None
    """The token that ends a document, for a loaded tokenizer; null looks for <|endoftext|>, </s>, <|end_of_text|>,
    <eos> (a sentencepiece model's own end-of-sentence id goes first)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "huggingface" and self.path is None:
            raise ValueError("kind huggingface needs `path`, a tokenizer.json")
        if self.kind == "bytes" and self.path is not None:
            raise ValueError("kind bytes loads nothing: remove `path`, or choose kind sentencepiece or huggingface")
        return self

    @property
    def is_trained_here(self) -> bool:
        """Whether the tokenizer comes out of the corpora rather than out of a file."""
        return self.kind == "sentencepiece" and self.path is None


class CorpusSection(TextSource):
    """One body of text: files to tokenize, or an existing Megatron dataset."""

    name: str
    """Name in the prepared folder, in metrics and in messages: letters, digits, `.`, `_`, `-`."""

    max_document_bytes: int | None = Field(None, ge=16)
    """Longer documents are cut after a line end into documents of at most this many bytes; null cuts none. The parts
    may fall on different sides of the split."""

    weight: float | None = Field(None, gt=0)
    """Share of the samples that come from this corpus, relative to the other weights; null (then for every corpus)
    blends by token count."""

    selection: str | None = None
    """Instead of `source`: a folder that `harness select` made. Its chosen documents are read, with its text_field, and
    what it says of itself goes into the run folder and the checkpoints."""

    indexed: str | None = None
    """Instead of `source`: path prefix of an existing Megatron .bin/.idx pair, made with this tokenizer."""

    split: tuple[float, ...] = (0.98, 0.01, 0.01)
    """For `indexed`: shares of train, validation and test, as consecutive ranges of its documents."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
            raise ValueError(f"{value!r} cannot name a folder: use letters, digits, `.`, `_` and `-`")
        if value == TOKENIZER_FOLDER:
            raise ValueError(f"{value!r} is the tokenizer's place in the prepared folder; choose another name")
        return value

    @field_validator("split")
    @classmethod
    def _check_split(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(value) != 3 or min(value) < 0 or abs(sum(value) - 1) > 1e-6:
            raise ValueError(f"{list(value)} should be three shares (train, validation, test) that sum to 1")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name in ("source", "selection", "indexed") if getattr(self, name)]
        if not given:
            raise ValueError(
                "has no text: set `source` (files, folders, globs), `selection` (a folder of harness select) or "
                "`indexed` (a Megatron prefix)"
            )
        if len(given) > 1:
            raise ValueError(f"{' and '.join(f'`{name}`' for name in given)} exclude each other: keep one")
        return self

    @property
    def is_text(self) -> bool:
        """Whether there is text to tokenize, rather than tokens."""
        return self.indexed is None


class DataSection(Section):
    """Corpora, tokenizer, split, and how documents are packed into sequences."""

    folder: str = "data/prepared"
    """Where tokenized corpora and the tokenizer are kept; one folder holds one choice of tokenizer and split."""

    corpora: tuple[CorpusSection, ...]
    """The text to train on; several are blended."""

    tokenizer: TokenizerSection = TokenizerSection()
    """How text becomes token ids."""

    sequence_length: int = Field(1024, ge=2)
    """Tokens of input per sample (each has a target)."""

    validation_share: float = Field(0.01, ge=0, lt=1)
    """Share of documents held out for validation, chosen by a hash of their content, so that equal documents stand on
    one side and neither order nor workers matter."""

    test_share: float = Field(0.01, ge=0, lt=1)
    """Share of documents held out for the test split, chosen likewise."""

    on_error: Literal["stop", "skip"] = "stop"
    """What to do at a record that cannot be read (broken JSON, undecodable file, truncated archive): stop, or skip and
    count it."""

    workers: int | None = Field(None, ge=1)
    """Processes that tokenize; null takes the machine's cores, fewer for little text. The output is the same with any
    number."""

    document_masking: bool = False
    """Whether attention and positions restart at each document in a sequence; otherwise a sequence is one context."""

    mask_after_end_of_text: bool = False
    """Whether to leave out the loss where the input is an end-of-text token: its target is the first token of an
    unrelated document."""

    prepare: Literal["auto", "require"] = "auto"
    """Whether training tokenizes what is missing (auto) or takes the prepared folder as it is, without looking at the
    sources (require)."""

    @property
    def folder_path(self) -> Path:
        """`folder` with `~` expanded."""
        return Path(self.folder).expanduser()

    @field_validator("corpora")
    @classmethod
    def _check_corpora(cls, value: tuple[CorpusSection, ...]) -> tuple[CorpusSection, ...]:
        if not value:
            raise ValueError("is empty: name at least one corpus, `- name: mine` with `source: [mine/*.txt]`")
        names = [corpus.name for corpus in value]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two corpora are named {name!r}; give each its own name")
        if len({corpus.weight is None for corpus in value}) > 1:
            without = ", ".join(corpus.name for corpus in value if corpus.weight is None)
            raise ValueError(f"some corpora have a weight and {without} has none: give every corpus one, or none")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.validation_share + self.test_share >= 1:
            raise ValueError(
                f"validation_share {self.validation_share} and test_share {self.test_share} leave nothing to train on: "
                "together they should stay below 1"
            )
        indexed = [corpus.name for corpus in self.corpora if corpus.indexed is not None]
        if indexed and self.tokenizer.is_trained_here:
            raise ValueError(
                f"corpus {indexed[0]!r} is already tokenized, so its tokenizer cannot be trained here: "
                "set tokenizer.path to the one it was made with"
            )
        return self
