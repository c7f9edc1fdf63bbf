"""The pool: windows of one length law from every source, without duplicates and without the benchmarks' own text."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from harness.config import HarnessError, plain
from harness.data import CorpusSection, DataSection, load_tokenizer, prepare
from harness.disk import write_whole
from harness.parallel import derive_seed

from ..files import locked, write_json
from .config import PoolSourceSection, SelectionStudySection
from .items import evaluation_texts, read_texts, target_texts

logger = logging.getLogger("harness.studies")

PERMUTATIONS = 128
SHINGLE_WORDS = 5
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Window:
    """One piece of text that is chosen or not."""

    source: str
    text: str

    @cached_property
    def size(self) -> int:
        """Bytes."""
        return len(self.text.encode())


@dataclass(frozen=True)
class Pool:
    """All windows, with the number of tokens of each (its end of text included)."""

    folder: Path
    windows: list[Window]
    tokens: np.ndarray
    """int64 [windows]."""
    record: dict[str, Any]
    """What was cut and what was dropped, by source."""

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder / "prepared" / "tokenizer"

    def draw(self, config: SelectionStudySection, number: int) -> np.ndarray:
        """The windows of one draw: so many of every source, at random, in a random order; int64 [windows]."""
        generator = np.random.default_rng(derive_seed(config.seed, "draw", number))
        names = np.array([window.source for window in self.windows])
        parts = [
            generator.choice(np.flatnonzero(names == source.name), source.windows_a_draw, replace=False)
            for source in config.pool.sources
        ]
        return generator.permutation(np.concatenate(parts))


def open_pool(config: SelectionStudySection) -> Pool:
    """The pool of the work folder, made there if it is not yet; with its tokenizer.

    HarnessError where a source gives too few windows, or the pool there was made with other settings.
    """
    folder = config.path
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "pool.lock"):
        if not (folder / "pool.json").exists():
            _write_pool(config, folder)
    record: dict[str, Any] = json.loads((folder / "pool.json").read_text())
    if record["settings"] != _settings(config):
        raise HarnessError(f"{folder}: its pool was made with other settings; choose another folder, or delete it")
    lines = (folder / "pool.jsonl").read_text(encoding="utf-8").splitlines()
    windows = [Window(line["source"], line["text"]) for line in map(json.loads, lines)]
    return Pool(folder, windows, np.load(folder / "tokens.npy"), record)


def cut(
    documents: Iterable[Iterable[str]], window_bytes: tuple[int, int], generator: random.Random, most: int
) -> Iterator[str]:
    """Windows of documents, each a list of units (lines) that no cut goes through, at most so many a document.

    A window's aim is drawn evenly from the range, and it ends at the unit's end nearest to it. What is left at a
    document's end is dropped, and a unit that is longer than the least window is cut between words.
    """
    least, largest = window_bytes
    for units in documents:
        windows: list[str] = []
        held: list[str] = []
        size, aim = 0, generator.uniform(least, largest)
        for unit in _short_units(units, least // 4):
            length = len(unit.encode())
            if held and size + length - aim > aim - size:  # the end before this unit is nearer
                windows.append("".join(held))
                held, size, aim = [], 0, generator.uniform(least, largest)
            held.append(unit)
            size += length
        if size >= aim:
            windows.append("".join(held))
        for index in sorted(generator.sample(range(len(windows)), min(most, len(windows)))):
            yield windows[index]


def _short_units(units: Iterable[str], longest: int) -> Iterator[str]:
    for unit in units:
        while len(unit) > longest:
            end = unit.rfind(" ", 1, longest) + 1 or longest
            yield unit[:end]
            unit = unit[end:]
        yield unit


def read_windows(config: SelectionStudySection, source: PoolSourceSection) -> list[str]:
    """The windows of a source, in a seeded order of its documents, as many as are wanted."""
    generator = random.Random(derive_seed(config.seed, "windows", source.name))
    located = config.located(source)
    if source.joined:
        texts = list(read_texts(located))
        generator.shuffle(texts)
        joined = "\n\n".join(text.strip("\n") for text in texts)
        documents, most = iter([joined.splitlines(keepends=True)]), source.windows
    else:
        texts = _Reservoir(located, generator, source.windows).texts
        documents, most = (text.splitlines(keepends=True) for text in texts), source.windows_a_document
    return list(islice(cut(documents, config.pool.window_bytes, generator, most), source.windows))


class _Reservoir:
    """Texts of a source in a random order: as many as there are windows to cut, from all of its files alike."""

    def __init__(self, source: Any, generator: random.Random, most: int) -> None:
        self.texts: list[str] = []
        for count, text in enumerate(read_texts(source, generator)):
            if len(self.texts) < most:
                self.texts.append(text)
            elif (place := generator.randrange(count + 1)) < most:
                self.texts[place] = text
        generator.shuffle(self.texts)


def words_of(text: str) -> list[str]:
    """Lower-cased words, what overlaps are counted in."""
    return WORD.findall(text.lower())


def overlapping(windows: Sequence[str], benchmarks: Iterable[str], words: int) -> set[int]:
    """The windows that share so many consecutive words with some benchmark text."""
    known: set[int] = set()
    for text in benchmarks:
        known.update(_grams(words_of(text), words))
    return {
        number for number, text in enumerate(windows) if any(gram in known for gram in _grams(words_of(text), words))
    }


def _grams(words: list[str], length: int) -> Iterator[int]:
    return (hash(tuple(words[start : start + length])) for start in range(len(words) - length + 1))


def near_duplicates(texts: Sequence[str], threshold: float) -> set[int]:
    """The windows that come after one that they nearly repeat: exact copies, and MinHash pairs over the threshold."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    seen: set[bytes] = set()
    repeated: set[int] = set()
    hashes: dict[str, Any] = {}
    for number, text in enumerate(texts):
        digest = hashlib.sha256(text.encode()).digest()
        words = words_of(text)
        shingles = {" ".join(words[i : i + SHINGLE_WORDS]).encode() for i in range(len(words) - SHINGLE_WORDS + 1)}
        sketch = MinHash(num_perm=PERMUTATIONS, seed=1)
        sketch.update_batch(shingles)
        # The index answers with candidates; the sketches themselves say how alike two are.
        alike = (hashes[key].jaccard(sketch) >= threshold for key in index.query(sketch))
        if digest in seen or (shingles and any(alike)):
            repeated.add(number)
            continue
        seen.add(digest)
        hashes[str(number)] = sketch
        index.insert(str(number), sketch)
    return repeated


