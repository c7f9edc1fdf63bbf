"""Random pools of documents, and what a selection of them should choose: by definition, one document at a time."""

from __future__ import annotations

import functools
import gzip
import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import zstandard

from harness.config import validate
from harness.selection import SelectSettings
from harness.text import Progress
from tests.selection.texts import CODE

WINDOW_BYTES = 1024
LEVEL = 9
LETTERS = ["abcdefghijklmnopqrstuvwxyz", "äöüéñåø", "абвгдежзик", "日本語中文字漢"]
SIGNS = "😀🎉🚀🌍!?-"
QUIET = Progress(quiet=True)


@dataclass(frozen=True)
class Document:
    id: str
    text: str
    source: str


def code(r: random.Random, length: int) -> str:
    start = r.randrange(len(CODE) - length)
    return CODE[start : start + length].decode(errors="ignore")


def words(r: random.Random, count: int) -> str:
    """Made-up words of one alphabet, which nothing else has by accident."""
    letters = r.choice(LETTERS)
    return " ".join("".join(r.choices(letters, k=r.randint(3, 9))) for _ in range(count))


def draw_targets(r: random.Random, count: int = 12) -> list[str]:
    """Enough of them for a race: a document's features take one in so many."""
    return [code(r, r.randint(150, 700)) for _ in range(count)]


def draw_text(r: random.Random, targets: Sequence[str], earlier: Sequence[Document]) -> str:
    """Alike the targets and not, empty, long, repeated, almost repeated, with a target inside."""
    kind = r.random()
    if kind < 0.4:
        return code(r, r.randint(1, 1500))
    if kind < 0.48:
        return code(r, r.randint(WINDOW_BYTES, 6 * WINDOW_BYTES)) + words(r, 9)
    if kind < 0.52:
        return r.choice(["", " ", "\n\n", "\t \r\n"])
    if kind < 0.57:
        return words(r, 5) + r.choice(targets) + words(r, 5)
    if kind < 0.63 and earlier:
        return r.choice(earlier).text
    if kind < 0.66:
        return "".join(r.choices(SIGNS, k=r.randint(1, 300)))
    if kind < 0.72 and earlier:
        return r.choice(earlier).text.replace(" ", "  ")
    return words(r, r.randint(1, 400))


def draw_pool(r: random.Random, targets: Sequence[str], count: int) -> list[Document]:
    documents: list[Document] = []
    for number in range(count):
        text = draw_text(r, targets, documents)
        documents.append(Document(f"{number}-{r.randrange(10**6)}", text, r.choice(["web", "книги", "code"])))
    return documents


# By definition.


