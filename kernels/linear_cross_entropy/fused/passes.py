"""The two passes: a forward that keeps a few numbers a token, and a backward that computes the logits again, block by
block, and multiplies each block's gradient out at once.

Where gradients accumulate: a block is a chunk of tokens by a strip of columns. Within a block the products sum over its
columns (for hidden) and over its tokens (for weight), in fp32; sums over blocks are added up in fp32 in global memory,
in the order of the blocks: chunk by chunk, so that hidden's gradient exists in fp32 for one chunk alone, or where
weight's is to be rounded strip by strip, so that weight's exists in fp32 for one strip alone. Nothing is added up in 16
bits, and nothing in an order that may change.
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
    classes = _classes(problem, ignored)
    head = _head(problem, hidden, labels, classes)
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
    chunk = ChunkStatistics(softmax, terms, classes)

    def by_token(values: Tensor) -> Tensor:
        return values.squeeze(1).masked_fill(ignored, 0)

    swept = Swept(by_token(chunk.losses()), {name: by_token(chunk.output(name)) for name in outputs})
    planes, tops = pack(softmax)
    needed, share = planes.new_zeros(0, dtype=torch.bool), planes.new_ones(())
    if needed_by is not None and lses is not None:
        assert filter_bound is not None
        needed = drop_tiles(lses, chunk.lse, labels, tops, needed_by.columns, filter_bound)
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
    (plan.py) and a chunk of hidden's gradient in fp32, where it is to be rounded; where weight's is, all of hidden's
    and a strip of weight's. Where ranks share the vocabulary a second chunk and, for a gradient of weight that is to be
    rounded, the whole in fp32; under sequence parallelism chunks are those of all ranks' tokens.
    """
    ignored = problem.targets == problem.terms.ignore_index
    whole = unpack(kept.planes, problem.terms, entropy="entropy" in outputs)
    classes = _classes(problem, ignored)
    chunk = ChunkStatistics(whole, problem.terms, classes)
    given = (None if value is None else value.float().masked_fill(ignored, 0.0)[:, None] for value in upstream)
    coefficients = kernel_coefficients(chunk, weigh(chunk, Upstream(*given)), ignored)
    unit: Tensor | None = None
    if problem.hidden.dtype == torch.float16 and len(problem.targets):
        coefficients, unit = _into_range(coefficients, _most_smoothing(chunk))
    labels, _ = _labels(problem, ignored)
    head = _head(problem, problem.hidden, labels, classes)
    tops = kept.tops if upstream.max_prob is not None else None
    blocks = _Blocks(problem, head, kept, coefficients, tops, unit, wanted, weight_dtype, filter_weight, outputs)
    return blocks.gradients(entropy=upstream.entropy is not None)


