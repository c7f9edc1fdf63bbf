"""Text in, tokenizer and .bin/.idx out: the work behind `harness tokenize`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness.config import HarnessError
from harness.disk import locked
from harness.text import Problem, Progress, SourceFile, choose_workers, find_files, import_parquet

from .config import TOKENIZER_FOLDER, CorpusSection, DataSection
from .documents import Document, read_documents
from .encoding import batch_documents, encode_all
from .prepared import Prepared, find_missing, open_prepared
from .record import describe_source, text_settings, write_record
from .selected import provenance, with_selections
from .splits import split_of
from .tokenizer import Tokenizer, load_tokenizer, open_tokenizer
from .tokenizer_training import TrainingSample, train_sentencepiece
from .trained import TRAINING, training_settings
from .writer import CorpusWriter, remove_partial, writing

SHOWN_PROBLEMS = 10
KEPT_PROBLEMS = 100


def prepare(config: DataSection, *, progress: Progress | None = None) -> Prepared:
    """Train or load the tokenizer and tokenize every corpus that is not in `config.folder` yet.

    What is there is reused where settings, tokenizer and sources are the same, and refused otherwise. A corpus appears
    whole or not at all; an interrupted run is simply started again. Raises HarnessError for anything that a user can
    put right: missing or unreadable sources, a record that cannot be read (where on_error is stop), an empty corpus.
    """
    progress = progress or Progress()
    config = with_selections(config)
    files = {corpus.name: find_files(corpus) for corpus in config.corpora if corpus.is_text}
    if any(file.format == "parquet" for found in files.values() for file in found):
        import_parquet()
    if find_missing(config, files):
        folder = config.folder_path
        try:
            with locked(folder, "preparing data", "choose another data.folder"):
                remove_partial(folder)
                _fill(folder, config, files, progress)
        except OSError as error:
            where = error.filename or folder
            raise HarnessError(f"{where}: cannot be written: {error.strerror or error}") from error
    return open_prepared(config)


def prepare_for_training(config: DataSection, *, progress: Progress | None = None) -> Prepared:
    """`prepare`, or with `prepare: require` what is there already (see `open_prepared`)."""
    return open_prepared(config) if config.prepare == "require" else prepare(config, progress=progress)


def _fill(folder: Path, config: DataSection, files: dict[str, list[SourceFile]], progress: Progress) -> None:
    """Write the tokenizer and the corpora that are missing; the folder is locked."""
    find_missing(config, files)  # another process may have been here in the meantime
    if not (folder / TOKENIZER_FOLDER).exists():
        if config.tokenizer.is_trained_here:
            tokenizer = _train_tokenizer(config, files, progress)
        else:
            tokenizer = open_tokenizer(config.tokenizer)
        with writing(folder / TOKENIZER_FOLDER) as partial:
            tokenizer.save(partial)
            if config.tokenizer.is_trained_here:
                text = json.dumps(training_settings(config, files), indent=1, ensure_ascii=False)
                (partial / TRAINING).write_text(text + "\n", encoding="utf-8")
    tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
    for corpus in config.corpora:
        if corpus.is_text and not (folder / corpus.name).exists():
            _write_corpus(folder, config, corpus, files[corpus.name], tokenizer, progress)


def _train_tokenizer(config: DataSection, files: dict[str, list[SourceFile]], progress: Progress) -> Tokenizer:
    """A sentencepiece model of a sample of the training documents."""
    sample = TrainingSample(config.tokenizer.max_training_bytes)
    for corpus in config.corpora:
        reading = _Reading(corpus, config.on_error)
        with progress.work(f"reading {corpus.name} for the tokenizer", reading.total(files[corpus.name])) as advance:
            for document in reading.documents(files[corpus.name], advance):
                if split_of(document.digest, config.validation_share, config.test_share) == "train":
                    sample.add(document.text)
        reading.refuse_empty(files[corpus.name])
    texts = sample.texts()
    settings = config.tokenizer
    progress.say(
        f"training a {settings.model_type} sentencepiece model of {settings.vocab_size} pieces on "
        f"{sum(map(len, texts)):,} characters"
    )
    return train_sentencepiece(texts, settings)


def _write_corpus(
    folder: Path,
    config: DataSection,
    corpus: CorpusSection,
    files: list[SourceFile],
    tokenizer: Tokenizer,
    progress: Progress,
) -> None:
    """Tokenize one corpus into its folder."""
    reading = _Reading(corpus, config.on_error, progress)
    total = reading.total(files)
    altered = 0
    with writing(folder / corpus.name) as partial:
        writer = CorpusWriter(partial, tokenizer.vocab_size)
        try:
            with progress.work(f"tokenizing {corpus.name}", total) as advance:
                batches = batch_documents(reading.documents(files, advance))
                workers = choose_workers(config.workers, sum(file.estimated_text_bytes for file in files))
                for batch, encoded in encode_all(batches, tokenizer, folder / TOKENIZER_FOLDER, workers):
                    start = 0
                    for document, length, size in zip(batch, encoded.lengths, encoded.sizes, strict=True):
                        split = split_of(document.digest, config.validation_share, config.test_share)
                        writer.add(split, encoded.ids[start : start + length], document.size)
                        start += length
                        altered += int(size != document.size)
            reading.refuse_empty(files)
            writer.finish()
        finally:
            writer.close()
        record: dict[str, Any] = {
            "corpus": corpus.name,
            "tokenizer": tokenizer.fingerprint,
            "settings": text_settings(config, corpus),
            "on_error": config.on_error,
            "dtype": writer.dtype.__name__,
            "splits": writer.counts,
            "empty_documents": reading.empty,
            "altered_documents": altered,
            "skipped": {"count": reading.skipped, "first": reading.problems},
            "sources": [describe_source(file) for file in files],
            "selection": provenance(corpus),
        }
        write_record(partial, record)
    _say_result(corpus, writer, reading, altered, progress)


def _say_result(
    corpus: CorpusSection, writer: CorpusWriter, reading: _Reading, altered: int, progress: Progress
) -> None:
    documents = sum(counts["documents"] for counts in writer.counts.values())
    tokens = sum(counts["tokens"] for counts in writer.counts.values())
    parts = ", ".join(f"{split} {counts['tokens']:,}" for split, counts in writer.counts.items())
    line = f"{corpus.name}: {documents:,} documents, {tokens:,} tokens ({parts})"
    if reading.empty:
        line += f"; {reading.empty:,} empty documents left out"
    if reading.skipped:
        line += f"; {reading.skipped:,} unreadable records skipped"
    progress.say(line)
    if altered:
        progress.say(
            f"{corpus.name}: {altered:,} documents do not come back byte for byte from this tokenizer (it "
            "normalises, or has unknown characters); bits per byte will count the bytes of the tokens"
        )


class _Reading:
    """One pass over the files of a corpus, with what was left out counted."""

    def __init__(self, corpus: CorpusSection, on_error: str, progress: Progress | None = None) -> None:
        """`progress` is told of what is skipped; None where another pass over the same files tells it."""
        self._corpus = corpus
        self._on_error = on_error
        self._progress = progress
        self.read = 0
        self.empty = 0
        self.skipped = 0
        self.problems: list[str] = []

    @staticmethod
    def total(files: list[SourceFile]) -> int:
        """Bytes on disk."""
        return sum(file.size for file in files)

    def documents(self, files: list[SourceFile], advance: Callable[[int], None]) -> Iterator[Document]:
        """The documents that are not empty. Raises HarnessError at a bad record where on_error is stop."""
        for file in files:
            for document in read_documents(file, self._corpus, advance):
                if isinstance(document, Problem):
                    self._note(document)
                elif document.is_empty:
                    self.empty += 1
                else:
                    self.read += 1
                    yield document

    def _note(self, problem: Problem) -> None:
        if self._on_error == "stop":
            raise HarnessError(
                f"corpus {self._corpus.name!r}: {problem}; mend or exclude it, or set data.on_error=skip to leave such "
                "records out"
            )
        self.skipped += 1
        if len(self.problems) < KEPT_PROBLEMS:
            self.problems.append(str(problem))
        if self._progress is not None and self.skipped <= SHOWN_PROBLEMS:
            self._progress.say(f"skipped {problem}")
            if self.skipped == SHOWN_PROBLEMS:
                self._progress.say("skipped ... (further ones are counted)")

    def refuse_empty(self, files: list[SourceFile]) -> None:
        """HarnessError where the corpus had no document."""
        if self.read == 0:
            raise HarnessError(
                f"corpus {self._corpus.name!r}: no document in {len(files)} files ({self.empty} empty, {self.skipped} "
                f"unreadable), the first is {files[0].path}; check `source`"
            )
