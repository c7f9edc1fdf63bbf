"""How ranks agree outside of collectives: through the store that they met at.

Collectives must be called in the same order on every rank, so that a thread of its own cannot join in. Nothing here has
a timeout: a rank that is lost ends the job from outside (watch.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence

import torch.distributed as dist

SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.002, 0.5
"""Between two looks at the store."""


class Channel:
    """All ranks call the same methods in the same order, each from one thread."""

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._round = 0

    def add_up(self, numbers: Sequence[int]) -> list[int]:
        """The sum of each number over all ranks; returns when all have called it."""
        if self._world_size == 1:
            return [int(number) for number in numbers]
        self._round += 1
        for place, number in enumerate(numbers):
            if number:
                self._store.add(self._key(place), int(number))
        self._store.add(self._key("came"), 1)
        poll(lambda: self._store.add(self._key("came"), 0) == self._world_size)
        return [self._store.add(self._key(place), 0) for place in range(len(numbers))]

    def all_lines(self, lines: Sequence[str]) -> list[str]:
        """The lines of every rank, on all ranks."""
        if self._world_size == 1:
            return list(lines)
        if lines:
            self._store.set(f"{self._round + 1}/lines/{self._rank}", json.dumps(list(lines)))
        [speakers] = self.add_up([bool(lines)])
        keys = [f"{self._round}/lines/{rank}" for rank in range(self._world_size if speakers else 0)]
        return [line for key in keys if self._store.check([key]) for line in json.loads(self._store.get(key))]

    def _key(self, part: object) -> str:
        return f"{self._round}/{part}"


def poll(condition: Callable[[], bool]) -> None:
    """Wait until it is true, looking ever less often."""
    pause = SHORTEST_PAUSE_SECONDS
    while not condition():
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
