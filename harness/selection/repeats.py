"""Records whose text another record has too, over the whole pool."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from .work import Arrays, View

ROWS_AT_ONCE = 1 << 22


def find_exact_repeats(parts: Callable[[], Iterable[View]], records: int) -> Arrays:
    """By f"{shard}-{part}": bool [records], True for all but one record of a text: that with the smallest hash of its
    id. Memory: a byte a record, and ROWS_AT_ONCE hashes."""
    repeated = {f"{view.shard}-{view.part}": np.zeros(len(view), dtype=bool) for view in parts()}
    buckets = max(1, -(-records // ROWS_AT_ONCE))
    for bucket in range(buckets):
        keys, places = [], []
        for view in parts():
            digest = view.measured["digest"]
            mine = np.flatnonzero(view.measured["usable"] & (digest[:, 0] % np.uint64(buckets) == bucket))
            keys.append(np.column_stack([digest[mine], view.measured["id_digest"][mine]]))
            places += [(f"{view.shard}-{view.part}", mine)]
        if not keys:
            continue
        key = np.concatenate(keys)
        same = np.zeros(len(key), dtype=bool)
        order = np.argsort(key[:, 0])
        alike = key[order[1:], 0] == key[order[:-1], 0]  # as good as none: only of these the rest is looked at
        few = np.unique(np.concatenate([order[1:][alike], order[:-1][alike]]))
        order = few[np.lexsort((key[few, 2], key[few, 1], key[few, 0]))]  # stable: places in order break what is left
        same[order[1:]] = np.all(key[order[1:], :2] == key[order[:-1], :2], axis=1)
        start = 0
        for name, mine in places:
            repeated[name][mine] = same[start : start + len(mine)]
            start += len(mine)
    return repeated
