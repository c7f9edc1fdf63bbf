"""Runs that are killed again and again, by SIGKILL, and must end as if nothing had been.

    python tools/torture_checkpoints.py --kills 1000 --out benchmarks/torture_checkpoints.json

A run is some steps of a tiny model. It is killed at a point (tests/checkpoint/kills.py says which there are) or after a
random time, looked at, started again, killed again, until it is done; then its metrics, TensorBoard and last checkpoint
are compared with those of a run that nobody disturbed. What is wrong ends the tool, which keeps the folder and says how
to do the same again.

Starting Python and its libraries would take most of the time. So this process imports them once, computes nothing, has
one thread, and forks all others; forking after torch has computed, or with threads, would not be safe.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAIRS_EVERY = 5
"""Of so many runs one is of two ranks."""
KILLS_A_RUN = 12
"""At the most."""
NOTES = [
    "a kill is one start of a run that ended by SIGKILL; each is followed by another start, the last of which is left "
    "alone and ends the run. kills_of_two_ranks is the part of them in jobs of two ranks, of which one or both died",
    "after every kill: each committed checkpoint is whole, every byte read; where there was one there is one, and as "
    "many as are to be kept; the lines of metrics.jsonl are the first ones of the undisturbed run (where it is to be "
    "rolled back: each step once)",
    "after the last start: metrics.jsonl has every step once and is that of the undisturbed run, in all digits but the "
    "columns that depend on the clock; TensorBoard's EventAccumulator reads each step once with the values of "
    "metrics.jsonl; the last checkpoint's tensor files have the same digests; checkpoints to be kept are there",
    "this file is written where nothing was wrong in any run; the first thing that is wrong ends the tool",
    "operations: what the killed process was about to do, or had just done; at a random time, what it had begun last",
    "missed: starts that were to be killed and came to their end first; they complete the run. stopped: starts that "
    "were asked to stop by SIGTERM and to be killed while they do it, and had saved and ended before",
    "survivors: ranks whose other rank was killed, seconds until they ended by themselves, and their exit statuses",
]


def import_everything(names: Sequence[str] | None) -> list[str]:
    """All that runs of the variants `names` import, some of it late, so that forked processes find it there; the names,
    which are all of them where None are given."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    sys.path.insert(0, str(ROOT))
    logging.disable(logging.WARNING)
    modules = ["tests.checkpoint.tortured", "tensorboard.backend.event_processing.event_accumulator"]
    modules += ["tensorboard.compat.proto.event_pb2", "tensorboard.summary.writer.record_writer"]
    modules += [f"megatron.core.datasets.{name}" for name in ("indexed_dataset", "gpt_dataset", "helpers")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in modules:
            importlib.import_module(module)
        from tests.checkpoint.torture_variants import VARIANTS

        for name in names or ():
            if name not in VARIANTS:
                raise SystemExit(f"--variants: {name!r} is none of {', '.join(map(repr, VARIANTS))}")
        names = list(names or VARIANTS)
        sections = [VARIANTS[name].sections.get("parallel", {}) for name in names]
        if any(section.get("tensor", 1) > 1 for section in sections):
            importlib.import_module("harness.parallel.megatron_layers")
        if any(section.get("zero_stage") for section in sections):
            importlib.import_module("deepspeed")
    logging.disable(logging.NOTSET)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every start that voids steps
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise SystemExit(f"this process has {threads} threads after its imports, so it must not fork")
    return names


Job = tuple[Path, Callable[[], dict[str, Any]]]
"""A new file for a result, and what gives it."""


def in_processes(jobs: Iterator[Job | None], lanes: int) -> Iterator[dict[str, Any]]:
    """What each job returns, as it comes; `lanes` of them run at a time, each in a forked process. None: no more until
    one has ended. A job that fails gives {"failure": why}, and is the last one to be started."""
    running: dict[int, Path] = {}
    failed = False
    while True:
        while len(running) < lanes and not failed and (job := next(jobs, None)) is not None:
            running[_fork(*job)] = job[0]
        if not running:
            return
        child, status = os.wait()
        file = running.pop(child)
        if file.exists():
            result = json.loads(file.read_text())
        else:
            result = {"failure": f"{file} is missing: its process ended with {os.waitstatus_to_exitcode(status)}"}
        failed = failed or "failure" in result
        yield result


def _fork(file: Path, work: Callable[[], dict[str, Any]]) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            try:
                result = work()
            except Exception as error:
                result = {"failure": f"{type(error).__name__}: {error}"}
            temporary = file.with_suffix(".part")
            temporary.write_text(json.dumps(result))
            temporary.rename(file)
        finally:
            os._exit(0)
    return child


class Torture:
    """The runs under `root`, and what they add up to."""

    def __init__(self, root: Path, variants: Sequence[str], seed: int, kills: int, least: int) -> None:
        from tests.checkpoint import kills as points
        from tests.checkpoint.torture_variants import VARIANTS

        self.root, self.seed, self.wanted_kills, self.least = root, seed, kills, least
        single = [name for name in variants if VARIANTS[name].world_size == 1]
        pairs = [name for name in variants if VARIANTS[name].world_size > 1]
        self.singles, self.pairs = single, pairs
        self.whole: dict[str, dict[str, Any]] = {}
        self.kills: Counter[str] = Counter()
        self.details: Counter[str] = Counter()
        self.by_variant: dict[str, Counter[str]] = {name: Counter() for name in variants}
        self.survivors: list[tuple[float, int]] = []
        self._under_way: dict[int, int] = {}  # the kills that a run may have, by its number
        rolls_back = any(VARIANTS[name].rolls_back for name in variants)
        self.points = [point for point in points.POINTS if point != "rollback" or rolls_back]
        self.began = time.monotonic()

    def first_runs(self, lanes: int) -> str | None:
        """The undisturbed runs; the first one alone, as it prepares the data. Why it failed, if it did."""
        from tests.checkpoint.tortured import undisturbed

        def job(name: str) -> Job:
            return self.root / f"whole-{names.index(name)}.json", lambda: {name: undisturbed(self.root, name)}

        names = list(self.by_variant)
        for part in (names[:1], names[1:]):
            for result in in_processes(map(job, part), lanes):
                if "failure" in result:
                    return f"undisturbed: {result['failure']}"
                self.whole |= result
        self.say(
            "the undisturbed runs are done: " + ", ".join(f"{run['seconds']:.1f} s" for run in self.whole.values())
        )
        return None

    def killed_runs(self, lanes: int) -> str | None:
        """Runs until there are enough kills at every point. Why one failed, if one did."""
        for result in in_processes(self._jobs(), lanes):
            if "failure" in result:
                return result["failure"]
            kills, name = Counter(result["kills"]), result["variant"]
            self.kills += kills
            del self._under_way[result["number"]]
            self.details += Counter(result["details"])
            self.by_variant[name] += Counter(
                kills=kills.total(), runs=1, stopped=result["stops"], missed=result["misses"]
            )
            self.survivors += result["survivors"]
            where = ", ".join(f"{point} {count}" for point, count in kills.items())
            self.say(f"run {result['number']}, {name}: {result['seconds']:.0f} s, killed at {where or 'no point'}")
        return None

    def lacking(self) -> list[str]:
        """The points with too few kills."""
        return [point for point in self.points if self.kills[point] < self.least]

    def say(self, text: str) -> None:
        seconds = time.monotonic() - self.began
        print(f"{self.kills.total():5} of {self.wanted_kills} kills, {seconds:5.0f} s: {text}", flush=True)

    def figures(self) -> dict[str, Any]:
        """What is to be known of it."""
        from tests.checkpoint.torture_variants import VARIANTS

        total: Counter[str] = sum(self.by_variant.values(), Counter())
        pairs = sum(counts["kills"] for name, counts in self.by_variant.items() if VARIANTS[name].world_size > 1)
        return {
            "kills": self.kills.total(),
            "kills_by_point": dict(self.kills.most_common()),
            "kills_of_two_ranks": pairs,
            "runs": total["runs"],
            "missed": total["missed"],
            "stopped": total["stopped"],
            "seconds": round(time.monotonic() - self.began),
            "survivors": {
                "seconds": spread([seconds for seconds, _ in self.survivors]),
                "exit_statuses": dict(Counter(str(status) for _, status in self.survivors).most_common()),
            },
            "by_variant": {name: dict(counts) for name, counts in self.by_variant.items()},
            "operations": dict(sorted(self.details.items())),
        }

    def _jobs(self) -> Iterator[Job | None]:
        """Runs, or None where those that are under way may be enough."""
        number = 0
        while self.kills.total() < self.wanted_kills or self.lacking():
            free = self.wanted_kills - self.kills.total() - sum(self._under_way.values())
            if free <= 0 and self._under_way:
                yield None
                continue
            if number == self.wanted_kills:  # a run has some kills, so many will do
                return
            is_pair = bool(self.pairs) and (number % PAIRS_EVERY == 1 or not self.singles)
            kinds, place = (self.pairs, number // PAIRS_EVERY) if is_pair else (self.singles, number)
            name = kinds[(place if self.singles else number) % len(kinds)]
            lacking = self.lacking()
            most = self._under_way[number] = min(KILLS_A_RUN, free if free > 0 else len(lacking))
            yield self.root / f"killed-{number}.json", self.job(name, number, lacking, most)
            number += 1

    def job(
        self, name: str, number: int, wanted: list[str], most: int, plans: list[dict[str, Any]] | None = None
    ) -> Callable[[], dict[str, Any]]:
        """One run, to be called in a process of its own; its folder goes where it went well."""
        from tests.checkpoint.kills import Plan
        from tests.checkpoint.tortured import TorturedRun

        def work() -> dict[str, Any]:
            run = TorturedRun(self.root, name, number, self.whole[name], self.seed, wanted, most)
            try:
                result = run.run(None if plans is None else [Plan(**plan) for plan in plans])
            except Exception as error:
                again = f'--variants "{name}" --seed {self.seed} --replay {run.plans_file}'
                reason = f"{type(error).__name__}: {error}"
                return {"failure": f"run {number}, {name}: {reason}\nkept: {run.folder}, {run.log}\nagain: {again}"}
            shutil.rmtree(run.folder)
            return {**result, "variant": name, "number": number}

        return work


def spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 2), "longest": round(max(values), 2)} if values else {}


