"""One command that proves the linear cross-entropy on this machine's GPU, and times it: under 8 minutes on one H200.

    python tools/gpu_check.py                     # needs this repository, torch, triton and numpy; installs nothing
    python tools/gpu_check.py --device cpu        # the same in small, in Triton's interpreter: its times mean nothing

A. Every implementation against float64, on fresh random inputs, in memory full of not-a-numbers.
B. Time and peak memory on four shapes, beside torch's losses and others that are installed, interleaved, as shares of
   the rate of the three bare matrix products in the same run on the same data.
C. As long as --budget-seconds lasts: tilings, the backward's parts, workspaces. --tune keeps the fastest tilings.

Everything runs in processes of its own (gpu/worker.py): a kernel that fails, hangs or loses the device is recorded, and
the rest goes on. The result is one JSON file, written again after each part; a table is printed last. Exit status 1
where a check failed or was not run, or one of our timed losses is wrong or missing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import secrets
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu.goals import goal_lines, judge, shape_lines
from gpu.jobs import supervise

ROOT = Path(__file__).resolve().parents[1]
CHECK_SECONDS = 210
"""For part A. What it does not get to is not run, which is no pass."""
SPEED_SECONDS = 200
STALL_SECONDS = 150
"""Longer than anything between two signs of life takes, compilers included."""
MOST_WORKERS, SPECIAL_WORKERS = 10, 4
"""Processes of part A that compile and run kernels side by side, for single cases and for the checks of special.py."""
LEAST_SECONDS = 15
"""Of part C, below which it is left out."""
WORKER_COMMAND: list[str] | None = None
"""What starts a worker, where it is not gpu/worker.py."""
NOTES = [
    "an error is ||got - exact|| / ||exact|| unless its name says otherwise; exact is float64 on the same inputs",
    "share_of_rate_at_8: what 8 N V D operations in this time are of the products' rate; share_of_rate: the same with "
    "the operations that the method does",
    "products: torch.mm in bf16; the gradient of the logits is plain torch's, so its values are those of training. "
    "Their rate is 6 N V D over the sum of the medians",
    "beyond_bytes: peak of allocated memory in a warm forward and backward, less the gradients of hidden and weight as "
    "if both were fp32",
    "random data: logits of 2 nats, the target's raised by 0 to 20. A filter that drops small probabilities drops "
    "nearly all of them here; one with a bound on their sum keeps nearly all",
    "'right': sampled rows of the gradients against float64; of others' losses 0.1 is asked",
]


class Report:
    """The document, and what is said on the way."""

    def __init__(self, arguments: argparse.Namespace, argv: list[str]) -> None:
        self.out: Path | None = arguments.out
        self.failures = 0
        self.document: dict[str, Any] = {
            "command": shlex.join(["python", "tools/gpu_check.py", *argv]),
            "date": datetime.datetime.now().isoformat(timespec="seconds"),
            "commit": _commit(),
            "machine": {},
            "seed": arguments.seed,
            "notes": NOTES,
            "counts": {},
            "checks": [],
            "speed": [],
            "goals": [],
            "tuning": [],
            "lost": [],
            "seconds": {},
        }
        self._planned: list[str] = []

    def hear_check(self, message: dict[str, Any]) -> None:
        """From a worker of part A."""
        self._hear(message)
        if "plan" in message:
            self._planned += [name for name in message["plan"] if name not in self._planned]
        if "result" in message:
            self._check(message["result"])
        if "lost" in message:
            what = f"{message['how']}; its output ended: {message['output']}"
            self._check({"name": message["lost"], "outcome": "failed", "exception": what})

    def _check(self, result: dict[str, Any]) -> None:
        self.document["checks"].append(result)
        if result["outcome"] == "failed":
            wrong = {what: pair for what, pair in result.get("errors", {}).items() if not _fits(*pair)}
            print(f"FAILED {result['name']}: {wrong or result.get('exception', '')[:600]}", flush=True)

    def hear_speed(self, message: dict[str, Any]) -> None:
        """From part B."""
        self._hear(message)
        result = message.get("result", {})
        if "methods" in result or "error" in result:
            self.document["speed"].append(result)
            print("\n".join(shape_lines(result)), flush=True)

    def hear_tuning(self, message: dict[str, Any]) -> None:
        """From part C."""
        self._hear(message)
        if "result" in message:
            self.document["tuning"].append(message["result"])
        if "stored" in message:
            self.document["stored_tilings"] = {"file": message["file"], **message["stored"]}

    def _hear(self, message: dict[str, Any]) -> None:
        if "machine" in message:
            self.document["machine"] = message["machine"]
        if "lost" in message:
            self.document["lost"].append(message)
            print(f"LOST a process in {message['lost']}: {message['how']}\n{message['output'][-600:]}", flush=True)

    def count(self) -> None:
        """Checks by outcome, those that were planned and never finished among them."""
        outcomes = {check["name"]: check["outcome"] for check in self.document["checks"]}
        for name in self._planned:
            if name not in outcomes:
                self.document["checks"].append({"name": name, "outcome": "not run"})
        found = [check["outcome"] for check in self.document["checks"]]
        kinds = ("passed", "failed", "not run", "unsupported")
        self.document["counts"] = {kind: found.count(kind) for kind in kinds}

    def write(self) -> None:
        """The file, whole at any time."""
        self.out = self.out or self._default_path()
        self.out.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.out.with_suffix(".part")
        temporary.write_text(json.dumps(self.document, indent=1) + "\n")
        temporary.replace(self.out)

    def _default_path(self) -> Path:
        machine = self.document["machine"]
        name = machine.get("name", "unknown") if machine.get("kind") == "cuda" else "cpu"
        plain = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
        return ROOT / "benchmarks" / f"gpu_check_{plain}_{self.document['date'][:10]}.json"

    def passed(self, parts: str) -> bool:
        """Whether nothing failed in the parts that were to be run."""
        counts = self.document["counts"]
        fine = True
        if "A" in parts:
            fine = counts["passed"] > 0 and counts["failed"] == counts["not run"] == 0
        if "B" in parts:
            methods = [method for shape in self.document["speed"] for method in shape.get("methods", [])]
            ours = [method for method in methods if method["ours"]]
            fine = fine and all("methods" in shape for shape in self.document["speed"]) and bool(ours)
            fine = fine and all(method.get("right") and "milliseconds" in method for method in ours)
        return fine


def _fits(error: float | str, tolerance: float) -> bool:
    return not isinstance(error, str) and error <= tolerance


def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="default: benchmarks/gpu_check_<gpu>_<date>.json")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31), help="default: a fresh one")
    parser.add_argument("--parts", default="ABC", help="some of A, B and C")
    parser.add_argument("--only", default="", help="a regular expression: the checks of part A whose names it finds")
    parser.add_argument("--combinations", type=int, default=24, help="random combinations of terms in part A")
    parser.add_argument("--workers", type=int, help="processes of part A; default: by the cores, at most 10")
    parser.add_argument("--budget-seconds", type=float, default=420, help="after which part C begins nothing new")
    parser.add_argument("--tune", action="store_true", help="keep the fastest tilings for later runs on this machine")
    arguments = parser.parse_args(argv)
    if not arguments.parts or set(arguments.parts) - set("ABC"):
        parser.error(f"--parts {arguments.parts}: some of A, B and C, such as AB")
    try:
        re.compile(arguments.only)
    except re.error as error:
        parser.error(f"--only {arguments.only}: is no regular expression: {error}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse(argv)
    environment(arguments.device)
    if arguments.device == "cuda" and not sees_gpu():
        print(
            "gpu_check: torch sees no GPU here; --device cpu runs everything in small, in Triton's interpreter",
            file=sys.stderr,
        )
        return 2
    started, report = time.monotonic(), Report(arguments, argv)
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for part in ("A", "B", "C"):
            if part not in arguments.parts:
                continue
            begun = time.monotonic()
            run_part(part, arguments, report, Path(folder), started)
            report.document["seconds"][part] = round(time.monotonic() - begun, 1)
            report.write()
    conclude(report)
    return 0 if report.passed(arguments.parts) else 1


def sees_gpu() -> bool:
    """Asked in a process of its own, as the parent needs neither torch nor a device."""
    probe = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 3)"
    return subprocess.run([sys.executable, "-c", probe], check=False).returncode != 3


def environment(device: str) -> None:
    """Of the workers: the interpreter on the CPU, and the compiler on a GPU."""
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)


def run_part(part: str, arguments: argparse.Namespace, report: Report, folder: Path, started: float) -> None:
    """One part, to its end or to the end of its time."""
    common = {"device": arguments.device, "seed": arguments.seed, "combinations": arguments.combinations}
    common["only"] = arguments.only
    if part == "A":
        count = arguments.workers or max(1, min(MOST_WORKERS, (os.cpu_count() or 2) - 2))
        special = 1 if arguments.device == "cpu" else SPECIAL_WORKERS
        shares = [(True, n, special) for n in range(special)] + [(False, n, count) for n in range(count)]
        jobs = [{"part": "checks", "special": kind, "share": [n, of], **common} for kind, n, of in shares]
        seconds, hear = float(CHECK_SECONDS), report.hear_check
    elif part == "B":
        seconds, hear = float(SPEED_SECONDS), report.hear_speed
        jobs = [{"part": "speed", "until": time.time() + 0.8 * seconds, **common}]
    else:
        seconds, hear = arguments.budget_seconds - (time.monotonic() - started), report.hear_tuning
        jobs = [{"part": "tuning", "until": time.time() + 0.9 * seconds, "tune": arguments.tune, **common}]
    if part == "C" and seconds < LEAST_SECONDS:
        print("no time is left for part C", flush=True)
        return
    supervise(
        jobs, folder, hear, deadline=time.monotonic() + seconds, stall_seconds=STALL_SECONDS, command=WORKER_COMMAND
    )
    report.count()
    report.document["goals"] = judge(report.document["speed"])


def conclude(report: Report) -> None:
    """The short table, last."""
    document = report.document
    print(f"\n{document['machine'].get('name')}: checks {document['counts']}, seconds {document['seconds']}")
    for check in document["checks"]:
        if check["outcome"] != "passed":
            print(f"  {check['outcome']}: {check['name']} {check.get('exception', '')[:200]}")
    for shape in document["speed"]:
        print("\n".join(shape_lines(shape)))
    print("\n".join(goal_lines(document["goals"])))
    print(f"written to {report.out}")


if __name__ == "__main__":
    sys.exit(main())
