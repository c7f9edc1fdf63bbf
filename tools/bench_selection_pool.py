"""Documents, targets and clocks for bench_selection.py."""

from __future__ import annotations

import ast
import gzip
import io
import json
import os
import random
import resource
import site
import statistics
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

MEAN_BYTES = 2300
PIECES_A_FILE = 12
TARGETS = 82

SHARE = 100
"""One document in so many is chosen."""


class Document(NamedTuple):
    text: str
    source: str


def read_pool(count: int) -> list[Document]:
    """Pieces of about 2.3 kB in a fixed random order: of the standard library's and installed packages' sources, and
    half of them of $HARNESS_TEST_DATA/corpus where that is set. The same on every run of one installation."""
    corpus = Path(os.environ.get("HARNESS_TEST_DATA", "")) / "corpus"
    prose = sorted(corpus.glob("train-*.jsonl.zst")) if "HARNESS_TEST_DATA" in os.environ else []
    stdlib = Path(sysconfig.get_path("stdlib"))
    own = sorted(path for path in stdlib.rglob("*.py") if "site-packages" not in path.parts)
    installed = sorted(path for folder in site.getsitepackages() for path in Path(folder).rglob("*.py"))
    code = count // 4 if prose else count // 2
    r = random.Random(1)
    documents = [*_take(_sources(own, "stdlib", r), code, r), *_take(_sources(installed, "packages", r), code, r)]
    documents += _take((Document(text, "corpus") for path in prose for text in jsonl_texts(path)), count - 2 * code, r)
    r.shuffle(documents)
    if len(documents) < count:
        raise SystemExit(f"{len(documents):,} documents found, not {count:,}: install more or set $HARNESS_TEST_DATA")
    return documents


def read_targets() -> tuple[list[str], str]:
    """HumanEval's first half where $HARNESS_TEST_DATA has it, else functions of the standard library; which."""
    file = Path(os.environ.get("HARNESS_TEST_DATA", "")) / "humaneval" / "HumanEval.jsonl.gz"
    if "HARNESS_TEST_DATA" in os.environ and file.exists():
        with gzip.open(file, "rt") as lines:
            items = [json.loads(line) for line in lines][:TARGETS]
        return [item["prompt"] + item["canonical_solution"] for item in items], "HumanEval, items 0 to 81"
    functions = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text()
        for node in ast.parse(text).body:
            source = ast.get_source_segment(text, node) if isinstance(node, ast.FunctionDef) else None
            if source and 250 <= len(source) <= 1_200:
                functions.append(source)
    return random.Random(2).sample(functions, TARGETS), "82 functions of the standard library"


def _sources(paths: list[Path], source: str, r: random.Random) -> Iterator[Document]:
    for path in r.sample(paths, len(paths)):
        try:
            yield Document(path.read_text(), source)
        except UnicodeDecodeError:
            continue


def jsonl_texts(path: Path) -> Iterator[str]:
    import zstandard

    with path.open("rb") as file:
        for line in io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="utf-8"):
            yield json.loads(line)["text"]


def _take(documents: Iterable[Document], count: int, r: random.Random) -> list[Document]:
    """Pieces of documents, a dozen of each at most, until there are so many. None twice, and none blank."""
    taken: dict[str, Document] = {}
    for document in documents:
        if len(taken) >= count:
            break
        pieces = [piece for piece in _cut(document.text, r) if piece.strip()]
        for piece in r.sample(pieces, min(len(pieces), PIECES_A_FILE)):
            taken.setdefault(piece, Document(piece, document.source))
    return list(taken.values())[:count]


def _cut(text: str, r: random.Random) -> Iterator[str]:
    """Pieces that end with a line, where one ends in time."""
    start = 0
    while start < len(text):
        wanted = start + int(r.uniform(0.6, 1.4) * MEAN_BYTES)
        end = text.find("\n", wanted) + 1 or len(text)
        if end - start > 2.5 * MEAN_BYTES:
            end = wanted
        yield text[start:end]
        start = end


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def clock(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU-seconds of this process and its children, and what came out."""
    began = cpu_seconds()
    result = work()
    return cpu_seconds() - began, result


def in_turn(number: int, contenders: Iterable[Any]) -> list[Any]:
    items = list(contenders)
    return items[number % len(items) :] + items[: number % len(items)]


def spread(values: Iterable[float]) -> dict[str, Any]:
    ordered = [float(f"{value:.4g}") for value in sorted(values)]
    return {"median": statistics.median(ordered), "range": [ordered[0], ordered[-1]]}
