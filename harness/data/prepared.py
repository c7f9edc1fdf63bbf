"""What tokenizing leaves behind: a folder with a tokenizer and, per corpus and split, a .bin/.idx pair."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from harness.config import HarnessError
from harness.text import SourceFile

from .config import TOKENIZER_FOLDER, CorpusSection, DataSection
from .indexed import IndexedTokens
from .record import find_difference, read_record
from .splits import SPLITS
from .tokenizer import Tokenizer, load_tokenizer, open_tokenizer
from .trained import find_tokenizer_difference

CHECKED_DOCUMENTS = 1000
CHECKED_TOKENS = 1 << 24


@dataclass(frozen=True)
class PreparedSplit:
    """One split of one corpus: documents [first_document, first_document + documents) of a .bin/.idx pair."""

    corpus: str
    split: str
    prefix: str
    """Path of the pair without its ending; there are no files where `documents` is 0."""
    documents: int
    tokens: int
    """Tokens, an end-of-text token a document included."""
    bytes: int | None
    """UTF-8 bytes of the text; None for an existing Megatron dataset, whose text nobody has counted."""
    first_document: int = 0

    @cached_property
    def indexed(self) -> IndexedTokens:
        """The pair, memory-mapped."""
        return IndexedTokens(self.prefix, f"corpus {self.corpus!r}")

    @property
    def boundaries(self) -> np.ndarray:
        """int64 [documents + 1]: where each document begins in the pair's flat array."""
        return self.indexed.offsets[self.first_document : self.first_document + self.documents + 1]

    @property
    def flat(self) -> np.ndarray:
        """The split's tokens one after the other, memory-mapped, in the file's dtype."""
        boundaries = self.boundaries
        return self.indexed.tokens[boundaries[0] : boundaries[-1]]


