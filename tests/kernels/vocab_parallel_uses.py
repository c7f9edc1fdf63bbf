"""More topics of a shared vocabulary: the reference, what is needed, collectives, recomputation, groups, errors."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from harness.kernels import OUTPUTS, VocabShard, linear_cross_entropy
from tests.kernels.cases import Problem, solve
from tests.kernels.vocab_parallel_ranks import EVERYTHING, REDUCTIONS, Ranks, chunks, collectives, draw_cut


def the_reference_gathers(ranks: Ranks) -> None:
    for reduction in REDUCTIONS:
        for sequence_parallel in (False, True):
            ranks.label = f"{reduction}, sequence_parallel={sequence_parallel}"
            problem, ends = draw_cut(ranks, 12, 5, 23, padding=4, ignored=0.3)
            ranks.compare(
                problem,
                ends,
                implementation="reference",
                sequence_parallel=sequence_parallel,
                reduction=reduction,
                outputs=OUTPUTS,
                **EVERYTHING,
            )


def only_what_is_needed(ranks: Ranks) -> None:
    """Gradients of some inputs only, and none under no_grad, with as many collectives as that takes."""
    for reduction in ("sum", "none"):
        for sequence_parallel in (False, True):
            problem, ends = draw_cut(ranks, 12, 4, 17, ignored=0.2)
            own = ranks.part(problem, ends, sequence_parallel)
            settings: dict[str, Any] = {"shard": own.shard, "reduction": reduction}
            _, (exact, exact_weight), upstream = solve(problem, reduction=reduction, implementation="reference")
            exact_hidden = exact.chunk(ranks.count)[ranks.rank] if sequence_parallel else exact
            exact_weight = exact_weight[own.shard.start : own.shard.stop]
            with torch.no_grad():
                loss = linear_cross_entropy(own.hidden, own.weight, problem.targets, **settings).loss
            for needs, wanted in (("hidden", exact_hidden), ("weight", exact_weight)):
                ranks.label = f"only {needs}, {reduction}, sequence_parallel={sequence_parallel}"
                leaves = {"hidden": own.hidden.clone(), "weight": own.weight.clone()}
                leaves[needs].requires_grad_()
                with collectives() as called:
                    output = linear_cross_entropy(**leaves, targets=problem.targets, **settings)
                    output.loss.backward(upstream)
                reduces = (["scatter"] if sequence_parallel else ["reduce"]) if needs == "hidden" else []
                gathers = ["gather"] * (1 + sequence_parallel) * (2 if reduction == "none" else 1)
                ranks.expect(called == gathers + reduces, f"collectives {called}")
                got = leaves[needs].grad
                ranks.expect(got is not None and torch.allclose(got, wanted, rtol=1e-12, atol=1e-12), f"{got}")
                ranks.expect(torch.equal(output.loss, loss), "loss under no_grad differs")


def one_collective_a_chunk(ranks: Ranks) -> None:
    problem, ends = draw_cut(ranks, 23, 5, 40)
    own = ranks.part(problem, ends, False)
    widest = max(b - a for a, b in pairwise(ends))
    for call, expected in (("first", 6), ("second", 5)):
        ranks.label = f"{call} call with one shard"
        with chunks(5, widest), collectives() as called:
            solve(own, reduction="sum", outputs=OUTPUTS, **EVERYTHING)
        ranks.expect(called == ["gather"] * expected + ["reduce"], f"collectives {called}")


def recomputed_and_compiled(ranks: Ranks) -> None:
    ways: dict[str, Callable[..., Tensor]] = {
        "checkpoint": lambda call, *inputs: checkpoint(call, *inputs, use_reentrant=False),
        "reentrant checkpoint": lambda call, *inputs: checkpoint(call, *inputs, use_reentrant=True),
        "compiled": lambda call, *inputs: torch.compile(call, backend="eager")(*inputs),
    }
    if ranks.count > 2:  # loading the compiler, which checkpoints do too, takes seconds of each process
        return
    for way, apply in ways.items():
        for reduction, sequence_parallel in (("sum", False), ("none", True)):
            ranks.label = f"{way}, {reduction}, sequence_parallel={sequence_parallel}"
            problem, ends = draw_cut(ranks, 12, 5, 23, padding=4, ignored=0.3)
            own = ranks.part(problem, ends, sequence_parallel)

            def call(hidden: Tensor, weight: Tensor, own: Problem = own, reduction: Any = reduction) -> Tensor:
                losses = linear_cross_entropy(
                    torch.tanh(hidden), weight, own.targets, shard=own.shard, reduction=reduction
                ).loss
                return (losses * torch.arange(1, 13)).sum() if reduction == "none" else losses * 0.7

            results = []
            for used in (apply, lambda call, *inputs: call(*inputs)):
                leaves = [x.clone().requires_grad_() for x in (own.hidden, own.weight)]
                used(call, *leaves).backward()
                results.append([leaf.grad for leaf in leaves])
            ranks.expect(all(map(torch.equal, *results)), f"gradients {results[0]}, plainly {results[1]}")


def smaller_groups(ranks: Ranks) -> None:
    """Ranks in a group are not those of the world; a group of one is no group."""
    members = [[0], [1, 2], [3]] if ranks.count >= 3 else [[0], [1]]
    if ranks.count == 4 and torch.randint(2, ()):
        members = [[0, 1], [2, 3]]
    members = [[rank for rank in ranks_of if rank < ranks.count] for ranks_of in members]
    for ranks_of in filter(None, members):
        group = dist.new_group(ranks_of)
        if ranks.rank not in ranks_of:
            continue
        inner = Ranks(group, ranks.failures)
        for reduction in REDUCTIONS:
            inner.label = f"ranks {ranks_of}, {reduction}"
            problem, ends = draw_cut(inner, 12, 5, 23, padding=4, ignored=0.3)
            inner.compare(
                problem,
                ends,
                sequence_parallel=len(ranks_of) > 1,
                reduction=reduction,
                outputs=OUTPUTS,
                **EVERYTHING,
            )
            if len(ranks_of) == 1:
                with collectives() as called:
                    grouped, gradients, upstream = solve(inner.part(problem, ends, True), reduction=reduction)
                alone, wanted, _ = solve(problem, upstream, reduction=reduction)
                inner.expect(torch.equal(grouped.loss, alone.loss), "a group of one has another loss")
                inner.expect(all(map(torch.equal, gradients, wanted)), "a group of one has other gradients")
                inner.expect(not called, f"a group of one calls {called}")
    torch.manual_seed(0)  # the groups drew different numbers


def shards_that_do_not_fit(ranks: Ranks) -> None:
    """The same line on all ranks, whichever of them is wrong; and afterwards they still meet."""
    last = ranks.count - 1
    hidden, targets = torch.randn(4 * ranks.count, 3), torch.zeros(4 * ranks.count, dtype=torch.int64)

    def loss(start: int, stop: int, vocab_size: int = 5, rows: int | None = None, **settings: Any) -> None:
        shard = VocabShard(start, stop, vocab_size, ranks.group, **settings)
        weight = torch.zeros(stop - start if rows is None else rows, 3)
        mine = hidden.chunk(ranks.count)[ranks.rank] if shard.sequence_parallel else hidden
        linear_cross_entropy(mine, weight, targets, shard=shard)

    start, stop = 5 * ranks.rank, 5 * ranks.rank + 5
    odd = ranks.rank == last
    ranks.label = "bad shards"
    fault = f"shard of rank {last}:"
    consecutive = "since ranks hold consecutive rows from 0 on"
    ranks.expect_same_error(
        f"{fault} start is {5 * last + 1}, must be {5 * last}, {consecutive}", lambda: loss(start + odd, stop)
    )
    ranks.expect_same_error(f"shard of rank 0: start is 5, must be 0, {consecutive}", lambda: loss(start + 5, stop + 5))
    ranks.expect_same_error(
        f"{fault} [{5 * last}, {5 * last + 5}) is not the 6 rows of its weight", lambda: loss(start, stop, rows=5 + odd)
    )
    ranks.expect_same_error(
        f"{fault} vocab_size is 6, on rank 0 5; it must be the same", lambda: loss(start, stop, vocab_size=5 + odd)
    )
    ranks.expect_same_error(
        f"{fault} sequence_parallel is 1, on rank 0 0; it must be the same",
        lambda: loss(start, stop, sequence_parallel=odd),
    )
    ranks.expect_same_error(
        f"shard.vocab_size 99 exceeds the {5 * ranks.count} rows of all ranks' weights",
        lambda: loss(start, stop, vocab_size=99),
    )
    everywhere = VocabShard(start, stop, 5, ranks.group, sequence_parallel=True)
    ranks.expect_same_error(
        f"hidden ({len(hidden)}, 3) must hold 1/{ranks.count} of the {len(hidden)} tokens of targets "
        f"({len(hidden)},), since shard.sequence_parallel divides them equally among {ranks.count} ranks",
        lambda: linear_cross_entropy(hidden, torch.zeros(5, 3), targets, shard=everywhere),
    )
    loss(start, stop)
    agreed = VocabShard(start, stop, 5, ranks.group)
    linear_cross_entropy(hidden, torch.zeros(5, 3), targets, shard=agreed)
    ranks.expect_same_error(
        f"weight has 4 rows, its shard [{start}, {stop}) another number",
        lambda: linear_cross_entropy(hidden, torch.zeros(4, 3), targets, shard=agreed),
    )
