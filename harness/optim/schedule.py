"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math

from .config import ScheduleSection


def learning_rate(schedule: ScheduleSection, peak: float, step: int, total_steps: int) -> float:
    """The rate of step `step`, counted from 1 to `total_steps`.

    Warm-up: peak * step / warmup_steps for step <= warmup_steps. Then with f = final_fraction and x from 0 (end of the
    warm-up) to 1 (last step):
    linear f + (1 - f)(1 - x); cosine f + (1 - f)(1 + cos(pi x)) / 2;
    wsd: 1 until decay_steps before the end, then f + (1 - f)(1 - x) or f + (1 - f)(1 - sqrt(x)), x over these steps.
    """
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    first = schedule.warmup_steps
    if schedule.kind == "wsd":
        first = max(first, total_steps - decay_steps(schedule, total_steps))
    progress = min(1.0, max(0.0, (step - first) / max(1, total_steps - first)))
    if schedule.kind == "cosine":
        remaining = (1 + math.cos(math.pi * progress)) / 2
    elif schedule.kind == "wsd" and schedule.decay_shape == "sqrt":
        remaining = 1 - math.sqrt(progress)
    else:
        remaining = 1 - progress
    return peak * (schedule.final_fraction + (1 - schedule.final_fraction) * remaining)


def decay_steps(schedule: ScheduleSection, total_steps: int) -> int:
    """The length of a warmup-stable-decay schedule's final fall, in steps."""
    return schedule.decay_steps if schedule.decay_steps is not None else max(1, total_steps // 5)
