"""What the ranks of a shared vocabulary tell each other: once what they hold, then a few numbers per token and chunk.

Each rank has the logits of its own columns and their softmax. One all-gather a chunk gives all ranks all ranks' facts;
each combines them in rank order, so that losses and outputs have the same bits everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .chunk import Share, Softmax
from .types import Terms, VocabShard

# torch 2.13 renamed these two, and warns of the names that earlier versions know.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather(own: Tensor, shard: VocabShard) -> Tensor:
    """(n, ...) of each rank, the same n on all, to (ranks · n, ...) in rank order."""
    whole = own.new_empty((own.shape[0] * shard.ranks, *own.shape[1:]))
    _all_gather(whole, own.contiguous(), group=shard.group)
    return whole


def agree(shard: VocabShard, weight: Tensor) -> None:
    """Fills in shard.stops. Raises the same ValueError on all ranks unless their shards are one vocabulary's."""
    names = ("start", "stop", "vocab_size", "sequence_parallel")
    own = torch.tensor([*(int(getattr(shard, name)) for name in names), len(weight)], device=weight.device)
    heard = gather(own, shard).view(shard.ranks, -1).tolist()
    stops: list[int] = []
    for rank, (start, stop, vocab_size, sequence_parallel, rows) in enumerate(heard):
        before = stops[-1] if stops else 0
        if start != before:
            raise ValueError(
                f"shard of rank {rank}: start is {start}, must be {before}, since ranks hold consecutive rows from 0 on"
            )
        if stop - start != rows:
            raise ValueError(f"shard of rank {rank}: [{start}, {stop}) is not the {rows} rows of its weight")
        for name, said, first in zip(names[2:], (vocab_size, sequence_parallel), heard[0][2:], strict=False):
            if said != first:
                raise ValueError(f"shard of rank {rank}: {name} is {said}, on rank 0 {first}; it must be the same")
        stops.append(stop)
    if shard.vocab_size > stops[-1]:
        raise ValueError(f"shard.vocab_size {shard.vocab_size} exceeds the {stops[-1]} rows of all ranks' weights")
    object.__setattr__(shard, "stops", tuple(stops))


def own_columns(targets: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """The targets as columns of this rank (any column where they are not its own), and whether they are its own."""
    mine = (targets >= shard.start) & (targets < shard.start + shard.columns)
    return (targets - shard.start).masked_fill(~mine, 0), mine


def combine(own: Softmax, mine: Tensor, shard: VocabShard, terms: Terms) -> tuple[Softmax, Share]:
    """The softmax over all ranks' columns from that over each rank's, and the share that falls to this rank.

    One collective. A rank's largest logit and its sum of exponentials (1 / max_prob) travel apart: added up to one
    log-sum-exp, logits of ten thousand would leave fp32 three digits of it after the point.
    """
    facts = [own.largest_logit, own.max_prob, own.others, own.label_logit.masked_fill(~mine, 0.0)]
    if own.smoothing is not None:
        facts.append(own.smoothing)
    if own.entropy is not None:
        facts.append(own.entropy)
    if own.correct is not None:
        facts.append((own.correct & mine).to(own.others.dtype))
    packed = torch.cat([fact.t() for fact in facts])
    heard = iter(gather(packed, shard).view(shard.ranks, *packed.shape).unbind(1))

    largest_logits, max_probs, others, label_logits = (next(heard) for _ in range(4))  # each (ranks, n)
    largest_logit = largest_logits.amax(0)
    masses = (largest_logits - largest_logit).exp() / max_probs
    total = masses.sum(0)
    shares = masses / total
    label_logit = label_logits.sum(0)  # all but one are 0
    smoothing = entropy = top_here = correct = powers = None
    if own.smoothing is not None:
        smoothing = next(heard)
        if terms.tau != 1.0:
            # From the logits, not from the shares, which underflow where their powers needn't.
            powers = (((largest_logits - largest_logit) - max_probs.log() - total.log()) * (terms.tau - 1.0)).exp()
            # Those of each rank's own softmax; a rank without columns has none.
            smoothing = torch.where(smoothing == 0, smoothing, smoothing * powers)
        smoothing = smoothing.sum(0)[:, None]
    if own.entropy is not None:
        # That of the choice of a rank, and the mean of those within the ranks.
        entropy = (shares * next(heard) + torch.special.entr(shares)).sum(0)[:, None]
    if own.correct is not None:
        # Of equally large logits the first rank's have the lowest ids.
        first = largest_logits.argmax(0, keepdim=True)
        top_here = first.t() == shard.rank
        correct = next(heard).gather(0, first).t() > 0.5
    whole = Softmax(
        largest_logit=largest_logit[:, None],
        max_prob=(1.0 / total)[:, None],
        label_logit=label_logit[:, None],
        label_probability=((label_logit - largest_logit).exp() / total)[:, None],
        others=(shares * others).sum(0)[:, None],
        smoothing=smoothing,
        entropy=entropy,
        top=own.top,
        top_here=top_here,
        correct=correct,
    )
    at = shard.rank
    return whole, Share(shares[at, :, None], None if powers is None else powers[at, :, None])


def complete_hidden_gradient(partial: Tensor, shard: VocabShard) -> Tensor:
    """The sum over ranks of what each one's columns give hidden (N, D), of this rank's tokens. Overwrites `partial`."""
    own = partial
    if shard.sequence_parallel:
        own = partial.new_empty((len(partial) // shard.ranks, partial.shape[1]))
    start_hidden_gradient(partial, own, shard).wait()
    return own


def start_hidden_gradient(partial: Tensor, own: Tensor, shard: VocabShard) -> Any:
    """The same into `own`, which is `partial` itself unless ranks share the tokens: begun, and complete once `wait` of
    what is returned has been called; both must stay as they are until then."""
    if not shard.sequence_parallel:
        return dist.all_reduce(partial, group=shard.group, async_op=True)
    return _reduce_scatter(own, partial, group=shard.group, async_op=True)


class _Whole(torch.autograd.Function):
    """Rows (lengths[rank], ...) of each rank to those of all. All ranks go on to compute the same from them, so the
    gradient that a rank has is complete, and only its own rows' part is handed on."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, lengths: tuple[int, ...], shard: VocabShard) -> Tensor:
        ctx.own_rows = slice(sum(lengths[: shard.rank]), sum(lengths[: shard.rank + 1]))
        padded = own.new_zeros((max(lengths), *own.shape[1:]))
        padded[: len(own)] = own
        parts = gather(padded, shard).split(len(padded))
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        return upstream[0][ctx.own_rows], None, None


def whole_hidden(own: Tensor, shard: VocabShard) -> Tensor:
    """(N, D) of all tokens from this rank's, under sequence parallelism."""
    whole: Tensor = _Whole.apply(own, (len(own),) * shard.ranks, shard)
    return whole


def gather_problem(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, shard: VocabShard
) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden (N, D) of all tokens, weight and bias of all rows: for the reference, which computes all on every rank."""
    rows = tuple(stop - start for start, stop in zip((0, *shard.stops), shard.stops, strict=False))
    if shard.sequence_parallel:
        hidden = whole_hidden(hidden, shard)
    return hidden, _Whole.apply(weight, rows, shard), None if bias is None else _Whole.apply(bias, rows, shard)
