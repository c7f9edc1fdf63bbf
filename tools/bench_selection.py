"""harness's scores beside the naive loop, zip-fit and DSIR, per CPU-second, interleaved.

    python tools/bench_selection.py --peer-python zipfit/bin/python --out benchmarks/selection_cpu.json
    python tools/bench_selection.py --end-to-end --dsir-python dsir/bin/python --out benchmarks/selection_files_cpu.json

    python -m venv zipfit && zipfit/bin/pip install zip-fit==1.0.9 zstandard brotli    # it imports both, undeclared
    python -m venv dsir && dsir/bin/pip install data-selection==1.0.3 "nltk<3.9"       # it fails with nltk 3.10

The documents are pieces of about 2.3 kB of what is installed here, and of $HARNESS_TEST_DATA's corpus where that is
set; the targets HumanEval's first half, from there too. Every contender has its turn in each round, in an order that
rotates; the unit is CPU-seconds, of the process and all its children, for wall times on a shared machine move by more
than any difference that matters. The first round is warm-up: its scores are compared with the naive formula's, and one
that differs ends the run. Without --end-to-end:

- pairs: exact scores of the same documents over all targets. zip-fit runs in a Python of its own, as it is meant to be
  called, in one call; its processes' CPU-seconds are all counted.
- predictors: the race's cheap estimates (Scorer.sketch and Scorer.features). How fast they are; what part of the exact
  scores' variance a linear regression on them explains, fitted to random documents; what part of all documents had to
  be kept so that none of the best hundredth is lost, the worst of several fits.

With it, `harness select` and DSIR choose a hundredth of the documents from files, each in processes of their own.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_selection_ends import measure_end_to_end
from bench_selection_pool import SHARE, Document, clock, in_turn, read_pool, read_targets, spread

from harness.selection import ScoreSection, Targets, current_implementation, open_scorer
from harness.selection.codecs import Compressor
from harness.selection.sizes import many_compressed_sizes

FITS, FITTED = 5, 1000
BATCH = 128

ZIP_FIT = """
import json, resource, sys
from zip_fit import ZIPFIT
def seconds():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)
texts, targets = json.load(open(sys.argv[1]))
answers, sys.stdout = sys.stdout, sys.stderr  # the package prints
for line in sys.stdin:
    algorithm, level = line.split()
    began = seconds()
    peer = ZIPFIT("", "", len(texts), compression_algorithm=algorithm, compress_level=int(level))
    ranked = peer.rank_sequences_by_alignment(texts, targets)
    spent = seconds() - began
    print(json.dumps([spent, {text: float(score) for text, score in ranked}]), file=answers, flush=True)