def windows(text: bytes, most: int = WINDOW_BYTES) -> list[bytes]:
    """Pieces as equal as can be, cut where a character begins."""
    pieces = -(-len(text) // most) if len(text) > most else 1
    cuts = [index * len(text) // pieces for index in range(pieces)] + [len(text)]
    for index in range(1, pieces):
        while text[cuts[index]] & 0xC0 == 0x80:
            cuts[index] -= 1
    return [text[start:end] for start, end in pairwise(cuts)]


@functools.cache
def size(text: bytes) -> int:
    return len(gzip.compress(text, LEVEL))


def ncd_score(text: str, targets: Sequence[str]) -> float:
    """Mean over windows of 1 − mean over targets of NCD."""
    each = []
    for window in windows(text.encode()):
        distances = []
        x = size(window)
        for target in targets:
            y, both = size(target.encode()), size(window + target.encode())
            distances.append((both - min(x, y)) / max(x, y))
        each.append(1 - math.fsum(distances) / len(distances))
    return math.fsum(each) / len(each)


def order(document: Document, score: float) -> tuple[float, bytes, bytes]:
    """Best first; then by hash of the text, then of the id."""
    return -score, hash_of(document.text, 16), hash_of(document.id, 8)


def hash_of(text: str, size: int) -> bytes:
    return blake2b(text.encode(), digest_size=size).digest()


def unique(documents: Iterable[Document]) -> list[Document]:
    """With text, and of equal texts the one with the smallest hash of its id."""
    best: dict[str, Document] = {}
    for document in documents:
        if document.text.strip(" \t\r\n"):
            held = best.get(document.text)
            if held is None or hash_of(document.id, 8) < hash_of(held.id, 8):
                best[document.text] = document
    return list(best.values())


def holds(text: str, targets: Iterable[str], run: int = 13, share: float = 0.3) -> bool:
    def runs(words: list[str], length: int) -> set[tuple[str, ...]]:
        return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}

    mine = split_words(text)
    for target in targets:
        theirs = split_words(target)
        if theirs:
            wanted = runs(theirs, min(run, len(theirs)))
            if len(wanted & runs(mine, min(run, len(theirs)))) >= share * len(wanted):
                return True
    return False


def split_words(text: str) -> list[str]:
    """Runs of letters, digits and underscores, in lower case."""
    return "".join(c if c.isalnum() or c == "_" else " " for c in text.lower()).split()


class Truth:
    """Scores of a pool, and what a budget takes of it."""

    def __init__(self, documents: Sequence[Document], *targets: Sequence[str]) -> None:
        self.documents = list(documents)
        self.scores = [
            {document.id: ncd_score(document.text, each) for document in documents if document.text.strip(" \t\r\n")}
            for each in targets
        ]
        self.eligible = unique(documents)
        self.leaks = [{document.id for document in self.eligible if holds(document.text, each)} for each in targets]

    def ranking(self, target: int = 0, forbidden: Sequence[int] = (0,)) -> list[Document]:
        """Documents that may be chosen, best first; without those that hold a target of the sets `forbidden`."""
        leaks = set().union(*(self.leaks[number] for number in forbidden))
        found = [document for document in self.eligible if document.id not in leaks]
        return sorted(found, key=lambda document: order(document, self.scores[target][document.id]))

    def take(self, budget: float, weigh: Callable[[Document], int] = lambda document: 1) -> set[str]:
        """Ids of the longest prefix of the ranking that weighs no more."""
        return take(self.ranking(), budget, weigh)


def take(ranking: Iterable[Document], budget: float, weigh: Callable[[Document], int]) -> set[str]:
    chosen = set()
    for document in ranking:
        budget -= weigh(document)
        if budget < 0:
            break
        chosen.add(document.id)
    return chosen


# Files.


def line_of(r: random.Random, document: Document) -> bytes:
    """A line of JSON as no two programs write it: order and look of keys, numbers, escapes, spaces, line end."""
    fields = [
        f'"id":{r.choice(["", " "])}{json.dumps(document.id)}',
        f'"text": {json.dumps(document.text, ensure_ascii=r.random() < 0.5)}',
        f'"source": {json.dumps(document.source, ensure_ascii=r.random() < 0.5)}',
        f'"n": {r.choice(["1.50e+3", "0.10", "-0", "123456789012345678901234567890", "1E5", "null"])}',
        f'"nested" : {{"b": [1,  2], "a": "\\u00e9\\/", "score": {r.random()}}}',
    ]
    r.shuffle(fields)
    line = r.choice(["{", "{ "]) + r.choice([",", ", "]).join(fields) + r.choice(["}", " }", "} "])
    return line.encode() + r.choice([b"\n", b"\n", b"\r\n", b"\n\n"])


def write_lines(path: Path, lines: Iterable[bytes]) -> Path:
    """A .jsonl, .jsonl.gz or .jsonl.zst."""
    data = b"".join(lines)
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = zstandard.compress(data[: len(data) // 2]) + zstandard.compress(data[len(data) // 2 :])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_texts(path: Path, texts: Iterable[str]) -> Path:
    """As a line each, under the key `text`."""
    return write_lines(path, [json.dumps({"text": text}).encode() + b"\n" for text in texts])


def read_bytes(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".gz":
        return gzip.decompress(data)
    return zstandard.ZstdDecompressor().decompressobj().decompress(data) if path.suffix == ".zst" else data


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Every row of the .jsonl files of any compression below a folder, in the order of their paths."""
    files = sorted(file for file in folder.rglob("*.jsonl*") if file.is_file())
    return [json.loads(line) for file in files for line in read_bytes(file).splitlines()]


def chosen_ids(folder: Path) -> list[str]:
    return [row["id"] for row in read_rows(folder / "chosen")]


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def result_of(folder: Path) -> dict[str, bytes]:
    """What must not differ: every file of chosen/ and selection.json."""
    return {**files_below(folder / "chosen"), "selection.json": (folder / "selection.json").read_bytes()}


def settings_of(pool: Any, targets: Any, folder: Path | str, **sections: Any) -> SelectSettings:
    """A selection in this process of 20 documents without near-duplicates removed; keywords replace sections.

    `pool` and `targets`: files, or a section and a list of sections.
    """
    values: dict[str, Any] = {
        "pool": pool if isinstance(pool, dict) else {"source": [str(file) for file in pool], "id_field": "id"},
        "targets": targets if isinstance(targets, list) else [{"name": "code", "source": [str(targets)]}],
        "score": {"method": "ncd", "window_bytes": WINDOW_BYTES},
        "budget": {"documents": 20},
        "duplicates": {"remove": "exact"},
        "output": {"folder": str(folder)},
        "workers": 1,
    }
    for name, fields in sections.items():
        if isinstance(fields, dict) and name != "budget":
            fields = values.get(name, {}) | fields
        values[name] = fields
    return validate(SelectSettings, values, "test")
