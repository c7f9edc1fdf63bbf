"""One run that is killed again and again until it is done, and looked at after every kill.

Everything here but the forked processes of kills.py computes nothing with torch and leaves no thread behind, so that
forking stays safe.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from harness.checkpoint import CheckpointStore
from harness.settings import Settings
from harness.stop import EXIT_RESUME
from tests.checkpoint.kills import POINTS, RANDOM, Memory, Plan, train_in_child
from tests.checkpoint.records import BrokenRunError, check_tensorboard, difference, series, step_of
from tests.checkpoint.torture_variants import STEPS, VARIANTS, Variant, folder_name

PATIENCE_SECONDS = 120.0
"""For a process to end that is not killed."""
BOUND_SECONDS = 75.0
"""For the other rank of a job to end by itself, after one was killed: the longest of what parallel/watch.py states is
timeout_seconds + 5 for ranks that have not met yet; the rest is for a busy machine."""

_NEVER = 10**9


@dataclass
class Outcome:
    """How the processes of one start ended."""

    statuses: list[int]
    """Of each rank as Popen would say it: negative is a signal."""
    notes: list[str]
    """What each has left in its Memory."""
    seconds: float
    survivor_seconds: float | None = None
    """From the first rank's kill to the end of the other one, where that ended by itself."""

    @property
    def killed(self) -> bool:
        return -signal.SIGKILL in self.statuses

    @property
    def completed(self) -> bool:
        return not any(self.statuses)

    @property
    def stopped(self) -> bool:
        return not self.killed and EXIT_RESUME in self.statuses and set(self.statuses) <= {0, EXIT_RESUME}


