"""Starts the kernels on tensors: tile sizes, descriptors, grids, and which of the terms are compiled in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from ..choice import capability
from ..types import Terms
from . import device
from .tilings import FEW_TOKENS, ProblemClass, Tiling, choose

ALIGNMENT_BYTES = 16
"""Of a tensor descriptor's base and rows."""


def interpreted() -> bool:
    """Whether Triton runs the kernels in its interpreter, on the CPU: decided when they were imported, by
    TRITON_INTERPRET=1."""
    return not isinstance(device.facts_kernel, triton.JITFunction)


@dataclass(frozen=True)
class Head:
    """What the logits come from: hidden (N, D) and weight (columns, D) of one dtype, bias (columns,) or None, class
    weights (columns,) fp32 or None, labels (N,) int32 as the kernels take them."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    class_weights: Tensor | None
    labels: Tensor
    terms: Terms

    def of(self, hidden: Tensor, labels: Tensor) -> Head:
        """The same head over other tokens."""
        return replace(self, hidden=hidden, labels=labels)

    def tiling(self, kernel: str, *, rich: bool, tokens: int | None = None) -> Tiling:
        """The sizes of tiles for a kernel; `rich`: with terms that take more registers."""
        describable = all(describes(matrix) for matrix in (self.hidden, self.weight))
        count = len(self.hidden) if tokens is None else tokens
        major, minor = (0, 0) if interpreted() else capability(self.hidden.device)
        problem = ProblemClass(kernel, 10 * major + minor, self.hidden.element_size(), rich, count < FEW_TOKENS)
        return choose(problem, describable=describable)


def describes(matrix: Tensor) -> bool:
    """Whether a tensor descriptor can stand for a matrix."""
    size = matrix.element_size()
    return (
        matrix.stride(1) == 1
        and matrix.data_ptr() % ALIGNMENT_BYTES == 0
        and matrix.stride(0) * size % ALIGNMENT_BYTES == 0
        and matrix.stride(0) >= matrix.shape[1]
    )


@lru_cache
def _multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count if torch.cuda.is_available() else 2


def _descriptor(matrix: Tensor, rows: int, columns: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def _shared_options(head: Head, tiling: Tiling) -> dict[str, Any]:
    terms, upcast = head.terms, interpreted() and head.hidden.dtype != torch.float32
    scale = 1.0 / terms.temperature
    return {
        "bias": head.bias,
        "class_weights": head.class_weights,
        "labels": head.labels,
        "tokens": len(head.hidden),
        "columns": len(head.weight),
        "width": head.hidden.shape[1],
        "hidden_stride": head.hidden.stride(0),
        "weight_stride": head.weight.stride(0),
        "softcap": 1.0 if terms.softcap is None else float(terms.softcap),
        "scale": scale,
        "power": terms.tau - 1.0,
        "BLOCK_N": tiling.tokens,
        "BLOCK_V": tiling.columns,
        "BLOCK_D": tiling.width,
        "DESCRIPTORS": tiling.descriptors,
        "EVEN": head.hidden.shape[1] % tiling.width == 0,
        "HAS_BIAS": head.bias is not None,
        "HAS_CLASSES": head.class_weights is not None,
        "SOFTCAP": terms.softcap is not None,
        "SCALED": scale != 1.0,
        "UPCAST": upcast,  # the interpreter's product of bf16 is wrong
        "PRECISION": "ieee",
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
    }


def _matrices(head: Head, tiling: Tiling) -> dict[str, Any]:
    if not tiling.descriptors:
        return {"hidden": head.hidden, "weight": head.weight}
    return {
        "hidden": _descriptor(head.hidden, tiling.tokens, tiling.width),
        "weight": _descriptor(head.weight, tiling.columns, tiling.width),
    }


def smoothing_mode(terms: Terms) -> int:
    """The kernels' SMOOTHING."""
    if not terms.label_smoothing:
        return 0
    return int(device.OF_LOGITS if terms.tau == 1.0 else device.OF_POWERS)


