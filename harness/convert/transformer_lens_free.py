"""A model without norms as a HookedTransformer of normalization_type None.

That has no final norm, and no place for the affine map that is left of ours: it is folded into W_U and b_U,
    logits = head ((x - mean) w + b) = x W_U + b_U,   W_U = C diag(w) head',   b_U = head b
with C = I - 11'/H where the norm was a LayerNorm. What they were made of cannot be had from them, so it lies in the
same file under names of its own, which load_state_dict(strict=False) passes over, and is what reading the folder gives
back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from harness.checkpoint import Box, TensorFile
from harness.config import HarnessError
from harness.model import ModelSection
from harness.parallel import Fragment

from .rules import Row
from .source import ModelSource

W_U, B_U = "unembed.W_U", "unembed.b_U"
_KEPT = ("final_norm.weight", "final_norm.bias", "head.weight")
_ELEMENTS = 2 << 20


def free_rows(rows: Sequence[Row]) -> list[Row]:
    """A table of names for a model without norms."""
    return [Row(row.ours, f"harness.{row.ours}") if row.ours in _KEPT else row for row in rows]


def unembed_shapes(section: ModelSection) -> dict[str, tuple[int, ...]]:
    """Of W_U and b_U."""
    assert section.vocab_size is not None
    return {W_U: (section.hidden_size, section.vocab_size), B_U: (section.vocab_size,)}


def make_unembed(source: ModelSource, name: str, dtype: torch.dtype) -> Tensor:
    """W_U or b_U of a norm-free source, folded in float64 and rounded once. Raises HarnessError where its dtype does
    not hold it."""
    made = torch.empty(unembed_shapes(source.section)[name], dtype=dtype)
    for rows, matrix, bias, _ in _folded(source):
        made[..., rows] = (matrix.mT if name == W_U else bias).to(dtype)
    if not made.isfinite().all():
        raise HarnessError(f"{source.path}: tensor {name}: not all of it are finite numbers; choose another --dtype")
    return made


def check_unembed(source: ModelSource, file: TensorFile, dtype: torch.dtype) -> str | None:
    """Which of W_U and b_U in a file is not made of the source's weights, but for their rounding; None: neither."""
    hidden = source.section.hidden_size
    for rows, matrix, bias, terms in _folded(source):
        size = rows.stop - rows.start
        for name, wanted, scale, box in (
            (W_U, matrix.mT, matrix.abs().max(), Box((0, rows.start), (hidden, size))),
            (B_U, bias, terms, Box((rows.start,), (size,))),
        ):
            entry = file.entries.get(name)
            if entry is None or entry.shape != unembed_shapes(source.section)[name]:
                return name
            found = torch.empty(box.shape)
            file.read(name, [(box, found)])
            if not bool(((found - wanted).abs() <= 8 * torch.finfo(dtype).eps * scale).all()):
                return name
    return None


def _folded(source: ModelSource) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Tokens, their rows of W_U' (tokens, hidden), their b_U (tokens,) and the size of its terms (tokens,); float64."""
    section = source.section
    assert section.vocab_size is not None
    hidden, name = section.hidden_size, "token_embedding.weight" if section.tied_head else "head.weight"
    gain, offset = torch.empty(hidden), torch.zeros(hidden)
    vectors = {"final_norm.weight": gain} | ({"final_norm.bias": offset} if section.norm == "layernorm" else {})
    source.read([Fragment.whole(vector, "master", values) for vector, values in vectors.items()])
    step = max(_ELEMENTS // hidden, 1)
    for start in range(0, section.vocab_size, step):
        rows = slice(start, min(start + step, section.vocab_size))
        head = torch.empty(rows.stop - start, hidden)
        source.read([Fragment(name, "master", (section.vocab_size, hidden), (start, 0), head)])
        matrix = head.double() * gain.double()
        if section.norm == "layernorm":
            matrix -= matrix.mean(-1, keepdim=True)
        terms = head.double() * offset.double()
        yield rows, matrix, terms.sum(-1), terms.abs().sum(-1)
