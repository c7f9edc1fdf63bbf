"""Topics of a shared vocabulary about use: the reference, what is needed, collectives, recomputation, groups."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from harness.kernels import OUTPUTS, CompSum, linear_cross_entropy
from tests.kernels.cases import Problem, differentiate, solve
from tests.kernels.vocab_parallel_ranks import EVERYTHING, FLAGS, REDUCTIONS, Ranks, chunks, collectives, draw_cut


def the_reference_gathers(ranks: Ranks) -> None:
    for reduction in REDUCTIONS:
        for sequence_parallel in FLAGS:
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
        for sequence_parallel in FLAGS:
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
                ranks.expect([name for name, _ in called] == gathers + reduces, f"collectives {called}")
                got = leaves[needs].grad
                ranks.expect(got is not None and torch.allclose(got, wanted, rtol=1e-12, atol=1e-12), f"{got}")
                ranks.expect(torch.equal(output.loss, loss), "loss under no_grad differs")


def one_collective_a_chunk(ranks: Ranks) -> None:
    """The collectives that are documented, no others, on all ranks the same, whatever columns each has."""
    tokens, dim, vocab_size, each = 6 * ranks.count, 5, 40, 5
    lengths = [len(part) for part in torch.arange(tokens).split(-(-tokens // -(-tokens // each)))]
    problem, ends = draw_cut(ranks, tokens, dim, vocab_size)
    widest = max(b - a for a, b in pairwise(ends))
    linear: dict[str, Any] = {**EVERYTHING, "softcap": None, "loss": CompSum(0.5, 1.3, nu=0.2)}

    def numbers(each_token: int) -> list[tuple[str, int]]:
        return [("gather", each_token * length) for length in lengths]

    for sequence_parallel in FLAGS:
        own = ranks.part(problem, ends, sequence_parallel)
        hidden = [("gather", tokens // ranks.count * dim)] if sequence_parallel else []
        reduce = [("scatter" if sequence_parallel else "reduce", tokens * dim)]
        margins = [*hidden, ("reduce", dim), ("reduce", dim * (dim + 1)), ("reduce", tokens * dim)]
        formed = [*hidden, *numbers(7), *reduce]
        calls: dict[str, tuple[tuple[str, ...], dict[str, Any], list[tuple[str, int]]]] = {
            "the shard's first": (("loss",), {"reduction": "sum", **EVERYTHING}, [("gather", 5), *formed]),
            "sum": (("loss",), {"reduction": "sum", **EVERYTHING}, formed),
            "none": (
                ("loss",),
                {"reduction": "none", **EVERYTHING},
                [*hidden, *numbers(7), *hidden, *numbers(5), *reduce],
            ),
            "outputs beside the mean": (
                ("loss", "lse", "entropy"),
                EVERYTHING,
                [*formed, *hidden, *numbers(6), *reduce],
            ),
            "an output alone": (("max_prob",), EVERYTHING, [*formed, *hidden, *numbers(6), *reduce]),
            "adversarial": (("loss",), {**linear, "perturbed_hidden": True}, [*formed, *margins]),
        }
        for name, (fields, settings, expected) in calls.items():
            ranks.label = f"{name}, sequence_parallel={sequence_parallel}"
            with chunks(each, widest), collectives() as called:
                differentiate(own, fields, outputs=OUTPUTS, **settings)
            ranks.expect(called == expected, f"collectives {called}, must be {expected}")
        ranks.label = f"plain under no_grad, sequence_parallel={sequence_parallel}"
        with torch.no_grad(), chunks(each, widest), collectives() as called:
            linear_cross_entropy(own.hidden, own.weight, own.targets, shard=own.shard)
        ranks.expect(called == [*hidden, *numbers(4)], f"collectives {called}")


def recomputed_and_compiled(ranks: Ranks) -> None:
    """Activation checkpoints, and a compiler that takes all of it into one graph: bit by bit what comes of plain
    calls. The operator finds its shard by its key."""
    ways: dict[str, Callable[..., Tensor]] = {
        "checkpoint": lambda call, *inputs: checkpoint(call, *inputs, use_reentrant=False),
        "reentrant checkpoint": lambda call, *inputs: checkpoint(call, *inputs, use_reentrant=True),
        "compiled": lambda call, *inputs: torch.compile(call, backend="aot_eager", fullgraph=True)(*inputs),
    }
    if ranks.count > 2:  # loading the compiler, which checkpoints do too, takes seconds of each process
        return
    outputs = ("entropy", "max_prob")
    linear: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.01, "shift": 1}
    cases: list[tuple[dict[str, Any], bool]] = [
        ({"reduction": "sum"}, False),
        ({"reduction": "none", "softcap": 5.0, "outputs": outputs, **linear}, True),
        ({"reduction": "mean", "outputs": outputs, "loss": CompSum(0.5, nu=0.3), **linear}, True),
    ]
    for way, apply in ways.items():
        for settings, sequence_parallel in cases:
            ranks.label = f"{way}, {settings}, sequence_parallel={sequence_parallel}"
            problem, ends = draw_cut(ranks, 12, 5, 23, padding=4, ignored=0.3)
            own = ranks.part(problem, ends, sequence_parallel)
            factors = torch.randn(12, dtype=torch.float64)

            def call(
                hidden: Tensor,
                weight: Tensor,
                perturbed: Tensor,
                own: Problem = own,
                settings: dict[str, Any] = settings,
                factors: Tensor = factors,
            ) -> Tensor:
                output = linear_cross_entropy(
                    torch.tanh(hidden),
                    weight,
                    own.targets,
                    class_weights=own.class_weights,
                    perturbed_hidden=perturbed if "loss" in settings else None,
                    shard=own.shard,
                    **settings,
                )
                total = (output.loss * (factors if settings["reduction"] == "none" else factors[0])).sum()
                for name in settings.get("outputs", ()):
                    total = total + (getattr(output, name) * factors.flip(0)).sum()
                return total

            assert own.perturbed_hidden is not None
            results = []
            for used in (apply, lambda call, *inputs: call(*inputs)):
                leaves = [x.clone().requires_grad_() for x in (own.hidden, own.weight, own.perturbed_hidden)]
                total = used(call, *leaves)
                total.backward()
                given = leaves if "loss" in settings else leaves[:2]
                results.append([total.detach(), *(leaf.grad for leaf in given)])
            ranks.expect(all(map(torch.equal, *results)), f"loss and gradients {results[0]}, plainly {results[1]}")


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