def run_facts(
    head: Head, tiling: Tiling, *, entropy: bool, top: bool, tile_lses: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The facts (6, splits, N), tops (splits, N), and each tile's log-sum-exp (N, tiles): see facts_kernel."""
    tokens, columns = len(head.hidden), len(head.weight)
    token_tiles, column_tiles = -(-tokens // tiling.tokens), -(-columns // tiling.columns)
    programs = _multiprocessors(head.hidden.device.index) * tiling.programs
    tiles_a_split = _tiles_a_split(token_tiles, column_tiles, programs)
    splits = -(-column_tiles // tiles_a_split)
    facts = head.hidden.new_zeros((6, splits, tokens), dtype=torch.float32)
    tops = head.hidden.new_zeros((splits, tokens if top else 0), dtype=torch.int32)
    lses = head.hidden.new_full((tokens, column_tiles), float("-inf"), dtype=torch.float32) if tile_lses else None
    with torch.cuda.device_of(head.hidden):  # Triton launches on the current device
        device.facts_kernel[(min(token_tiles * splits, programs),)](
            **_matrices(head, tiling),
            **_shared_options(head, tiling),
            facts=facts,
            tops=tops,
            tile_lses=lses,
            tiles_a_split=tiles_a_split,
            SMOOTHING=smoothing_mode(head.terms),
            ENTROPY=entropy,
            TOP=top,
            TILE_LSES=tile_lses,
        )
    return facts, tops, lses


def _tiles_a_split(token_tiles: int, column_tiles: int, programs: int) -> int:
    """Into as few ranges of columns as fill the device: the one whose last round leaves the least idle."""
    best, least = column_tiles, float("inf")
    most = min(column_tiles, max(8, -(-2 * programs // token_tiles)))
    for splits in range(1, most + 1):
        tiles = -(-column_tiles // splits)
        rounds = -(-token_tiles * -(-column_tiles // tiles) // programs)
        work = rounds * tiles
        if work < 0.98 * least:  # more splits are more facts to put together: only for a gain
            best, least = tiles, work
    return best


def run_gradient(
    head: Head,
    tiling: Tiling,
    strip: range,
    coefficients: Tensor,
    tops: Tensor | None,
    kept: Tensor | None,
    out: Tensor,
    bias_sums: Tensor | None,
    *,
    entropy: bool,
) -> None:
    """Writes the derivative by the logits of the columns in `strip` to `out` (N, strip): see gradient_kernel."""
    programs = _multiprocessors(head.hidden.device.index) * tiling.programs
    items = -(-len(head.hidden) // tiling.tokens) * -(-len(strip) // tiling.columns)
    with torch.cuda.device_of(head.hidden):  # Triton launches on the current device
        device.gradient_kernel[(min(items, programs),)](
            **_matrices(head, tiling),
            **_shared_options(head, tiling),
            coefficients=coefficients,
            tops=tops,
            kept=kept,
            gradient=out,
            bias_sums=bias_sums,
            start_strip=strip.start,
            end_strip=strip.stop,
            gradient_stride=out.stride(0),
            SMOOTHING=smoothing_mode(head.terms),
            ENTROPY=entropy,
            TOP=tops is not None,
            FILTERED=kept is not None,
            BIAS_SUMS=bias_sums is not None,
        )


def run_sparse_product(
    left: Tensor, right: Tensor, kept: Tensor, tile: tuple[int, int], out: Tensor, *, add: bool
) -> None:
    """out (rows, width) fp32 [+]= left (rows, inner) · right (inner, width), but for the tiles of `left` that are 0 in
    `kept` (row tiles, inner tiles) int8: `tile` are their sizes."""
    rows, inner = left.shape
    width = right.shape[1]
    whole = left.dtype == torch.float32  # whose products take registers
    block_width = min(64 if whole else 128, max(16, triton.next_power_of_2(width)))
    grid = (-(-rows // tile[0]) * -(-width // block_width),)
    with torch.cuda.device_of(left):
        device.sparse_product_kernel[grid](
            left,
            right,
            out,
            kept,
            rows,
            inner,
            width,
            left.stride(0),
            left.stride(1),
            right.stride(0),
            out.stride(0),
            kept.stride(0),
            kept.stride(1),
            ADD=add,
            BLOCK_R=tile[0],
            BLOCK_I=tile[1],
            BLOCK_K=min(16 if whole else 64, tile[1]),
            BLOCK_D=block_width,
            UPCAST=interpreted() and left.dtype != torch.float32,
            PRECISION="ieee",
            num_warps=8 if tile[0] * block_width >= 128 * 128 else 4,
            num_stages=3,
        )
