"""The gradient filter with a bound: which tiles of the softmax hold so little probability that they may be left out.

For each token the probability of each tile is known once the forward is done. From the least likely tile on, tiles are
left out while their probabilities add up to no more than the bound; so whatever the tiles that a kernel can skip (those
that none of its tokens needs), no token loses more than the bound. The tiles of the label and, where it is asked for,
of the likeliest token are never left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 4096
"""Tokens whose tiles are sorted at a time: sorting takes several times the memory of what is sorted."""


def drop_tiles(tile_lses: Tensor, lse: Tensor, labels: Tensor, tops: Tensor, tile_columns: int, bound: float) -> Tensor:
    """Which tiles a token needs, (N, tiles) bool, from each tile's log-sum-exp (N, tiles) and the whole one's (N, 1).

    labels (N,) and tops (N,), or none, are columns here, or negative: their tiles are kept. Where ranks share a
    vocabulary, each leaves out no more than its part of the bound: the share of the probability that its columns hold.
    """
    needed = torch.empty(tile_lses.shape, dtype=torch.bool, device=tile_lses.device)
    for start in range(0, len(tile_lses), ROWS):
        rows = slice(start, start + ROWS)
        masses = (tile_lses[rows] - lse[rows]).exp()
        least_first, order = masses.sort(dim=1)
        dropped = least_first.cumsum(1) <= bound * masses.sum(1, keepdim=True)
        needed[rows] = torch.ones_like(dropped).scatter_(1, order, ~dropped)
    for columns in (labels, tops) if len(tops) else (labels,):
        tile = (columns.clamp(min=0) // tile_columns).long()[:, None]
        needed.scatter_(1, tile, needed.gather(1, tile) | (columns >= 0)[:, None])
    return needed


def kept_tiles(needed: Tensor, tile_tokens: int) -> Tensor:
    """(token tiles, column tiles) int8: 1 where any of a tile's tokens needs it."""
    tokens, tiles = needed.shape
    padding = needed.new_zeros(-tokens % tile_tokens, tiles)
    return torch.cat([needed, padding]).view(-1, tile_tokens, tiles).any(1).to(torch.int8)