"""
"""Answers a line `gzip 9` with the CPU-seconds of all its processes, and each text's score. A new object each time: the
package keeps what it has compressed."""

GOALS = {"exact pairs a CPU-second": 80_000, "racing for a hundredth, MB a CPU-second": 20, "stretch": 40}


def in_batches(score: Callable[[list[bytes]], np.ndarray], texts: list[bytes]) -> np.ndarray:
    return np.concatenate([score(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)])


class ZipFit:
    """zip-fit in the Python that has it: scores of all texts, and the CPU-seconds that they took."""

    def __init__(self, python: str, folder: Path, texts: Sequence[str], targets: Sequence[str]) -> None:
        file = folder / "peer.json"
        file.write_text(json.dumps([texts, targets]))
        command = [python, "-c", ZIP_FIT, str(file)]
        self._texts = texts
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def __call__(self, algorithm: str, level: int) -> tuple[float, np.ndarray]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(algorithm, level, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"zip-fit ended with status {self._process.wait()}: is it installed there?")
        seconds, scores = json.loads(answer)
        return seconds, np.array([scores[text] for text in self._texts])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def naive_scores(compress: Callable[[bytes], bytes], texts: list[bytes], targets: list[bytes]) -> np.ndarray:
    """The formula as anyone would write it, with C(x) and C(y) computed once."""
    own = [len(compress(target)) for target in targets]
    scores = []
    for text in texts:
        alone = len(compress(text))
        distances = [
            (len(compress(text + target)) - min(alone, size)) / max(alone, size)
            for target, size in zip(targets, own, strict=True)
        ]
        scores.append(1 - sum(distances) / len(distances))
    return np.array(scores)


def measure_pairs(texts: list[str], targets: list[str], peer: ZipFit | None, rounds: int) -> dict[str, Any]:
    import lz4.frame

    documents, wanted = [text.encode() for text in texts], [target.encode() for target in targets]
    prepared = Targets(wanted)
    scorers = {
        name: open_scorer(ScoreSection(method="ncd", compressor=name, window_bytes=None), prepared)
        for name in ("gzip", "lz4")
    }

    def sizes_only(texts: list[bytes]) -> np.ndarray:
        alone, together = many_compressed_sizes(texts, prepared, 9, "zlib")
        own = prepared.sizes(9)
        return 1 - np.mean((together - np.minimum(alone[:, None], own)) / np.maximum(alone[:, None], own), axis=1)

    lz4_compress = functools.partial(lz4.frame.compress, compression_level=0)
    contenders: dict[str, tuple[str, Callable[[], tuple[float, np.ndarray]]]] = {
        "naive loop, gzip 9": ("gzip", lambda: clock(lambda: naive_scores(gzip.compress, documents, wanted))),
        "naive loop, lz4": ("lz4", lambda: clock(lambda: naive_scores(lz4_compress, documents, wanted))),
        "harness, gzip 9": ("gzip", lambda: clock(lambda: in_batches(scorers["gzip"].scores, documents))),
        "harness without its kernel, gzip 9": ("gzip", lambda: clock(lambda: in_batches(sizes_only, documents))),
        "harness, lz4": ("lz4", lambda: clock(lambda: in_batches(scorers["lz4"].scores, documents))),
    }
    if peer is not None:
        contenders["zip-fit 1.0.9, gzip 9"] = ("gzip", lambda: peer("gzip", 9))
        contenders["zip-fit 1.0.9, lz4"] = ("lz4", lambda: peer("lz4", 0))
    found: dict[str, list[float]] = defaultdict(list)
    expected: dict[str, np.ndarray] = {}
    pairs, size = len(texts) * len(targets), sum(map(len, documents))
    for number in range(-1, rounds):
        for name in contenders if number < 0 else in_turn(number, contenders):
            compressor, run = contenders[name]
            seconds, scores = run()
            if number < 0:
                worst = np.abs(scores - expected.setdefault(compressor, scores)).max()
                if worst > 1e-12:
                    raise SystemExit(f"{name}: scores differ from the naive formula's by {worst:.1e}")
            else:
                found[name].append(seconds)
        print(f"pairs: round {number + 1} of {rounds}", flush=True)
    return {
        "documents": len(texts),
        "bytes": size,
        "pairs": pairs,
        "contenders": {
            name: {
                "pairs_per_cpu_second": spread(pairs / each for each in seconds),
                "megabytes_per_cpu_second": spread(size / each / 1e6 for each in seconds),
                "over_the_naive_loop": spread(
                    naive / each
                    for naive, each in zip(found[f"naive loop, {name.split(', ')[1]}"], seconds, strict=True)
                ),
            }
            for name, seconds in found.items()
        },
    }


def measure_predictors(documents: list[Document], targets: list[str], rounds: int) -> dict[str, Any]:
    texts, prepared = [document.text.encode() for document in documents], Targets(targets)
    size, rows = sum(map(len, texts)), {}
    cases: list[tuple[str, Compressor]] = [("ncd", "gzip"), ("ncd", "lz4"), ("coverage", "gzip"), ("ncd", "zstd")]
    for method, compressor in cases:
        scorer = open_scorer(ScoreSection.model_validate({"method": method, "compressor": compressor}), prepared)
        scorer.features(texts[:1])  # what is made once
        exact = in_batches(scorer.scores, texts)
        for name in ("sketch", "features"):
            work = functools.partial(in_batches, getattr(scorer, name), texts)
            seconds = [clock(work)[0] for _ in range(rounds)]
            rows[f"{method}, {compressor}, {name}"] = {
                "microseconds_per_document": spread(each / len(texts) * 1e6 for each in seconds),
                "megabytes_per_cpu_second": spread(size / each / 1e6 for each in seconds),
                **tightness(work(), exact),
            }
        print(f"predictors: {method}, {compressor}", flush=True)
    return {"documents": len(texts), "best": len(texts) // SHARE, "fits": FITS, "fitted_documents": FITTED, "by": rows}


def tightness(predictors: np.ndarray, exact: np.ndarray) -> dict[str, Any]:
    """How well regressions on random documents predict the rest, and above all the best."""
    columns = np.column_stack([predictors.astype(np.float64), np.ones(len(exact))])
    best = np.argsort(-exact, kind="stable")[: len(exact) // SHARE]
    explained, shortfalls, kept = [], [], []
    for seed in range(FITS):
        sample = np.random.default_rng(seed).choice(len(exact), min(FITTED, len(exact)), replace=False)
        weights, *_ = np.linalg.lstsq(columns[sample], exact[sample], rcond=None)
        estimate = columns @ weights
        explained.append(1 - np.var(exact - estimate) / np.var(exact))
        shortfalls.append(np.max((exact - estimate)[best]) / np.std(exact))
        kept.append(np.mean(estimate >= estimate[best].min()))
    return {
        "explained_variance": spread(explained),
        "worst_shortfall_of_the_best_in_deviations": spread(shortfalls),
        "kept_to_lose_none_of_the_best": spread(kept),
    }


def machine() -> dict[str, Any]:
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "zlib": zlib.ZLIB_RUNTIME_VERSION,
        **{package: importlib.metadata.version(package) for package in ("lz4", "zstandard", "numpy")},
    }


def print_tables(result: dict[str, Any]) -> None:
    for part in ("pairs", "end_to_end"):
        for name, row in result.get(part, {}).get("contenders", {}).items():
            print(f"{name:36}", *(f"{unit} {value['median']:,.4g}" for unit, value in row.items()), sep="  ")
    for name, row in result.get("predictors", {}).get("by", {}).items():
        print(f"{name:24}", *(f"{unit} {value['median']:,.4g}" for unit, value in row.items()), sep="  ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--documents", type=int, default=20_000, help="of the predictors and end to end")
    parser.add_argument("--pair-documents", type=int, default=500, help="whose pairs every contender scores")
    parser.add_argument("--peer-python", help="a Python with zip-fit 1.0.9")
    parser.add_argument("--end-to-end", action="store_true", help="files to files, instead of scores alone")
    parser.add_argument("--dsir-python", help="a Python with data-selection 1.0.3, for --end-to-end")
    parser.add_argument("--workers", type=int, default=1, help="processes of each contender, end to end")
    options = parser.parse_args()
    documents = read_pool(options.documents)
    targets, named = read_targets()
    parts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if options.end_to_end:
            parts["end_to_end"] = measure_end_to_end(
                documents, targets, Path(folder), options.dsir_python, options.rounds, options.workers
            )
        else:
            texts = [document.text for document in documents[: options.pair_documents]]
            peer = ZipFit(options.peer_python, Path(folder), texts, targets) if options.peer_python else None
            parts["pairs"] = measure_pairs(texts, targets, peer, options.rounds)
            if peer is not None:
                peer.close()
            parts["predictors"] = measure_predictors(documents, targets, options.rounds)
    result = {
        "command": shlex.join(["python", "tools/bench_selection.py", *_told(sys.argv[1:])]),
        "when": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "sizes_by": current_implementation().name,
        "rounds": options.rounds,
        "goals": GOALS,
        "pool": dict(Counter(document.source for document in documents)),
        "targets": named,
        **parts,
    }
    print_tables(result)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def _told(arguments: list[str]) -> list[str]:
    """The arguments without what is this machine's alone."""
    local = ("--peer-python", "--dsir-python")
    return ["PYTHON" if n and arguments[n - 1] in local else each for n, each in enumerate(arguments)]


if __name__ == "__main__":
    main()