@dataclass(frozen=True)
class Prepared:
    """Tokenized corpora, ready to read."""

    folder: Path
    tokenizer: Tokenizer
    corpora: dict[str, dict[str, PreparedSplit]]
    """By corpus name, then by split: train, validation, test."""
    selections: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By corpus name: how a corpus was chosen (JSON), of those that `harness select` chose."""

    def split(self, corpus: str, split: str) -> PreparedSplit:
        """One split; HarnessError where there is no such corpus or split."""
        if corpus not in self.corpora:
            raise HarnessError(f"{self.folder}: has no corpus {corpus!r}; it has {', '.join(self.corpora)}")
        if split not in SPLITS:
            raise HarnessError(f"{split!r} is not a split; the splits are {', '.join(SPLITS)}")
        return self.corpora[corpus][split]

    def require(self, split: str, tokens: int) -> None:
        """HarnessError where some corpus has fewer than `tokens` tokens in `split`."""
        for name in self.corpora:
            found = self.split(name, split)
            if found.tokens >= tokens:
                continue
            total = sum(part.documents for part in self.corpora[name].values())
            if found.documents == 0:
                held = f"has none of its {total} documents in the {split} split"
            else:
                held = f"has {found.tokens} tokens in the {split} split"
            if split == "train":
                advice = "give more text, or set data.sequence_length lower"
            else:
                cut = "cut them into documents (separator, max_document_bytes)"
                raise_share = f"raise data.{split}_share"
                advice = f"{cut}, or {raise_share}" if total < 100 else f"{raise_share}, or {cut}"
                if split == "validation":
                    advice += ", or set validation.enabled=false to train without"
            raise HarnessError(f"corpus {name!r}: {held}, {tokens} tokens are needed: {advice}")

    def summary(self) -> list[str]:
        """Lines for people: documents, tokens and bytes of each corpus and split."""
        lines = [f"{self.folder}: {self.tokenizer.kind} tokenizer of {self.tokenizer.vocab_size:,} tokens"]
        for name, splits in self.corpora.items():
            for split, part in splits.items():
                text = f"  {name} {split}: {part.documents:,} documents, {part.tokens:,} tokens"
                if part.bytes is not None and part.tokens:
                    text += f", {part.bytes:,} bytes ({part.bytes / part.tokens:.2f} a token)"
                lines.append(text)
        return lines


def open_prepared(config: DataSection) -> Prepared:
    """What `prepare` left in `config.folder`, without looking at the sources, which need not be there.

    Raises HarnessError where something is missing, damaged, or made with other settings.
    """
    missing = find_missing(config, None)
    if missing:
        raise HarnessError(f"{config.folder}: {' and '.join(missing)} not there; run `harness tokenize` first")
    folder = config.folder_path
    tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
    corpora = {}
    for corpus in config.corpora:
        if corpus.indexed is not None:
            corpora[corpus.name] = _open_indexed(corpus, config, tokenizer)
        else:
            corpora[corpus.name] = _open_written(corpus, folder)
    records = {corpus.name: read_record(folder / corpus.name) for corpus in config.corpora if corpus.selection}
    selections = {name: record["selection"] for name, record in records.items() if record and record.get("selection")}
    return Prepared(folder, tokenizer, corpora, selections)


def find_missing(config: DataSection, files: dict[str, list[SourceFile]] | None) -> list[str]:
    """What is yet to be prepared, in words; HarnessError where what is there differs from the configuration.

    `files` are the sources by corpus; None leaves them out of the comparison.
    """
    folder = config.folder_path
    advice = f"set data.folder to another folder, or delete {folder}"
    if not (folder / TOKENIZER_FOLDER).exists():
        given = [corpus.name for corpus in config.corpora if corpus.is_text and (folder / corpus.name).exists()]
        if given:
            raise HarnessError(f"{folder}: holds corpus {given[0]!r} but no tokenizer; {advice}")
        return ["the tokenizer", *(f"corpus {corpus.name!r}" for corpus in config.corpora if corpus.is_text)]
    tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
    wanted = None if config.tokenizer.is_trained_here else open_tokenizer(config.tokenizer)
    difference = find_tokenizer_difference(folder / TOKENIZER_FOLDER, tokenizer, wanted, config, files)
    if difference is not None:
        raise HarnessError(f"{folder / TOKENIZER_FOLDER}: {difference}; {advice}")
    missing = []
    for corpus in config.corpora:
        if not corpus.is_text:
            continue
        record = read_record(folder / corpus.name)
        if record is None:
            missing.append(f"corpus {corpus.name!r}")
            continue
        now = None if files is None else files[corpus.name]
        difference = find_difference(record, config, corpus, tokenizer.fingerprint, now)
        if difference is not None:
            raise HarnessError(f"{folder / corpus.name}: {difference}; {advice}")
    return missing


def _open_written(corpus: CorpusSection, folder: Path) -> dict[str, PreparedSplit]:
    record: Any = read_record(folder / corpus.name)
    splits = {}
    for split in SPLITS:
        counts = record["splits"][split]
        prefix = str(folder / corpus.name / split)
        splits[split] = PreparedSplit(
            corpus.name, split, prefix, counts["documents"], counts["tokens"], counts["bytes"]
        )
        if counts["documents"]:
            indexed = splits[split].indexed  # refuses a pair that is cut off
            if len(indexed.tokens) != counts["tokens"] or indexed.documents != counts["documents"]:
                raise HarnessError(
                    f"{prefix}: holds {len(indexed.tokens)} tokens and prepared.json says {counts['tokens']}; "
                    f"delete {folder / corpus.name} and tokenize again"
                )
    return splits


def _open_indexed(corpus: CorpusSection, config: DataSection, tokenizer: Tokenizer) -> dict[str, PreparedSplit]:
    label = f"corpus {corpus.name!r}"
    assert corpus.indexed is not None
    prefix = str(Path(corpus.indexed).expanduser()).removesuffix(".bin").removesuffix(".idx")
    indexed = IndexedTokens(prefix, label)
    _check_vocabulary(indexed, tokenizer, label)
    if config.document_masking or config.mask_after_end_of_text:
        _check_document_ends(indexed, tokenizer, label)
    ends = [0, *(round(share * indexed.documents) for share in np.cumsum(corpus.split))]
    splits = {}
    for split, start, stop in zip(SPLITS, ends[:-1], ends[1:], strict=True):
        tokens = int(indexed.offsets[stop] - indexed.offsets[start])
        splits[split] = PreparedSplit(corpus.name, split, prefix, stop - start, tokens, None, start)
    return splits


def _check_vocabulary(indexed: IndexedTokens, tokenizer: Tokenizer, label: str) -> None:
    """Refuse ids that the tokenizer does not have, as far as both ends of the file show."""
    for part in (indexed.tokens[:CHECKED_TOKENS], indexed.tokens[-CHECKED_TOKENS:]):
        low, high = int(part.min()), int(part.max())
        if low < 0 or high >= tokenizer.vocab_size:
            raise HarnessError(
                f"{label}: {indexed.prefix}.bin holds token id {high if low >= 0 else low}, the tokenizer has ids 0 to "
                f"{tokenizer.vocab_size - 1}; set data.tokenizer to the one it was made with"
            )


def _check_document_ends(indexed: IndexedTokens, tokenizer: Tokenizer, label: str) -> None:
    """Masking at document ends needs documents that end visibly."""
    step = max(1, indexed.documents // CHECKED_DOCUMENTS)
    ends = indexed.offsets[1::step]
    ends = ends[ends > 0]
    if not (indexed.tokens[ends - 1] == tokenizer.eod).any():
        raise HarnessError(
            f"{label}: no document of {indexed.prefix}.bin ends with end-of-text (id {tokenizer.eod}), so masking at "
            "document ends would do nothing: set data.tokenizer to the one it was made with, or switch off "
            "document_masking and mask_after_end_of_text"
        )