def describe_machine() -> dict[str, Any]:
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    packages = ("torch", "megatron-core", "deepspeed", "tensorboard", "safetensors", "numpy")
    return {
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "threads_a_process": 1,
        "backend": "gloo",
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 where anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="go on until there are so many")
    parser.add_argument("--least", type=int, default=10, help="and so many at each point")
    parser.add_argument("--lanes", type=int, default=2, help="runs at a time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--variants", nargs="+", help="kinds of runs; all of them by default")
    parser.add_argument("--replay", type=Path, help="a file of plans that a failed run has left: those kills alone")
    parser.add_argument("--folder", type=Path, help="where to work, instead of a temporary folder")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    names = import_everything(options.variants)
    root = Path(tempfile.mkdtemp(prefix="torture-", dir=options.folder))
    torture = Torture(root, names, options.seed, options.kills, options.least)
    if options.replay is not None:
        plans = [json.loads(line) for line in options.replay.read_text().splitlines()]
        failure = torture.first_runs(options.lanes) or torture.job(names[0], 0, [], 0, plans)().get("failure")
    else:
        failure = torture.first_runs(options.lanes) or torture.killed_runs(options.lanes)
        lacking = torture.lacking()
        if failure is None and lacking:
            failure = f"after so many runs there are still too few kills at {', '.join(lacking)}"
    if failure is not None:
        print(f"WRONG: {failure}\nafter {torture.kills.total()} kills; all is kept in {root}", flush=True)
        return 1
    shutil.rmtree(root)
    if options.replay is not None:
        print("nothing is wrong this time")
        return 0
    figures = torture.figures()
    print(json.dumps({key: figures[key] for key in ("kills", "kills_by_point", "kills_of_two_ranks", "seconds")}))
    if options.out is not None:
        command = f"--kills {options.kills} --least {options.least} --lanes {options.lanes} --seed {options.seed}"
        document = {
            "command": f"python tools/torture_checkpoints.py {command}",
            "machine": describe_machine(),
            "notes": NOTES,
            **figures,
        }
        options.out.write_text(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
