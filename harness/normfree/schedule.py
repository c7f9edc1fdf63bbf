"""When sites go: the fixed schedule as a list of events, and the ramp between real and frozen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from harness.config import ConfigError
from harness.model import NormSite

from .config import NormRemovalSection


@dataclass(frozen=True)
class Event:
    """A site goes: `step` is the first one that is trained without it, or with less of it."""

    step: int
    site: str


def fixed_events(sites: Sequence[NormSite], section: NormRemovalSection, steps: int) -> list[Event]:
    """All events of the fixed schedule, in the order of their steps (arXiv 2507.02559, table of schedules).

    Raises ConfigError where a kind of site has no time, or a site would not be gone by the last of `steps`.
    """
    missing = sorted({site.kind for site in sites} - set(section.times))
    if missing:
        raise ConfigError(
            f"norm_removal.times: says no time for {', '.join(missing)}, which this model has; give each a first step "
            f"and a gap, or set norm_removal.schedule=adaptive"
        )
    events = []
    for site in sites:
        times = section.times[site.kind]  # type: ignore[index]  # its keys are the kinds
        events.append(Event(times.first + (site.layer or 0) * times.gap, site.name))
    events.sort(key=lambda event: event.step)
    if events and events[-1].step + section.ramp_steps - 1 > steps:
        last = events[-1]
        raise ConfigError(
            f"norm_removal.times: {last.site} would be gone at step {last.step + section.ramp_steps - 1}, after the "
            f"last one (train.steps {steps}); raise train.steps, or remove earlier"
        )
    return events


def removal_order(sites: Sequence[NormSite], section: NormRemovalSection) -> list[str]:
    """The sites in the order in which the adaptive schedule takes them. Raises ConfigError for a kind that
    `section.order` leaves out."""
    missing = sorted({site.kind for site in sites} - set(section.order))
    if missing:
        raise ConfigError(f"norm_removal.order: {', '.join(missing)} is missing, which this model has; add it")
    return [site.name for kind in section.order for site in sites if site.kind == kind]


def ramp(step: int, began: int, ramp_steps: int) -> float:
    """alpha in `step` of a site whose event was at step `began`: 0 before, 1 from step began + ramp_steps - 1 on, on a
    cosine in between (arXiv 2602.10408)."""
    share = min(max((step - began + 1) / ramp_steps, 0.0), 1.0)
    return 1.0 if share == 1.0 else 0.5 - 0.5 * math.cos(math.pi * share)
