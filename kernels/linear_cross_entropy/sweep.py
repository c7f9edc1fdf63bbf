"""One pass over the tokens in chunks: losses, outputs and, where asked for, gradients, in one buffer of logits.

What happens to a chunk's logits is in chunk.py, what ranks tell each other in vocab_parallel.py; here is which tokens
count, how many make a chunk, and where the gradients gather.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import host_sees
from .chunk import (
    Buffers,
    ChunkStatistics,
    ClassWeights,
    replace_by_softmax,
    write_logits,
)
from .gradient import Upstream, replace_by_gradient, weigh
from .types import Terms, VocabShard
from .vocab_parallel import combine, complete_hidden_gradient, gather, own_columns

# Each chunk reads the weight twice, and reads and rewrites its gradient, so short chunks are slow: at N 2048, V 50304,
# D 768 on two cores, forward and backward took 1.23 times the three bare products with 256 tokens a chunk, 1.06 with
# 512, 1.02 with 1024. The accelerator's figures are estimates of the same trade, not measured.
CPU_CHUNK_BYTES = 128 * 2**20
CPU_CHUNK_TOKENS = (512, 1024)
CPU_CHUNKS = 4
"""Beyond the bytes, chunks grow to the upper bound while there are as many: a quarter of the tokens takes a tenth of
the memory that plain torch takes for all logits and their gradient."""
ACCELERATOR_CHUNK_BYTES = 2**30
ACCELERATOR_CHUNK_TOKENS = (1024, 16384)


class Wanted(NamedTuple):
    """Which gradients are formed."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


