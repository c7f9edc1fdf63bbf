"""Texts of benchmarks, and reading texts at all."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator

from harness.config import HarnessError
from harness.text import Problem, TextSource, Unusable, find_files, read_records, text_of

from .config import ItemsSection, SelectionStudySection, TargetSection

logger = logging.getLogger("harness.studies")


def read_texts(source: TextSource, shuffle: random.Random | None = None) -> Iterator[str]:
    """The texts of a source, file after file; unreadable ones are logged and left out."""
    files = find_files(source)
    if shuffle is not None:
        shuffle.shuffle(files)
    for file in files:
        for record in read_records(file, source, lambda count: None):
            text: str | Unusable | Problem = record if isinstance(record, Problem) else text_of(record.content, source)
            if isinstance(text, str):
                yield text
            else:
                logger.warning("%s: left out: %s", file.path, text)


def read_items(config: SelectionStudySection, section: ItemsSection) -> list[str]:
    """The items that a section describes. HarnessError where there are none."""
    texts = [text for text in read_texts(config.located(section)) if len(text.encode()) >= section.least_bytes]
    if section.shuffle_seed is not None:
        random.Random(section.shuffle_seed).shuffle(texts)
    half = len(texts) // 2
    if section.part != "all":
        texts = texts[:half] if section.part == "first half" else texts[half:]
    texts = texts[: section.most]
    if not texts:
        raise HarnessError(f"{section.name}: has no items left; look at part, least_bytes and most")
    return texts


def target_texts(config: SelectionStudySection, target: TargetSection) -> list[str]:
    """What the scores see."""
    return read_items(config, target.target)


def evaluation_texts(config: SelectionStudySection, target: TargetSection) -> list[str]:
    """What is predicted."""
    return read_items(config, target.evaluation)
