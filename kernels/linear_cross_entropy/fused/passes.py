"""The two passes: a forward that keeps a few numbers a token, and a backward that computes the logits again, block by
block, and multiplies each block's gradient out at once.

Where gradients accumulate: a block is a chunk of tokens by a strip of columns. Within a block the products sum over its
columns (for hidden) and over its tokens (for weight), in fp32; sums over blocks are added up in fp32 in global memory,
in the order of the blocks: hidden's for one chunk at a time, which is then rounded into its place. Nothing is added up
in 16 bits, and nothing in an order that may change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..chunk import ChunkStatistics, ClassWeights, softmax_of_nothing
from ..gradient import Upstream, weigh
from ..sweep import Problem, Swept, Wanted
from ..vocab_parallel import combine, gather, own_columns, start_hidden_gradient
from . import device
from .facts import kernel_coefficients, merge_splits, pack, unpack
from .filtering import drop_tiles, kept_tiles
from .launch import Head, run_facts, run_gradient, run_sparse_product
from .plan import plan_blocks
from .products import accumulate
from .tilings import Tiling

LEAST_CHUNKS, LEAST_CHUNKS_OF_RANKS = 2, 4
"""Half of hidden's gradient in fp32, and all of it in 16 bits, take no more than all of it in fp32. Where ranks share
the vocabulary each chunk's gradient travels while the next one's is computed."""


@dataclass(frozen=True)
class Kept:
    """What the forward leaves for the backward: see facts.pack; and with a filter

    needed  (N, column tiles) bool: the tiles that a token's gradient cannot do without; without a filter no elements
    share   0-dim fp32: of the tiles (of as many tokens as a kernel's), those that any token needs
    """

    planes: Tensor
    tops: Tensor
    needed: Tensor
    share: Tensor


def forward_pass(problem: Problem, outputs: Sequence[str], filter_bound: float | None) -> tuple[Swept, Kept]:
    """Losses and outputs of all tokens, and what the backward needs.

    2 NVD. Memory beyond the results: O(N), the whole hidden under sequence parallelism, and with a filter 5 bytes for
    each token and tile of columns.
    """
    hidden, shard, terms = problem.hidden, problem.shard, problem.terms
    if shard.ranks > 1 and shard.sequence_parallel:
        hidden = gather(hidden, shard)
    ignored = problem.targets == terms.ignore_index
    entropy, top = "entropy" in outputs, "correct" in outputs or "max_prob" in outputs
    labels, mine = _labels(problem, ignored)
    head = _head(problem, hidden, labels)
    needed_by: Tiling | None = None
    lses: Tensor | None = None
    if shard.columns and len(hidden):
        if filter_bound:  # both passes must have the same tiles
            needed_by = _gradient_tiling(head, len(hidden), entropy=entropy, top=top, filtered=True)
        rich = is_rich(head, entropy=entropy, top=top)
        tiling = needed_by or head.tiling("facts", rich=rich)
        facts, tops, lses = run_facts(head, tiling, entropy=entropy, top=top, tile_lses=needed_by is not None)
        softmax = merge_splits(facts, tops, labels, ignored, terms, entropy=entropy)
    else:
        names = [name for name, there in (("entropy", entropy), ("correct", top)) if there]
        softmax = softmax_of_nothing(hidden.new_zeros(len(hidden), 0, dtype=torch.float32), terms, names)
    if mine is not None:
        softmax, _ = combine(softmax, mine[:, None], shard, terms)
    chunk = ChunkStatistics(softmax, terms, _classes(problem, ignored))

    def by_token(values: Tensor) -> Tensor:
        return values.squeeze(1).masked_fill(ignored, 0)

    swept = Swept(by_token(chunk.losses()), {name: by_token(chunk.output(name)) for name in outputs})
    planes, tops = pack(softmax)
    needed, share = planes.new_zeros(0, dtype=torch.bool), planes.new_ones(())
    if needed_by is not None and lses is not None:
        assert filter_bound is not None
        needed = drop_tiles(lses, chunk.lse, labels, needed_by.columns, filter_bound)
        needed &= ~ignored[:, None]
        share = kept_tiles(needed, needed_by.tokens).float().mean()
    return swept, Kept(planes, tops, needed, share)


def backward_pass(
    problem: Problem,
    kept: Kept,
    upstream: Upstream,
    wanted: Wanted,
    weight_dtype: torch.dtype,
    filter_weight: bool,
    outputs: Sequence[str],
) -> list[Tensor | None]:
    """Gradients of hidden (in its dtype), weight (`weight_dtype`, or fp32) and bias (fp32) of Σ upstream · (losses and
    outputs); upstream (N,) each, `outputs` those of the forward.

    2 NVD for the logits, and 2 more for each of hidden's and weight's gradients. Memory beyond the results: a block
    (plan.py); a chunk of hidden's gradient in fp32 where it is to be rounded, and a strip of weight's likewise; where
    ranks share the vocabulary a second chunk, and under sequence parallelism chunks are those of all ranks' tokens.
    """
    ignored = problem.targets == problem.terms.ignore_index
    whole = unpack(kept.planes, problem.terms, entropy="entropy" in outputs)
    chunk = ChunkStatistics(whole, problem.terms, _classes(problem, ignored))
    given = (None if value is None else value.float().masked_fill(ignored, 0.0)[:, None] for value in upstream)
    coefficients = kernel_coefficients(chunk, weigh(chunk, Upstream(*given)), ignored)
    unit: Tensor | None = None
    if problem.hidden.dtype == torch.float16 and len(problem.targets):
        coefficients, unit = _into_range(coefficients)
    labels, _ = _labels(problem, ignored)
    head = _head(problem, problem.hidden, labels)
    tops = kept.tops if upstream.max_prob is not None else None
    blocks = _Blocks(problem, head, kept, coefficients, tops, unit, wanted, weight_dtype, filter_weight, outputs)
    return blocks.gradients(entropy=upstream.entropy is not None)


class _Blocks:
    """The gradients of one backward, block by block."""

    def __init__(
        self,
        problem: Problem,
        head: Head,
        kept: Kept,
        coefficients: Tensor,
        tops: Tensor | None,
        unit: Tensor | None,
        wanted: Wanted,
        weight_dtype: torch.dtype,
        filter_weight: bool,
        outputs: Sequence[str],
    ) -> None:
        self.problem, self.head, self.coefficients, self.tops, self.unit = problem, head, coefficients, tops, unit
        self.needed = kept.needed if kept.needed.numel() else None
        self.filter_weight = filter_weight
        self.shard = problem.shard
        tokens, (rows, width) = len(problem.targets), problem.weight.shape
        top = "correct" in outputs or "max_prob" in outputs
        filtered = self.needed is not None
        self.tiling = _gradient_tiling(head, tokens, entropy="entropy" in outputs, top=top, filtered=filtered)
        if self.needed is not None:
            assert self.needed.shape[1] == -(-self.shard.columns // self.tiling.columns), "the forward had other tiles"
        # A 16-bit gradient of weight that is complete at once needs no whole one in fp32.
        rounded_at_once = weight_dtype != torch.float32 and unit is None and not (filtered and filter_weight)
        one_chunk = wanted.weight and rounded_at_once and self.shard.ranks == 1
        parts = LEAST_CHUNKS_OF_RANKS if self.shard.ranks > 1 else 1 if one_chunk else LEAST_CHUNKS
        # By the rank with most columns: all ranks must have the same chunks, or their collectives would not meet.
        most, size = max(self.shard.most_columns, 1), problem.hidden.element_size()
        self.plan = plan_blocks(tokens, most, width, size, parts=parts, one_chunk=one_chunk)
        new = problem.hidden.new_zeros
        self.hidden_grad = torch.empty_like(problem.hidden) if wanted.hidden else None
        self.weight_grad: Tensor | None = None
        if wanted.weight:
            rounded_at_once &= tokens <= self.plan.chunk
            self.weight_grad = new((rows, width), dtype=weight_dtype if rounded_at_once else torch.float32)
        self.bias_grad = new(rows, dtype=torch.float32) if wanted.bias else None

    def gradients(self, *, entropy: bool) -> list[Tensor | None]:
        """Of hidden, weight and bias."""
        travelling: tuple[Any, Tensor, Tensor, slice] | None = None
        for number, rows in enumerate(self._chunks()):
            head = self._chunk(rows)
            partial: Tensor | None = None
            if self.hidden_grad is not None:
                partial = head.hidden.new_zeros(head.hidden.shape, dtype=torch.float32)
            self._multiply(head, rows, partial, first=number == 0, entropy=entropy)
            if travelling is not None:
                self._arrive(*travelling)
                travelling = None
            if partial is not None and self.shard.ranks > 1:
                own = partial
                if self.shard.sequence_parallel:
                    own = partial.new_empty(rows.stop - rows.start, partial.shape[1])
                travelling = start_hidden_gradient(partial, own, self.shard), partial, own, rows
            elif partial is not None:
                self._put(partial, rows)
        if travelling is not None:
            self._arrive(*travelling)
        if self.unit is not None:
            for gradient in (self.weight_grad, self.bias_grad):
                if gradient is not None:
                    gradient.div_(self.unit)
        return [self.hidden_grad, self.weight_grad, self.bias_grad]

    def _arrive(self, work: Any, partial: Tensor, own: Tensor, rows: slice) -> None:
        """A chunk's gradient, complete; `partial` was needed until then."""
        work.wait()
        self._put(own, rows)

    def _put(self, gradient: Tensor, rows: slice) -> None:
        """A chunk's rows of hidden's gradient, rounded into their place."""
        assert self.hidden_grad is not None
        self.hidden_grad[rows] = gradient if self.unit is None else gradient.div_(self.unit)

    def _chunks(self) -> Iterator[slice]:
        """Of each rank's own tokens; without sequence parallelism, of all."""
        count = len(self.problem.hidden)
        sharing = self.shard.ranks if self.shard.sequence_parallel else 1
        length = max(self.plan.chunk // sharing, 1)
        return (slice(start, min(start + length, count)) for start in range(0, count, length))

    def _take(self, values: Tensor, rows: slice) -> Tensor:
        """Of values (..., N) of all tokens those of a chunk."""
        sharing = self.shard.ranks if self.shard.sequence_parallel else 1
        by_rank = values.unflatten(-1, (sharing, -1))[..., rows]
        return by_rank.flatten(-2).contiguous()

    def _chunk(self, rows: slice) -> Head:
        """The head over a chunk's tokens."""
        hidden = self.head.hidden[rows]
        if self.shard.ranks > 1 and self.shard.sequence_parallel:
            hidden = gather(hidden, self.shard)
        return self.head.of(hidden, self._take(self.head.labels, rows))

    def _multiply(self, head: Head, rows: slice, hidden_grad: Tensor | None, *, first: bool, entropy: bool) -> None:
        """A chunk's tokens with all columns, strip by strip."""
        columns, tokens, step = self.shard.columns, len(head.hidden), self.plan.strip
        coefficients = self._take(self.coefficients, rows)
        tops = None if self.tops is None else self._take(self.tops, rows)
        kept: Tensor | None = None
        if self.needed is not None:
            kept = kept_tiles(self._take(self.needed.t(), rows).t(), self.tiling.tokens)
        padded = -(-min(step, columns) // 8) * 8  # rows of the workspace begin at 16 bytes
        workspace = head.hidden.new_empty(tokens, padded)
        token_tiles = -(-tokens // self.tiling.tokens)
        for start in range(0, columns, step):
            strip = range(start, min(start + step, columns))
            here = slice(strip.start, strip.stop)
            gradient = workspace[:, : len(strip)]
            bias_sums: Tensor | None = None
            if self.bias_grad is not None:
                bias_sums = self.bias_grad.new_zeros(token_tiles, len(strip))
            tiles: Tensor | None = None
            if kept is not None:
                first_tile, count = start // self.tiling.columns, -(-len(strip) // self.tiling.columns)
                tiles = kept[:, first_tile : first_tile + count]
            run_gradient(
                head, self.tiling, strip, coefficients, tops, kept if self.filter_weight else None, gradient, bias_sums,
                entropy=entropy,
            )  # fmt: skip
            if self.bias_grad is not None and bias_sums is not None:
                self.bias_grad[here] += bias_sums.sum(0)
            if hidden_grad is not None:
                matrix = head.weight[here]
                if tiles is None:
                    accumulate(hidden_grad, gradient, matrix, add=start > 0)
                else:
                    sizes = self.tiling.tokens, self.tiling.columns
                    run_sparse_product(gradient, matrix, tiles, sizes, hidden_grad, add=start > 0)
            if self.weight_grad is not None:
                self._add_to_weight(gradient.t(), head.hidden, tiles, self.weight_grad[here], first=first)

    def _add_to_weight(self, left: Tensor, hidden: Tensor, tiles: Tensor | None, out: Tensor, *, first: bool) -> None:
        """A strip's rows of weight's gradient."""
        if tiles is not None and self.filter_weight:
            run_sparse_product(left, hidden, tiles.t(), (self.tiling.columns, self.tiling.tokens), out, add=not first)
        elif out.dtype == torch.float32:
            accumulate(out, left, hidden, add=not first)
        else:
            whole = torch.empty_like(out, dtype=torch.float32)
            accumulate(whole, left, hidden, add=False)
            out.copy_(whole)


def _labels(problem: Problem, ignored: Tensor) -> tuple[Tensor, Tensor | None]:
    """The targets (N,) as the kernels take them, and where ranks share the vocabulary, which are this rank's."""
    columns, mine = problem.targets, None
    if problem.shard.ranks > 1:
        columns, mine = own_columns(problem.targets, problem.shard)
        columns = columns.masked_fill(~mine, int(device.NOT_HERE))
    return columns.masked_fill(ignored, int(device.IGNORED)).int(), mine


def _head(problem: Problem, hidden: Tensor, labels: Tensor) -> Head:
    """Matrices whose rows lie side by side, without padding rows."""
    shard = problem.shard
    classes = None if problem.class_weights is None else problem.class_weights.float()
    return Head(
        # Under sequence parallelism what is gathered of it lies without gaps: so must it, to have the same tiling.
        hidden=hidden.contiguous() if shard.sequence_parallel else _rows_side_by_side(hidden),
        weight=_rows_side_by_side(problem.weight[: shard.columns]),
        bias=None if problem.bias is None else problem.bias[: shard.columns].contiguous(),
        class_weights=None if classes is None else classes[shard.start : shard.start + shard.columns].contiguous(),
        labels=labels,
        terms=problem.terms,
    )


def _rows_side_by_side(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _classes(problem: Problem, ignored: Tensor) -> ClassWeights | None:
    if problem.class_weights is None:
        return None
    weights, shard = problem.class_weights.float(), problem.shard
    labels = weights[problem.targets.masked_fill(ignored, 0)][:, None]
    return ClassWeights(weights[shard.start : shard.start + shard.columns], weights.sum(), labels)


def is_rich(head: Head, *, entropy: bool, top: bool) -> bool:
    terms = head.terms
    return entropy or top or head.class_weights is not None or bool(terms.label_smoothing) or terms.softcap is not None


def _gradient_tiling(head: Head, tokens: int, *, entropy: bool, top: bool, filtered: bool) -> Tiling:
    """The same from the forward, where a filter counts tiles, and in the backward: of what both know."""
    return head.tiling("gradient", rich=is_rich(head, entropy=entropy, top=top) or filtered, tokens=tokens)


def _into_range(coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients times a power of two that brings the largest to 2¹⁰, and that power: fp16 keeps three digits only
    from 6e-5 on."""
    scaled = [1, 2, 4, 5, 6]
    largest = coefficients[scaled].abs().amax().clamp(min=1e-30)
    unit = torch.exp2(10.0 - largest.log2().ceil())
    coefficients = coefficients.clone()
    coefficients[scaled] *= unit
    return coefficients, unit
