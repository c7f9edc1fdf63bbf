"""`harness select` beside DSIR, from files to files, for bench_selection.py."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_selection_pool import SHARE, Document, clock, in_turn, spread

DSIR = """
import sys
from data_selection import HashedNgramDSIR
pool, targets, folder, documents, processes = sys.argv[1:]
dsir = HashedNgramDSIR([pool], [targets], cache_dir=folder + "/cache", num_proc=int(processes))
dsir.fit_importance_estimator()
dsir.compute_importance_weights()
dsir.resample(out_dir=folder + "/chosen", num_to_sample=int(documents), cache_dir=folder + "/resampled")
"""
"""As its README has it: features of all documents twice, then a sample."""

SELECTIONS = {
    "ncd": ["score.method=ncd"],
    "ncd over lz4": ["score.method=ncd", "score.compressor=lz4"],
    "coverage": ["score.method=coverage"],
}
Command = Callable[[str], list[str]]
"""The command line, for a folder to write to."""


def measure_end_to_end(
    documents: list[Document], targets: list[str], folder: Path, dsir_python: str | None, rounds: int, workers: int
) -> dict[str, Any]:
    """CPU- and wall seconds from files to files, processes' starts included."""
    pool, wanted = folder / "pool.jsonl", folder / "targets.jsonl"
    lines = [json.dumps({"id": str(n), "text": each.text, "source": each.source}) for n, each in enumerate(documents)]
    pool.write_text("\n".join(lines) + "\n")
    wanted.write_text("".join(json.dumps({"text": target}) + "\n" for target in targets))
    config = folder / "select.yaml"
    section = {
        "pool": {"source": [str(pool)], "id_field": "id", "group_field": "source"},
        "targets": [{"name": "targets", "source": [str(wanted)]}],
        "budget": {"documents": len(documents) // SHARE},
        "duplicates": {"remove": "exact"},  # the peer removes none
        "leaks": {"remove": False},
        "output": {"folder": "set below"},
        "workers": workers,
    }
    config.write_text(json.dumps(section))  # which is YAML too

    def select(*options: str) -> Command:
        command = [sys.executable, "-m", "harness", "select", str(config), *options]
        return lambda out: [*command, f"output.folder={out}/chosen"]

    commands = {
        f"harness select, {name}{how}": select(*options, *exact)
        for name, options in SELECTIONS.items()
        for how, exact in (("", []), (", all pairs", ["racing.exact=true"]))
    }
    if dsir_python is not None:
        numbers = [str(len(documents) // SHARE), str(workers)]
        commands["DSIR (data-selection 1.0.3)"] = lambda out: [
            *(dsir_python, "-c", DSIR, str(pool), str(wanted), out),
            *numbers,
        ]
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    ids: dict[str, set[str]] = {}
    size = sum(len(document.text.encode()) for document in documents)
    for number in range(-1, rounds):
        for name in in_turn(number + 1, commands):
            with tempfile.TemporaryDirectory(dir=folder) as out:
                run = functools.partial(subprocess.run, commands[name](out), capture_output=True, text=True)
                wall = time.perf_counter()
                seconds, done = clock(run)
                wall = time.perf_counter() - wall
                if done.returncode:
                    raise SystemExit(f"{name} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
                files = sorted((Path(out) / "chosen").rglob("*.jsonl"))
                ids[name] = {json.loads(line)["id"] for file in files for line in file.read_text().splitlines()}
            if number >= 0:
                found[name].append({"cpu_seconds": seconds, "wall_seconds": wall, "mb": size / seconds / 1e6})
        print(f"end to end: round {number + 1} of {rounds}", flush=True)
    return {
        "documents": len(documents),
        "bytes": size,
        "chosen": {name: len(each) for name, each in ids.items()},
        "missed_by_the_race": {
            name: len(ids[f"harness select, {name}, all pairs"] - ids[f"harness select, {name}"]) for name in SELECTIONS
        },
        "workers": workers,
        "contenders": {
            name: {
                "cpu_seconds": spread(each["cpu_seconds"] for each in rounds_of),
                "wall_seconds": spread(each["wall_seconds"] for each in rounds_of),
                "megabytes_per_cpu_second": spread(each["mb"] for each in rounds_of),
            }
            for name, rounds_of in found.items()
        },
    }
