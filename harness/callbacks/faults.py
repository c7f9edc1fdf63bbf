"""Steps that go wrong: found before the optimizer step, by running statistics that survive a resume."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

from harness.config import HarnessError

from .config import FaultsSection

Kind = Literal["non_finite", "spike"]
KINDS: tuple[Kind, ...] = ("spike", "non_finite")
"""The worse ones last."""


class FaultError(HarnessError):
    """A step went wrong and the policy is to stop; the weights are those of the step before."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with a step."""

    kind: Kind
    reason: str
    """ "the loss is nan"."""


class FaultJudge:
    """Tells good steps from bad ones, and what the policy makes of these.

    The same calls with the same values on every rank give the same answers; that a fault is one for all ranks is agreed
    by the loop. Mean and standard deviation are those of the last accepted steps, each step weighing the same.
    """

    def __init__(self, section: FaultsSection) -> None:
        self.section = section
        self._losses: deque[float] = deque(maxlen=section.window_steps)
        self._norms: deque[float] = deque(maxlen=section.window_steps)
        self._decisions = 0  # skips and rollbacks without window_steps good steps in a row since
        self._good_steps = 0

    def judge(self, loss: float, norm: float) -> Fault | None:
        """What is wrong with a step of this loss and gradient norm; None: nothing."""
        for what, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                return Fault("non_finite", f"the {what} is {value}")
        section = self.section
        if section.spike == "ignore" or len(self._losses) < section.window_steps // 2:
            return None
        mean, deviation = _moments(self._losses)
        if loss > mean + max(section.spike_deviations * deviation, section.spike_least):
            return Fault("spike", _describe("loss", loss, mean, deviation, len(self._losses)))
        if section.grad_norm_deviations is not None:
            mean, deviation = _moments(self._norms)
            if norm > mean + max(section.grad_norm_deviations * deviation, mean):
                return Fault("spike", _describe("gradient norm", norm, mean, deviation, len(self._norms)))
        return None

    def accept(self, loss: float, norm: float) -> None:
        """A good step was taken."""
        self._losses.append(loss)
        self._norms.append(norm)
        self._good_steps += 1
        if self._good_steps >= self.section.window_steps:
            self._decisions = 0

    def decide(self, fault: Fault) -> Literal["ignore", "stop", "skip", "rollback"]:
        """What the policy is for a fault; counted. Too many of them are a stop."""
        policy: Literal["ignore", "stop", "skip", "rollback"] = getattr(self.section, fault.kind)
        if policy in ("skip", "rollback"):
            if self._decisions >= self.section.most:
                return "stop"
            self._decisions += 1
            self._good_steps = 0
        return policy

    @property
    def decisions(self) -> int:
        """Skips and rollbacks that are remembered against the run."""
        return self._decisions

    def state_dict(self) -> dict[str, Any]:
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "decisions": self._decisions,
            "good_steps": self._good_steps,
        }

    def load_state_dict(self, state: dict[str, Any], *, keep_decisions: bool = False) -> None:
        """`keep_decisions`: the statistics go back to where they were, and what was decided since then still counts."""
        window = self.section.window_steps
        self._losses = deque(state.get("losses", []), maxlen=window)
        self._norms = deque(state.get("norms", []), maxlen=window)
        if not keep_decisions:
            self._decisions, self._good_steps = state.get("decisions", 0), state.get("good_steps", 0)


def _moments(values: deque[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.pstdev(values)


def _describe(what: str, value: float, mean: float, deviation: float, count: int) -> str:
    return f"the {what} is {value:.4g}, and {mean:.4g} ± {deviation:.2g} over the last {count} steps"
