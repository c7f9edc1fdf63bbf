"""One process of gpu_check.py: does a job, whose path is its argument, and tells as jobs.py says."""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # instead of this folder: its modules are gpu's

from gpu.source import find_kernels  # noqa: E402

find_kernels()

from gpu import checks, special, speed, tuning  # noqa: E402
from gpu.device import Device, pick  # noqa: E402

CONTEXT_LOST = 3
"""Exit status where the device computes no more: another process has to go on."""


class Teller:
    """Writes lines of JSON to the job's file."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        # Open as long as the process lives.
        self._file = Path(job["out"]).open("a", buffering=1)  # noqa: SIM115

    def tell(self, **message: Any) -> None:
        self._file.write(json.dumps(message) + "\n")

    def left(self, names: list[str]) -> list[str]:
        """What is neither finished nor what an earlier process died of."""
        known = {*self.job["finished"], *self.job["lost"]}
        return [name for name in names if name not in known]


def check_all(job: dict[str, Any], device: Device, teller: Teller) -> None:
    """This worker's share of one of the two lists of checks."""
    if job["special"]:
        every = special.list_checks(device)
    else:
        cases = checks.cases_of(device, job["seed"], job["combinations"])
        every = {case.name: partial(checks.check_case, case, device) for case in cases}
    number, count = job["share"]
    names = [name for name in every if re.search(job["only"], name)][number::count]
    each = {name: every[name] for name in names}
    teller.tell(plan=list(each))
    for name in teller.left(list(each)):
        teller.tell(begin=name)
        result = checks.run_check(name, device, job["seed"], each[name])
        alive = device.alive()
        if not alive and name not in checks.FATAL:
            result |= {"outcome": "failed", "lost_device": True}
        teller.tell(result=result)
        if not alive:
            raise SystemExit(CONTEXT_LOST)
        device.free()


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    teller = Teller(job)
    device = pick(job["device"])
    teller.tell(machine=device.describe())
    if job["part"] == "checks":
        check_all(job, device, teller)
    elif job["part"] == "speed":
        speed.measure_all(job, device, teller)
    else:
        tuning.measure_all(job, device, teller)
    teller.tell(done=True)


if __name__ == "__main__":
    main()
