"""The top hundredth of 500,000 documents: the race beside all pairs, and its memory beside that of a small pool.

    python tools/bench_selection_large.py --roots /usr/share /usr/lib/python3 --out benchmarks/selection_large_cpu.json

The pool is cut from the text files below `--roots` and from $HARNESS_TEST_DATA/corpus where that is set: pieces of
about 2 kB (log-normal, exact copies left out), as 16 files of jsonl.zst. Each selection is a process of its own, one
after the other, with one worker: CPU-seconds and peak memory are the process's, from its start to its end. The
targets are HumanEval's first half where $HARNESS_TEST_DATA has it, else functions of the standard library.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_selection_pool import SHARE, jsonl_texts, read_targets

FILES = 16
SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".c", ".js", ".html"}
RUN = """
import json, resource, sys
from pathlib import Path
from harness.config import load_config
from harness.selection import SelectSettings, select
report = select(load_config(SelectSettings, Path(sys.argv[1]), sys.argv[2:]))
usage = resource.getrusage(resource.RUSAGE_SELF)
# Of this program alone: ru_maxrss begins with what the process had that started it.
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_mb": peak / 1024,
    "bytes": report["pool"]["bytes"], "chosen": report["chosen"]["documents"], "pairs": report["pairs"],
    "recall": report["recall"]}))
"""


def texts(roots: list[Path]) -> Iterator[tuple[str, str]]:
    """Whole texts and where they are from."""
    for root in roots:
        for path in sorted(path for path in root.rglob("*") if path.suffix in SUFFIXES and path.is_file()):
            try:
                if path.stat().st_size <= 400_000:
                    yield path.read_text(encoding="utf-8"), path.suffix
            except (OSError, UnicodeDecodeError):
                continue
    if "HARNESS_TEST_DATA" in os.environ:
        for shard in sorted(Path(os.environ["HARNESS_TEST_DATA"]).glob("corpus/train-*.jsonl.zst")):
            yield from ((text, "corpus") for text in jsonl_texts(shard))


def build(folder: Path, roots: list[Path], count: int) -> None:
    """The pool, in a fixed random order."""
    import zstandard

    r, seen, found = random.Random(8), set(), []
    for text, source in texts(roots):
        start = 0
        while start < len(text):
            piece = text[start : start + int(r.lognormvariate(7.5, 0.5))]
            start += len(piece) or 1
            digest = hashlib.blake2b(piece.encode(errors="replace"), digest_size=8).digest()
            if len(piece) > 200 and digest not in seen:
                seen.add(digest)
                found.append((source, piece))
    if len(found) < count:
        raise SystemExit(f"{len(found):,} documents found, not {count:,}: name more --roots")
    r.shuffle(found)
    folder.mkdir(parents=True)
    for number in range(FILES):
        with (
            (folder / f"p-{number:02d}.jsonl.zst").open("wb") as raw,
            zstandard.ZstdCompressor().stream_writer(raw) as stream,
        ):
            for index, (source, piece) in enumerate(found[:count][number::FILES]):
                fields = {"id": f"{number}-{index}", "source": source, "text": piece}
                stream.write((json.dumps(fields, ensure_ascii=False) + "\n").encode(errors="replace"))


def select(pool: Path, files: str, targets: Path, method: str, *, exact: bool) -> tuple[dict[str, Any], set[str]]:
    """One selection in a process of its own: what it cost, and the ids that it chose."""
    with tempfile.TemporaryDirectory(dir=pool.parent) as out:
        section = {
            "pool": {"source": [str(pool / files)], "id_field": "id", "group_field": "source"},
            "targets": [{"name": "targets", "source": [str(targets)]}],
            "score": {"method": method},
            "budget": {"share": 1 / SHARE},
            "racing": {"exact": exact},
            "output": {"folder": f"{out}/chosen"},
            "workers": 1,
        }
        config = Path(out) / "select.yaml"
        config.write_text(json.dumps(section))
        done = subprocess.run([sys.executable, "-c", RUN, str(config)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        found = json.loads(done.stdout.splitlines()[-1])
        files_of = sorted(Path(out).glob("chosen/chosen/*.zst"))
        ids = {json.loads(line)["id"] for file in files_of for line in _lines(file)}
    found["megabytes_per_cpu_second"] = found["bytes"] / 1e6 / found["cpu_seconds"]
    print(f"{method}, {files}, {'all pairs' if exact else 'race'}: {json.dumps(found)}", flush=True)
    return found, ids


def _lines(path: Path) -> list[str]:
    import zstandard

    with path.open("rb") as file:
        return zstandard.ZstdDecompressor().stream_reader(file).read().decode().splitlines()


def main() -> None:
    """Build the pool where it is missing, select, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--roots", type=Path, nargs="+", default=[], help="folders whose text files are cut up")
    parser.add_argument("--documents", type=int, default=500_000)
    parser.add_argument("--pool", type=Path, help="where the pool lies, or is to; default: a temporary folder")
    parser.add_argument("--methods", nargs="+", default=["ncd", "coverage"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        pool = arguments.pool or Path(temporary) / "pool"
        if not pool.exists():
            build(pool, arguments.roots, arguments.documents)
        wanted, name = read_targets()
        targets = Path(temporary) / "targets.jsonl"
        targets.write_text("".join(json.dumps({"text": target}) + "\n" for target in wanted))
        results: dict[str, Any] = {}
        for method in arguments.methods:
            small, _ = select(pool, "p-00*", targets, method, exact=False)
            race, raced = select(pool, "p-*", targets, method, exact=False)
            every, expected = select(pool, "p-*", targets, method, exact=True)
            results[method] = {
                "winners": len(expected),
                "missed_by_the_race": len(expected - raced),
                "race": race,
                "race, a sixteenth of the pool": small,
                "all pairs": every,
            }
    record = {
        "command": f"python tools/bench_selection_large.py {' '.join(sys.argv[1:])}",
        "machine": {"platform": platform.platform(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), "harness": importlib.metadata.version("harness")},
        "targets": name,
        "documents": arguments.documents,
        "methods": results,
    }
    text = json.dumps(record, indent=1)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
