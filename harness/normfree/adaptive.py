"""The adaptive schedule: the next site goes when the loss has recovered from the one before; a spike takes it back."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from .config import AdaptiveSection


@dataclass
class _State:
    """All that decides; in every checkpoint."""

    mean: float | None = None
    """The running mean of the loss since the last removal."""
    seen: int = 0
    """Steps in it."""
    reference: float | None = None
    """What the loss has to come back to: the lowest mean before any removal."""
    before: float | None = None
    """The mean before the last removal, which spikes are measured from."""
    removed_at: int | None = None
    """The step of the last removal."""
    next_step: int = 0
    """No removal before it."""
    gap: int = 0
    rollbacks: int = 0


class AdaptiveSchedule:
    """Decides from the training loss alone, which is the same on all ranks."""

    def __init__(self, section: AdaptiveSection, ramp_steps: int) -> None:
        self.section, self._ramp_steps = section, ramp_steps
        self._state = _State(next_step=section.start, gap=section.gap)

    @property
    def rollbacks(self) -> int:
        return self._state.rollbacks

    def is_due(self, step: int) -> bool:
        """Whether a site is to go in `step`, the next one."""
        state = self._state
        if step < state.next_step or state.mean is None:
            return False
        if state.removed_at is None or state.reference is None:
            return True
        recovered = state.mean <= state.reference + self.section.tolerance
        return recovered or step >= state.removed_at + self.section.patience

    def remove(self, step: int) -> None:
        """A site goes in `step`."""
        state = self._state
        assert state.mean is not None
        if state.removed_at is not None:
            state.gap = max(self.section.gap, state.gap // 2)
        state.before = state.mean
        state.reference = state.mean if state.reference is None else min(state.reference, state.mean)
        state.removed_at = step
        # A ramp ends before the next begins, so that a spike has one cause.
        state.next_step = step + max(state.gap, self._ramp_steps)
        state.seen = 0

    def observe(self, loss: float) -> None:
        """The loss of a good step."""
        state = self._state
        state.seen += 1
        share = max(1.0 / state.seen, 1.0 / self.section.window_steps)  # a plain mean until the window is full
        state.mean = loss if state.seen == 1 or state.mean is None else (1 - share) * state.mean + share * loss

    def is_spike(self, step: int, loss: float) -> bool:
        """Whether the loss of `step` is a removal's doing and bad enough to take it back."""
        state = self._state
        if state.removed_at is None or state.before is None:
            return False
        if step >= state.removed_at + max(self.section.patience, self._ramp_steps):
            return False
        return not math.isfinite(loss) or loss > state.before + self.section.spike

    def take_back(self, went_back_to: int, other: AdaptiveSchedule) -> None:
        """After the state of step `went_back_to` is restored: what `other`, its state at the spike, has learnt."""
        self._state.rollbacks = other._state.rollbacks + 1
        self._state.gap = 2 * other._state.gap
        self._state.next_step = went_back_to + 1 + self._state.gap

    def copy(self) -> AdaptiveSchedule:
        other = AdaptiveSchedule(self.section, self._ramp_steps)
        other.load_state_dict(self.state_dict())
        return other

    def state_dict(self) -> dict[str, Any]:
        return asdict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = _State(**state)
