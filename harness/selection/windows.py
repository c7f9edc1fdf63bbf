"""Long documents in pieces that a compressor can see whole."""

from __future__ import annotations

from math import ceil

LONGEST_CHARACTER = 4
"""Bytes in UTF-8."""


def cut_windows(text: bytes, window_bytes: int | None) -> list[bytes]:
    """The text in ceil(bytes / window_bytes) pieces as equal as can be; the text itself where it is short enough.

    A cut that would fall inside a UTF-8 character is made before it, which may leave a piece three bytes longer than
    `window_bytes`. In bytes that are no UTF-8 a cut never moves further than that either.
    """
    if window_bytes is None or len(text) <= window_bytes:
        return [text]
    pieces = ceil(len(text) / window_bytes)
    cuts = [0, *(_start_of_character(text, i * len(text) // pieces) for i in range(1, pieces)), len(text)]
    return [text[cuts[i] : cuts[i + 1]] for i in range(pieces)]


def _start_of_character(text: bytes, position: int) -> int:
    """The position, or the beginning of the character that it lies within."""
    for back in range(LONGEST_CHARACTER):
        if text[position - back] & 0xC0 != 0x80:
            return position - back
    return position