def start(settings: Settings, variant: Variant, plan: Plan | None, log: Path) -> Outcome:
    """Start a run or go on with it, killed as planned, and wait for the end. BrokenRunError where it does not end."""
    memories = [Memory() for _ in range(variant.world_size)]
    began = time.monotonic()
    children: dict[int, int] = {}
    common = {"WORLD_SIZE": str(variant.world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    for rank, memory in enumerate(memories):
        identity = {"RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo", **common}
        mine = plan if plan is not None and plan.rank == rank and plan.point != RANDOM else None
        variables = identity if variant.world_size > 1 else {}
        children[train_in_child(settings, mine, variant.poison, memory, log, variables)] = rank
    statuses: dict[int, int] = {}
    due = began + plan.seconds if plan is not None and plan.point == RANDOM else None
    killed_at = survivor_seconds = None
    while children:
        now = time.monotonic()
        if due is not None and now >= due and plan is not None:
            due = None
            _kill(pid for pid, rank in children.items() if plan.both or rank == plan.rank)
        for pid in list(children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            rank = children.pop(pid)
            statuses[rank] = os.waitstatus_to_exitcode(status)
            if statuses[rank] == -signal.SIGKILL and killed_at is None:
                killed_at = now
                if plan is not None and plan.both:
                    _kill(children)
            elif killed_at is not None:
                survivor_seconds = now - killed_at
        patience = PATIENCE_SECONDS if killed_at is None else killed_at - began + BOUND_SECONDS
        if now - began > patience:
            _kill(children)
            raise BrokenRunError(f"ranks {sorted(children.values())} did not end within {patience:.0f} s; see {log}")
        time.sleep(0.003)
    ordered = [statuses[rank] for rank in range(variant.world_size)]
    return Outcome(ordered, [memory.read() for memory in memories], time.monotonic() - began, survivor_seconds)


def _kill(pids: Iterable[int]) -> None:
    for pid in list(pids):
        os.kill(pid, signal.SIGKILL)


def _free_port() -> int:
    """Below those that the system gives to connections."""
    while True:
        port = random.SystemRandom().randint(15000, 32000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


def undisturbed(root: Path, name: str) -> dict[str, Any]:
    """Do the run that the killed ones are compared with; how long it took, and how often it came to each point."""
    variant, log = VARIANTS[name], root / f"{folder_name(name)}.log"
    settings = variant.settings(root, folder_name(name))
    outcome = start(settings, variant, None, log)
    if not outcome.completed:
        raise BrokenRunError(f"the undisturbed run ended with {outcome.statuses}; see {log}")
    check_tensorboard(settings.run.path)
    counts = [json.loads(note)["counts"] for note in outcome.notes]
    return {"seconds": outcome.seconds, "counts": counts}


class TorturedRun:
    """A run of a variant under `root`, where the undisturbed one is."""

    def __init__(
        self, root: Path, name: str, number: int, whole: dict[str, Any], seed: int, wanted: list[str], most: int
    ) -> None:
        """`whole` is what `undisturbed` returned; points in `wanted` come first; after `most` kills it is let be."""
        self.variant, self.whole = VARIANTS[name], whole
        self.settings = self.variant.settings(root, f"{folder_name(name)}-killed-{number}")
        self.folder, self.log = self.settings.run.path, root / f"killed-{number}.log"
        self.log.touch()
        self.plans_file = root / f"killed-{number}.plans.jsonl"
        self.expected = series(root / "runs" / folder_name(name))
        self.expected_folder = root / "runs" / folder_name(name)
        self.store = CheckpointStore(self.folder / "checkpoints")
        self._random, self._wanted, self._most = random.Random(f"{seed} {number}"), list(wanted), most
        self.kills: Counter[str] = Counter()
        self.details: Counter[str] = Counter()
        self.survivors: list[tuple[float, int]] = []
        self.stops = self.misses = 0

    def run(self, plans: list[Plan] | None = None) -> dict[str, Any]:
        """Kill (at `plans`, where given) and go on until the run is done; the figures. Raises BrokenRunError."""
        began, done = time.monotonic(), False
        while not done:
            whole_before = self.store.steps()
            if plans is None:
                plan = self._choose(whole_before) if self.kills.total() < self._most else None
            else:
                plan = plans.pop(0) if plans else None
            if plan is not None:
                with self.plans_file.open("a") as file:
                    file.write(json.dumps(asdict(plan)) + "\n")
            said_before = self.log.stat().st_size
            outcome = start(self.settings, self.variant, plan, self.log)
            done = self._take(outcome, plan, self.log.read_bytes()[said_before:].decode(errors="replace"))
            self._look(whole_before)
        self._compare()
        return {
            "kills": self.kills,
            "details": self.details,
            "survivors": self.survivors,
            "stops": self.stops,
            "misses": self.misses,
            "seconds": time.monotonic() - began,
        }

    def _choose(self, whole_steps: list[int]) -> Plan:
        draw = self._random
        possible = [point for point in POINTS if self._is_possible(point, whole_steps)]
        wanted = [point for point in self._wanted if point in possible]
        rank = draw.randrange(self.variant.world_size)
        both = self.variant.world_size > 1 and draw.random() < 0.3
        if not wanted and draw.random() < 0.25:
            return Plan(RANDOM, seconds=draw.uniform(0, 0.7 * self.whole["seconds"]), rank=rank, both=both)
        often = [*possible, "rollback", "rollback"] if "rollback" in possible else possible  # it soon is no longer
        point = draw.choice(wanted or often)
        counts = self.whole["counts"][rank]
        if point in ("snapshot", "rename", "prune") and not counts.get(point):
            rank, counts = 0, self.whole["counts"][0]  # the rank that commits and deletes
        left = 1 - max(whole_steps, default=0) / STEPS
        limits = {"resume": 30.0, "stop": 40.0, "rollback": 0.5 * counts.get("rollback", 0)}
        limit = max(2, round(limits.get(point, 0.3 * left * counts.get(point, 0))))
        # In a rollback and in a start more is at stake in the beginning than in what follows.
        share = draw.random() ** (2 if point in ("resume", "rollback") else 1)
        plan = Plan(point, 1 + int(limit * share), draw.random() < 0.5, rank, both)
        if point != "stop":
            return plan
        # In the middle of a validation, half of them; and a quarter may come to their end.
        where = draw.choice(("anywhere", "evaluation"))
        number = plan.number if wanted or draw.random() < 0.75 else _NEVER
        signal_at = draw.randint(1, max(2, round(0.3 * left * counts[where])))
        return replace(plan, number=number, signal_at=signal_at, signal_point=where)

    def _is_possible(self, point: str, whole_steps: list[int]) -> bool:
        """Whether a start may well come to it."""
        if point == "rollback":
            return self.variant.rolls_back and max(whole_steps, default=0) < STEPS // 2
        return point != "resume" or bool(whole_steps)

    def _take(self, outcome: Outcome, plan: Plan | None, said: str) -> bool:
        """Count how a start ended, which has `said` so much; whether the run is done."""
        if outcome.killed:
            assert plan is not None
            hit = outcome.notes[plan.rank]
            if plan.point != RANDOM and not hit.startswith("hit"):
                raise BrokenRunError(f"killed by somebody else: {plan}, {outcome}")
            self.kills[plan.point] += 1
            self.details[f"{plan.point}: {hit.removeprefix('hit ').removeprefix('at ')}"] += 1
            if plan.point in self._wanted:
                self._wanted.remove(plan.point)
            if outcome.survivor_seconds is not None:
                self.survivors += [
                    (outcome.survivor_seconds, status) for status in outcome.statuses if status != -signal.SIGKILL
                ]
            unexpected = set(outcome.statuses) - {-signal.SIGKILL, 0, EXIT_RESUME}
            if unexpected and "did not meet all" not in said:
                raise BrokenRunError(f"beside a killed rank another ended with {unexpected}; see {self.log}")
            return False
        if outcome.stopped and plan is not None and plan.point == "stop":
            self.stops += 1
            return False
        if not outcome.completed:
            raise BrokenRunError(f"ended with {outcome.statuses}, {plan}; see {self.log}")
        self.misses += plan is not None
        return True

    def _look(self, whole_before: list[int]) -> None:
        """What must hold after every end."""
        steps = self.store.steps()
        for step in steps:
            if problems := self.store.verify(step):
                raise BrokenRunError(f"a committed checkpoint is damaged: {problems}")
        if whole_before and not steps:
            raise BrokenRunError(f"there were checkpoints of steps {whole_before}, and none is left")
        recorded = series(self.folder)
        if steps and steps[-1] > len(recorded) + 1:  # one more where a stop came before the record of a step
            raise BrokenRunError(f"a checkpoint of step {steps[-1]}, and {len(recorded)} steps are recorded")
        if self.variant.rolls_back:  # what is recorded may be about to be rolled back
            if [step_of(line) for line in recorded] != list(range(1, len(recorded) + 1)):
                raise BrokenRunError(f"steps {[step_of(line) for line in recorded]} are recorded")
            return
        if recorded != self.expected[: len(recorded)]:
            raise BrokenRunError(f"after the kill: {difference(recorded, self.expected)}")
        if whole_before and steps[-1] < whole_before[-1]:
            raise BrokenRunError(f"the newest of {whole_before} is gone; there are {steps}")
        if len(steps) < min(len(whole_before), self.settings.checkpoint.keep_last or 0):
            raise BrokenRunError(f"of {whole_before} too few are left: {steps}")

    def _compare(self) -> None:
        """The run is done: all of it as if nothing had been."""
        recorded = series(self.folder)
        if recorded != self.expected or [step_of(line) for line in recorded] != list(range(1, STEPS + 1)):
            raise BrokenRunError(difference(recorded, self.expected))
        check_tensorboard(self.folder)
        theirs, ours = CheckpointStore(self.expected_folder / "checkpoints"), self.store
        if theirs.manifest(STEPS).files != ours.manifest(STEPS).files:
            raise BrokenRunError("the last checkpoint has other tensors than that of the undisturbed run")
        every = self.settings.checkpoint.keep_every_steps
        for_ever = list(range(every, STEPS + 1, every)) if every is not None else []
        scores = {step: theirs.read_state(step)["validation_loss"] for step in theirs.steps()}
        judged = [step for step, score in scores.items() if score is not None]
        best = [min(judged, key=lambda step: scores[step])] if self.settings.checkpoint.keep_best else []
        if not {*for_ever, *best} <= set(ours.steps()):
            raise BrokenRunError(
                f"checkpoints of steps {for_ever} and {best} should have been kept; there are {ours.steps()}"
            )