@dataclass
class Problem:
    """The tensors of a call, and what they mean: hidden (N, D), of this rank's tokens; weight (rows, D), bias (rows,);
    targets (N,), after the shift; class_weights (vocab_size,)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    class_weights: Tensor | None
    targets: Tensor
    terms: Terms
    shard: VocabShard

    @property
    def dtype(self) -> torch.dtype:
        """That of the arithmetic."""
        return arithmetic_dtype(self.hidden, self.weight)


@dataclass
class Swept:
    """losses (N,), unreduced and without token weights, 0 where ignored; outputs (N,); gradients that were wanted.

    Gradients are those of Σ upstream · (losses and outputs), but for the factor 1/temperature, which the caller still
    owes. They have the shapes of their inputs and the dtype of the arithmetic, to be rounded once, at the end.
    """

    losses: Tensor
    outputs: dict[str, Tensor] = field(default_factory=dict)
    hidden_grad: Tensor | None = None
    weight_grad: Tensor | None = None
    bias_grad: Tensor | None = None


def arithmetic_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """float64 where either is float64, fp32 otherwise."""
    return torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32


def chunk_length(tokens: int, vocab_size: int, element_bytes: int, on_host: bool) -> int:
    """Tokens a chunk: as many as the bytes budget holds, within bounds, and all chunks about as long as each other."""
    budget_bytes = CPU_CHUNK_BYTES if on_host else ACCELERATOR_CHUNK_BYTES
    shortest, longest = CPU_CHUNK_TOKENS if on_host else ACCELERATOR_CHUNK_TOKENS
    if on_host:
        shortest = max(shortest, tokens // CPU_CHUNKS)
    most = min(max(budget_bytes // (vocab_size * element_bytes), shortest), longest)
    chunks = -(-tokens // most)
    return -(-tokens // max(chunks, 1))


class Tokens:
    """The tokens that count. On the CPU ignored ones are dropped before anything is computed.

    Elsewhere finding them would make the host wait for the device, so they stay, as zero vectors with target 0 and
    nothing from upstream, and what they give is blanked at the end.
    """

    def __init__(self, targets: Tensor, upstream: Upstream, ignore_index: int, dtype: torch.dtype) -> None:
        self.total = len(targets)
        self.index: Tensor | None = None
        self.ignored: Tensor | None = None
        ignored = targets == ignore_index
        upstream = Upstream(*(None if value is None else value.to(dtype) for value in upstream))
        if not host_sees(targets):
            self.ignored = ignored
            targets = targets.masked_fill(ignored, 0)
            # A factor for every row even where all are 1: the ignored ones need their 0.
            loss = torch.ones_like(targets, dtype=dtype) if upstream.loss is None else upstream.loss
            upstream = upstream._replace(loss=loss)
            upstream = Upstream(*(None if value is None else value.masked_fill(ignored, 0.0) for value in upstream))
        elif ignored.any():
            index = self.index = (~ignored).nonzero().squeeze(1)
            targets = targets[index]
            upstream = Upstream(*(None if value is None else value[index] for value in upstream))
        self.targets, self.upstream = targets, upstream

    def take(self, hidden: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """hidden of these tokens, (n, D), in `dtype`."""
        if self.index is not None:
            return hidden[self.index[rows]].to(dtype)
        chosen = hidden[rows].to(dtype)
        return chosen if self.ignored is None else chosen.masked_fill(self.ignored[rows, None], 0.0)

    def upstream_of(self, rows: slice) -> Upstream:
        """(n, 1) each."""
        return Upstream(*(None if value is None else value[rows, None] for value in self.upstream))

    def spread(self, values: Tensor) -> Tensor:
        """Values of the tokens that count, back at their places among all tokens, 0 at the ignored ones."""
        if self.index is not None:
            return values.new_zeros(self.total, *values.shape[1:]).index_copy_(0, self.index, values)
        return values if self.ignored is None else values.masked_fill(self.ignored, 0)


def sweep(problem: Problem, wanted: Wanted, upstream: Upstream, outputs: Sequence[str] = ()) -> Swept:
    """Everything about a problem in one pass.

    2 NVD, and 2 more for each of hidden's and weight's gradients, V being this rank's. Memory beyond the results: one
    chunk of logits (one more each for a softcap's slope, for the entropy, and for label smoothing with a tau), and an
    fp32 copy of a weight that is held in 16 bits. Where ranks share the vocabulary also the whole hidden under sequence
    parallelism, and hidden's gradient in the dtype of the arithmetic. Collectives: an all-gather a chunk, and one for
    each of these two.
    """
    hidden, weight, shard, terms, dtype = problem.hidden, problem.weight, problem.shard, problem.terms, problem.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        with torch.autocast(hidden.device.type, enabled=False):
            return sweep(problem, wanted, upstream, outputs)
    shared = shard.ranks > 1
    if shared and shard.sequence_parallel:
        hidden = gather(hidden, shard)
    tokens = Tokens(problem.targets, upstream, terms.ignore_index, dtype)
    label_columns, mine = own_columns(tokens.targets, shard) if shared else (tokens.targets, None)
    matrix = weight[: shard.columns].to(dtype)
    offsets = None if problem.bias is None else problem.bias[: shard.columns].to(dtype)
    class_weights = None if problem.class_weights is None else problem.class_weights.to(dtype)
    if class_weights is not None:
        own_classes = class_weights[shard.start : shard.start + shard.columns], class_weights.sum()
    names = {*outputs, *(name for name, value in upstream._asdict().items() if value is not None)}

    count = len(tokens.targets)
    # By the rank with most columns: all ranks must have the same chunks, or their collectives would not meet.
    length = chunk_length(count, shard.most_columns, dtype.itemsize, host_sees(hidden))
    buffers = Buffers(
        length,
        matrix,
        shard.columns,
        slope=terms.softcap is not None and any(wanted),
        powers=terms.tau != 1.0 and terms.label_smoothing > 0.0,
        scratch="entropy" in names,
    )
    gradients = Gradients(hidden, weight, shard.columns, wanted, dtype)
    results: dict[str, list[Tensor]] = {name: [] for name in ("losses", *outputs)}

    for start in range(0, count, max(length, 1)):
        rows = slice(start, min(start + length, count))
        chosen, labels = tokens.take(hidden, rows, dtype), label_columns[rows, None]
        classes = None
        if class_weights is not None:
            classes = ClassWeights(*own_classes, class_weights[tokens.targets[rows, None]])
        here = buffers.of(len(chosen))
        write_logits(chosen, matrix, offsets, terms, here)
        mine_here = None if mine is None else mine[rows, None]
        softmax, share = replace_by_softmax(here, labels, mine_here, terms, classes, names), None
        if mine_here is not None:
            softmax, share = combine(softmax, mine_here, shard, terms)
        chunk = ChunkStatistics(softmax, terms, classes, share, mine_here)
        results["losses"].append(chunk.losses())
        for name in outputs:
            results[name].append(chunk.output(name))
        if any(wanted):
            coefficients = weigh(chunk, tokens.upstream_of(rows))
            replace_by_gradient(here, labels, chunk, coefficients)
            gradients.add(here["logits"], chosen, matrix, coefficients.rows, rows, tokens)

    joined = {
        name: tokens.spread(torch.cat(parts).squeeze(1))
        if parts
        else hidden.new_zeros(tokens.total, dtype=torch.bool if name == "correct" else dtype)
        for name, parts in results.items()
    }
    hidden_grad, weight_grad, bias_grad = gradients.finish(any_rows=count > 0)
    if shared and hidden_grad is not None:
        # In the dtype of the arithmetic: with parts in bf16 the error of a bf16 gradient came out 1.4 times as large
        # over 2 ranks, 1.8 over 4, 2.3 over 8.
        hidden_grad = complete_hidden_gradient(hidden_grad, shard)
    return Swept(joined.pop("losses"), joined, hidden_grad, weight_grad, bias_grad)


class Gradients:
    """The gradients that are wanted, gathered chunk by chunk in the dtype of the arithmetic."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        columns: int,
        wanted: Wanted,
        dtype: torch.dtype,
    ) -> None:
        self.columns = columns
        self.hidden = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if wanted.hidden else None
        self.weight = torch.empty(weight.shape, dtype=dtype, device=weight.device) if wanted.weight else None
        self.bias = torch.zeros(len(weight), dtype=dtype, device=weight.device) if wanted.bias else None

    def add(
        self,
        logit_grad: Tensor,
        chosen: Tensor,
        matrix: Tensor,
        factors: Tensor | None,
        rows: slice,
        tokens: Tokens,
    ) -> None:
        """Adds a chunk: logit_grad (n, columns), chosen (n, D), factors (n, 1) of its rows."""
        if self.hidden is not None:
            if tokens.index is None:
                part = torch.mm(logit_grad, matrix, out=self.hidden[rows])
            else:
                part = logit_grad @ matrix
            if factors is not None:
                part.mul_(factors)
            if tokens.index is not None:
                if rows.start == 0:
                    self.hidden.zero_()
                self.hidden[tokens.index[rows]] = part
        if self.weight is not None:
            scaled = chosen if factors is None else chosen * factors
            # The first product overwrites, so the gradient is neither cleared nor read before.
            self.weight[: self.columns].addmm_(logit_grad.t(), scaled, beta=0.0 if rows.start == 0 else 1.0)
        if self.bias is not None:
            total = logit_grad.sum(0) if factors is None else (logit_grad.t() @ factors).squeeze(1)
            self.bias[: self.columns] += total

    def finish(self, any_rows: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients, zero at padding rows; all zero where no token counted."""
        if self.weight is not None:
            self.weight[self.columns if any_rows else 0 :].zero_()
        if self.hidden is not None and not any_rows:
            self.hidden.zero_()
        return self.hidden, self.weight, self.bias