@dataclass(frozen=True)
class _Chunk:
    """What the kernels take of some tokens; kept (token tiles, column tiles) int8 with a filter."""

    head: Head
    coefficients: Tensor
    tops: Tensor | None
    kept: Tensor | None


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
        parts = LEAST_CHUNKS_OF_RANKS if self.shard.ranks > 1 else LEAST_CHUNKS
        # By the rank with most columns: all ranks must have the same chunks, or their collectives would not meet.
        most, size = max(self.shard.most_columns, 1), problem.hidden.element_size()
        self.plan = plan_blocks(tokens, most, width, size, parts=parts)
        # Every element is written but those of no tokens, or of no columns.
        whole = tokens > 0 and self.shard.columns > 0
        self._new = problem.hidden.new_empty if whole else problem.hidden.new_zeros
        self.hidden_grad = self._new(problem.hidden.shape) if wanted.hidden else None
        # A strip of weight's gradient that is complete at once is rounded at once; then no whole one in fp32 exists.
        self.by_strips = wanted.weight and weight_dtype != torch.float32 and self.shard.ranks == 1
        self.weight_grad: Tensor | None = None
        if wanted.weight:
            self.weight_grad = self._new((rows, width), dtype=weight_dtype if self.by_strips else torch.float32)
            self.weight_grad[self.shard.columns :] = 0.0
        self.bias_grad = problem.hidden.new_zeros(rows, dtype=torch.float32) if wanted.bias else None

    def gradients(self, *, entropy: bool) -> list[Tensor | None]:
        """Of hidden, weight and bias."""
        if self.by_strips:
            self._go_by_strips(entropy)
        else:
            self._go_by_chunks(entropy)
        for gradient in (None if self.by_strips else self.weight_grad, self.bias_grad):
            if self.unit is not None and gradient is not None:
                gradient.div_(self.unit)
        return [self.hidden_grad, self.weight_grad, self.bias_grad]

    def _go_by_strips(self, entropy: bool) -> None:
        """All chunks of a strip, then the next strip: hidden's gradient is whole in fp32, weight's a strip."""
        assert self.weight_grad is not None
        chunks = [(rows, self._chunk(rows)) for rows in self._chunks()]
        hidden_grad = self._sums(slice(0, len(self.problem.hidden)), self.problem.hidden)
        for strip in self._strips():
            weight_rows = self.weight_grad[strip.start : strip.stop]
            sums = self._new(weight_rows.shape, dtype=torch.float32)
            for number, (rows, chunk) in enumerate(chunks):
                part = None if hidden_grad is None else hidden_grad[rows]
                self._multiply(chunk, strip, part, sums, first=number == 0, entropy=entropy)
            weight_rows.copy_(sums if self.unit is None else sums.div_(self.unit))
        if hidden_grad is not None:
            self._put(hidden_grad, slice(0, len(hidden_grad)))

    def _go_by_chunks(self, entropy: bool) -> None:
        """All strips of a chunk, then the next chunk: weight's gradient is whole in fp32, hidden's a chunk."""
        travelling: tuple[Any, Tensor, Tensor, slice] | None = None
        for number, rows in enumerate(self._chunks()):
            chunk = self._chunk(rows)
            partial = self._sums(rows, chunk.head.hidden)
            for strip in self._strips():
                sums = None if self.weight_grad is None else self.weight_grad[strip.start : strip.stop]
                self._multiply(chunk, strip, partial, sums, first=number == 0, entropy=entropy)
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

    def _sums(self, rows: slice, hidden: Tensor) -> Tensor | None:
        """Where hidden's gradient is added up: in its own place if that is fp32 and has all that comes here."""
        if self.hidden_grad is None:
            return None
        if self.hidden_grad.dtype == torch.float32 and not self.shard.sequence_parallel:
            return self.hidden_grad[rows]
        return self._new(hidden.shape, dtype=torch.float32)

    def _arrive(self, work: Any, partial: Tensor, own: Tensor, rows: slice) -> None:
        """A chunk's gradient, complete; `partial` was needed until then."""
        work.wait()
        self._put(own, rows)

    def _put(self, gradient: Tensor, rows: slice) -> None:
        """A chunk's rows of hidden's gradient, rounded into their place."""
        assert self.hidden_grad is not None
        if gradient.data_ptr() != self.hidden_grad[rows].data_ptr():
            self.hidden_grad[rows] = gradient if self.unit is None else gradient.div_(self.unit)

    def _strips(self) -> list[range]:
        """Of this rank's columns."""
        columns, step = self.shard.columns, self.plan.strip
        return [range(start, min(start + step, columns)) for start in range(0, columns, step)]

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

    def _chunk(self, rows: slice) -> _Chunk:
        hidden = self.head.hidden[rows]
        if self.shard.ranks > 1 and self.shard.sequence_parallel:
            hidden = gather(hidden, self.shard)
        kept: Tensor | None = None
        if self.needed is not None:
            kept = kept_tiles(self._take(self.needed.t(), rows).t(), self.tiling.tokens)
        return _Chunk(
            head=self.head.of(hidden, self._take(self.head.labels, rows)),
            coefficients=self._take(self.coefficients, rows),
            tops=None if self.tops is None else self._take(self.tops, rows),
            kept=kept,
        )

    def _multiply(
        self,
        chunk: _Chunk,
        strip: range,
        hidden_grad: Tensor | None,
        weight_grad: Tensor | None,
        *,
        first: bool,
        entropy: bool,
    ) -> None:
        """One block: adds to a chunk's rows of hidden's gradient and, unless it is the `first` chunk, to a strip's rows
        of weight's, both fp32."""
        head, kept, here = chunk.head, chunk.kept, slice(strip.start, strip.stop)
        tokens, token_tiles = len(head.hidden), -(-len(head.hidden) // self.tiling.tokens)
        padded = -(-len(strip) // 8) * 8  # rows of the workspace begin at 16 bytes
        gradient = head.hidden.new_empty(tokens, padded)[:, : len(strip)]
        bias_sums = None if self.bias_grad is None else self.bias_grad.new_zeros(token_tiles, len(strip))
        tiles: Tensor | None = None
        if kept is not None:
            first_tile, count = strip.start // self.tiling.columns, -(-len(strip) // self.tiling.columns)
            tiles = kept[:, first_tile : first_tile + count]
        run_gradient(
            head, self.tiling, strip, chunk.coefficients, chunk.tops, kept if self.filter_weight else None, gradient,
            bias_sums, entropy=entropy,
        )  # fmt: skip
        if self.bias_grad is not None and bias_sums is not None:
            self.bias_grad[here] += bias_sums.sum(0)
        if hidden_grad is not None:
            matrix = head.weight[here]
            if tiles is None:
                accumulate(hidden_grad, gradient, matrix, add=strip.start > 0)
            else:
                sizes = self.tiling.tokens, self.tiling.columns
                run_sparse_product(gradient, matrix, tiles, sizes, hidden_grad, add=strip.start > 0)
        if weight_grad is not None and tiles is not None and self.filter_weight:
            sizes = self.tiling.columns, self.tiling.tokens
            run_sparse_product(gradient.t(), head.hidden, tiles.t(), sizes, weight_grad, add=not first)
        elif weight_grad is not None:
            accumulate(weight_grad, gradient.t(), head.hidden, add=not first)


def _labels(problem: Problem, ignored: Tensor) -> tuple[Tensor, Tensor | None]:
    """The targets (N,) as the kernels take them, and where ranks share the vocabulary, which are this rank's."""
    columns, mine = problem.targets, None
    if problem.shard.ranks > 1:
        columns, mine = own_columns(problem.targets, problem.shard)
        columns = columns.masked_fill(~mine, int(device.NOT_HERE))
    return columns.masked_fill(ignored, int(device.IGNORED)).int(), mine


def _head(problem: Problem, hidden: Tensor, labels: Tensor, classes: ClassWeights | None) -> Head:
    """Matrices whose rows lie side by side, without padding rows."""
    shard = problem.shard
    return Head(
        # Under sequence parallelism what is gathered of it lies without gaps: so must it, to have the same tiling.
        hidden=hidden.contiguous() if shard.sequence_parallel else _rows_side_by_side(hidden),
        weight=_rows_side_by_side(problem.weight[: shard.columns]),
        bias=None if problem.bias is None else problem.bias[: shard.columns].contiguous(),
        class_weights=None if classes is None else classes.columns.contiguous(),
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


def _most_smoothing(chunk: ChunkStatistics) -> Tensor | float:
    """No less than a token's largest w·P, (N,) or a number: see gradient.py."""
    if chunk.terms.tau != 1.0 and chunk.whole.smoothing is not None:
        return chunk.whole.smoothing.squeeze(1).nan_to_num()  # their sum
    return 1.0 if chunk.classes is None else chunk.classes.columns.abs().amax().clamp(min=1.0)


def _into_range(coefficients: Tensor, most_smoothing: Tensor | float) -> tuple[Tensor, Tensor]:
    """Coefficients times a power of two that brings what is made of the largest to 2¹⁰, and that power: fp16 keeps
    three digits only from 6e-5 on."""
    scaled = [1, 2, 4, 5, 6]
    sizes = coefficients.abs()
    sizes[5] *= most_smoothing
    largest = sizes[scaled].amax().clamp(min=1e-30)
    unit = torch.exp2(10.0 - largest.log2().ceil())
    coefficients = coefficients.clone()
    coefficients[scaled] *= unit
    return coefficients, unit
