"""How the backward cuts tokens and columns into blocks, whose gradients by the logits are the only ones that exist."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

WORKSPACE_SHARE = 0.01
"""Of the gradients of hidden and weight, counted in fp32: what a block may take."""
LEAST_OPERATIONS, MOST_FOR_THEM_BYTES = 1.4e11, 64 << 20
"""Of a block, floating-point, however small the gradients are: an H200 is done with them in about 0.2 ms, and the host
needs not much less to launch a block's kernels. The bytes that this may take, where the width is small."""
MULTIPLE = 256
"""Of tokens and columns where they are cut: that of every tiling, so that no block depends on which is chosen."""


@dataclass(frozen=True)
class Plan:
    """Tokens a chunk and columns a strip."""

    chunk: int
    strip: int


def plan_blocks(tokens: int, columns: int, width: int, element_bytes: int, *, parts: int = 1) -> Plan:
    """Blocks within the workspace: WORKSPACE_SHARE, or what LEAST_OPERATIONS take.

    Each block adds to a chunk's rows of hidden's gradient and to a strip's rows of weight's, in global memory:
    8·N·V·D·(1/strip + 1/chunk) bytes in all, so blocks are about square. `parts`: chunks at least, where there are so
    many MULTIPLEs of tokens.
    """
    share = int(WORKSPACE_SHARE * 4 * (tokens + columns) * width)
    least = min(int(LEAST_OPERATIONS / 6 / width) * element_bytes, MOST_FOR_THEM_BYTES)
    elements = max(share, least) // element_bytes
    most = max(isqrt(elements), elements // _up(columns), MULTIPLE)
    chunks = max(-(-tokens // most), min(parts, -(-tokens // MULTIPLE)), 1)
    chunk = _up(-(-tokens // chunks))
    strip = max(elements // chunk // MULTIPLE, 1) * MULTIPLE
    strips = -(-columns // strip)
    return Plan(chunk, _up(-(-columns // max(strips, 1))))


def block_bytes(tokens: int, columns: int, width: int, element_bytes: int) -> int:
    """What one block takes: all that the backward holds beyond inputs and gradients, but for a few numbers a token."""
    plan = plan_blocks(tokens, columns, width, element_bytes)
    return min(plan.chunk, tokens) * min(plan.strip, columns) * element_bytes


def _up(value: int) -> int:
    return max(-(-value // MULTIPLE), 1) * MULTIPLE
