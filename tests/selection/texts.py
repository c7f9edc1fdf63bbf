"""Random texts and bytes of many kinds, and lengths near deflate's own."""

from __future__ import annotations

import inspect
import random
import textwrap
from collections.abc import Callable
from itertools import chain

CODE = "\n".join(inspect.getsource(module) for module in (inspect, random, textwrap)).encode()
"""180 kB of Python."""
SHORT = [0, 1, 2, 3, 4, 5, 10, *range(256, 265), 520]
LONG = [16_383, 32_506, 32_768, 32_768 + 262, 65_274, 65_274 + 262, 65_535, 65_536, 65_274 + 32_768]


def draw_length(r: random.Random, most: int = 200_000) -> int:
    kind = r.random()
    if kind < 0.2:
        return min(most, r.choice(SHORT))
    if kind < 0.26:
        return max(0, min(most, r.choice(LONG) + r.choice([r.randint(-4, 4), r.randint(-300, 300)])))
    return min(most, int(2 ** r.uniform(0, 13 if kind < 0.94 else 17.6)))


def draw_text(r: random.Random, length: int) -> bytes:
    return r.choice(KINDS)(r, length)[:length]


def code(r: random.Random, length: int) -> bytes:
    start = r.randrange(len(CODE))
    return (CODE[start:] + CODE)[:length]


def near_duplicates(r: random.Random, length: int) -> bytes:
    text = bytearray(code(r, length // 3 + 1) * 4)
    for _ in range(len(text) // 300):
        text[r.randrange(len(text))] = r.randrange(256)
    return bytes(text)


def unicode(r: random.Random, length: int) -> bytes:
    starts = [0x30, 0x410, 0x4E00, 0x1F600]
    return "".join(chr(r.choice(starts) + r.randrange(60)) for _ in range(length)).encode()


def period(r: random.Random, length: int) -> bytes:
    one = r.randbytes(r.choice([1, 2, 3, 5, 7, 100, 257, 258, 259, 32_505, 32_506, 32_507, 32_768]))
    return one * (length // len(one) + 1)


def runs(r: random.Random, length: int) -> bytes:
    text = bytearray()
    while len(text) < length:
        text += bytes([r.randrange(256)]) * int(2 ** r.uniform(0, 10)) if r.random() < 0.6 else r.randbytes(20)
    return bytes(text)


def weighted(weights: Callable[[random.Random], list[float]]) -> Callable[[random.Random, int], bytes]:
    def draw(r: random.Random, length: int) -> bytes:
        chosen = weights(r)
        return bytes(r.choices(range(len(chosen)), chosen, k=length))

    return draw


KINDS: list[Callable[[random.Random, int], bytes]] = [
    code,
    code,
    near_duplicates,
    unicode,
    period,
    runs,
    lambda r, length: r.randbytes(length),
    lambda r, length: bytes([r.randrange(256)]) * length,
    weighted(lambda r: [1.0] * r.randint(1, 6)),
    weighted(lambda r: [r.random() ** 8 for _ in range(256)]),
    weighted(lambda r: [1.618**-i for i in range(30)]),  # codes longer than deflate allows
]


def draw_targets(r: random.Random, source: bytes, count: int) -> list[bytes]:
    """Unrelated to the source, cut out of it, almost the same, or what its end goes on with."""
    targets = []
    for _ in range(count):
        kind = r.random()
        start = r.randrange(len(source) + 1)
        piece = source[start : start + draw_length(r, 5_000)]
        if kind < 0.1:
            targets.append(piece)
        elif kind < 0.2:
            targets.append(piece[: len(piece) // 2] + b"\x00" + piece[len(piece) // 2 :])
        elif kind < 0.3:
            targets.append(source[-r.randint(1, 600) :] + draw_text(r, 9))
        else:
            targets.append(draw_text(r, draw_length(r, 3_000 if kind < 0.95 else 70_000)))
    return targets


def without_repeats(length: int) -> bytes:
    """Bytes of which no three following ones come twice: as many symbols as bytes."""
    assert length <= 2 * 127 * 127
    return bytes(chain.from_iterable((n // 127, 128 + n % 127) for n in range(127 * 127)))[:length]
