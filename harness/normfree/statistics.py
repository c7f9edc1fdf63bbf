"""What sigma has been at each site: exponential averages over optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Average:
    """Means of sigma, over all tokens, over ordinary ones, and over the others (None while there were none)."""

    sigma: float
    ordinary: float | None
    others: float | None

    @property
    def ratio(self) -> float | None:
        """How many times larger sigma is for first tokens and ends of text."""
        return self.others / self.ordinary if self.ordinary and self.others is not None else None


class Averages:
    """One average a site, updated once an optimizer step from that step's sums over all tokens of all ranks.

    sigma_avg of arXiv 2507.02559: a mean of sigma over tokens, not the root of a mean variance.
    """

    def __init__(self, steps: int) -> None:
        self._keep = 1.0 - 1.0 / steps
        self.sites: dict[str, Average] = {}
        self.last: dict[str, Average] = {}
        """Of the last step alone."""

    def update(self, sums: Mapping[str, np.ndarray]) -> None:
        """`sums` as NormStates.take gives them."""
        for site, both in sums.items():
            total = both.sum(0)
            if total[0] == 0:
                continue
            means = [float(rows[1] / rows[0]) if rows[0] > 0 else None for rows in both]
            now = Average(float(total[1] / total[0]), means[0], means[1])
            before = self.sites.get(site)
            self.last[site] = now
            self.sites[site] = now if before is None else self._mix(before, now)

    def _mix(self, before: Average, now: Average) -> Average:
        def mix(old: float | None, new: float | None) -> float | None:
            if old is None or new is None:
                return old if new is None else new
            return self._keep * old + (1.0 - self._keep) * new

        sigma = mix(before.sigma, now.sigma)
        assert sigma is not None
        return Average(sigma, mix(before.ordinary, now.ordinary), mix(before.others, now.others))

    def state_dict(self) -> dict[str, Any]:
        return {
            name: {site: list(vars(average).values()) for site, average in averages.items()}
            for name, averages in (("sites", self.sites), ("last", self.last))
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sites, self.last = (
            {site: Average(*values) for site, values in state.get(name, {}).items()} for name in ("sites", "last")
        )