def _write_pool(config: SelectionStudySection, folder: Path) -> None:
    benchmarks = [
        text for target in config.targets for text in [*target_texts(config, target), *evaluation_texts(config, target)]
    ]
    windows: list[Window] = []
    record: dict[str, Any] = {"settings": _settings(config), "sources": {}}
    for source in config.pool.sources:
        texts = read_windows(config, source)
        repeated = near_duplicates(texts, config.pool.near_duplicate)
        shared = overlapping(texts, benchmarks, config.pool.overlap_words) - repeated
        kept = [text for number, text in enumerate(texts) if number not in repeated | shared]
        record["sources"][source.name] = {
            "cut": len(texts),
            "near_duplicates": len(repeated),
            "overlapping": len(shared),
            "kept": len(kept),
            "bytes": sum(len(text.encode()) for text in kept),
        }
        logger.info("pool: %s: %s", source.name, record["sources"][source.name])
        if len(kept) < source.windows_a_draw:
            raise HarnessError(
                f"pool.sources: {source.name!r} leaves {len(kept)} windows, and a draw takes {source.windows_a_draw}; "
                f"raise windows or windows_a_document, or lower windows_a_draw"
            )
        windows += [Window(source.name, text) for text in kept]
    repeated = near_duplicates([window.text for window in windows], config.pool.near_duplicate)
    record["near_duplicates_between_sources"] = dict(Counter(windows[number].source for number in repeated))
    windows = [window for number, window in enumerate(windows) if number not in repeated]
    lines = (json.dumps({"source": window.source, "text": window.text}) + "\n" for window in windows)
    write_whole(folder / "pool.jsonl", "".join(lines).encode())
    _train_tokenizer(config, folder)
    tokenizer = load_tokenizer(folder / "prepared" / "tokenizer")
    tokens = [len(ids) + 1 for ids in tokenizer.encode_batch([window.text for window in windows])]
    np.save(folder / "tokens.npy", np.array(tokens, dtype=np.int64))
    write_json(folder / "pool.json", record)


def _train_tokenizer(config: SelectionStudySection, folder: Path) -> None:
    corpus = CorpusSection(name="pool", source=(str(folder / "pool.jsonl"),))
    data = DataSection(
        folder=str(folder / "prepared"),
        corpora=(corpus,),
        tokenizer=config.tokenizer,
        validation_share=0.0,
        test_share=0.0,
        workers=1,
    )
    prepare(data)


def _settings(config: SelectionStudySection) -> dict[str, Any]:
    """What the pool depends on."""
    targets = [{"name": t.name, "target": plain(t.target), "evaluation": plain(t.evaluation)} for t in config.targets]
    settings = {
        "seed": config.seed,
        "pool": plain(config.pool),
        "targets": targets,
        "tokenizer": plain(config.tokenizer),
    }
    return dict(json.loads(json.dumps(settings)))
