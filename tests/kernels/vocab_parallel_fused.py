"""Topics of a shared vocabulary about the Triton kernels, in the interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from harness.kernels import OUTPUTS, CompSum, CrossEntropy
from tests.kernels import interpreter
from tests.kernels.cases import DIFFERENTIABLE, Problem, differentiate
from tests.kernels.vocab_parallel_ranks import EVERYTHING, FLAGS, REDUCTIONS, Ranks, collectives, draw_cut

FP32 = {"tolerance": 2e-5, "atol": 1e-6, "implementation": "triton"}


def kernels_with_every_term(ranks: Ranks) -> None:
    """Terms together and apart, each reduction, all outputs, several blocks, padding, uneven shards."""
    terms: list[dict[str, Any]] = [
        {},
        {"bias": True, "z_loss": 0.02, "temperature": 1.7},
        {"class_weights": True, "label_smoothing": 0.13},
        {**EVERYTHING, "loss": CrossEntropy()},
        {**EVERYTHING, "shift": 1},
    ]
    for i, settings in enumerate(terms):
        for sequence_parallel in FLAGS:
            reduction = REDUCTIONS[(i + sequence_parallel) % 3]
            ranks.label = f"{'+'.join(settings) or 'plain'}, {reduction}, sequence_parallel={sequence_parallel}"
            problem, ends = draw_cut(ranks, (4, 6 * ranks.count), 16, 157, padding=3, ignored=0.3)
            with interpreter.sizes(descriptors=i % 2 == 0, chunk=32, tiles_a_split=1):
                output = ranks.compare(
                    _narrow(problem), ends, sequence_parallel=sequence_parallel, reduction=reduction, outputs=OUTPUTS,
                    fields=("loss", *DIFFERENTIABLE), **settings, **FP32,
                )  # fmt: skip
            ranks.expect(output.implementation.endswith("recomputed in the backward, 8 NVD"), output.implementation)


def kernels_where_ranks_hold_little(ranks: Ranks) -> None:
    """One real row a rank, none, all tokens ignored, and no tokens."""
    for rows, padding, ignored in ((ranks.count, 0, 0.0), (1, 2 * ranks.count, 0.0), (70, 3, 1.1)):
        for sequence_parallel in FLAGS:
            ranks.label = f"{rows} rows, {padding} of padding, sequence_parallel={sequence_parallel}"
            problem, ends = draw_cut(ranks, 6 * ranks.count, 8, rows, padding=padding, ignored=ignored)
            ranks.compare(
                _narrow(problem), ends, sequence_parallel=sequence_parallel, outputs=OUTPUTS, label_smoothing=0.1,
                loss=CompSum(1.4), bias=True, **FP32,
            )  # fmt: skip
    problem, ends = draw_cut(ranks, 0, 8, 40)
    ranks.label = "no tokens"
    ranks.compare(_narrow(problem), ends, outputs=OUTPUTS, **FP32)


def kernels_send_each_chunk_once(ranks: Ranks) -> None:
    """One gather forward; backward a reduction a chunk of tokens, and under sequence parallelism a gather as well."""
    for sequence_parallel in FLAGS:
        problem, ends = draw_cut(ranks, 64 * ranks.count, 8, 90)
        own = ranks.part(_narrow(problem), ends, sequence_parallel)
        ranks.label = f"collectives, sequence_parallel={sequence_parallel}"
        with interpreter.sizes(descriptors=False, chunk=32 * ranks.count), collectives() as called:
            differentiate(own, implementation="triton")  # also makes the shard known
            called.clear()
            differentiate(own, implementation="triton")
        tokens, chunks = 64 * ranks.count, 2
        if sequence_parallel:
            chunk = ("gather", 32 * 8), ("scatter", 32 * ranks.count * 8)
            expected = [("gather", 64 * 8), ("gather", 4 * tokens), *chunk, *chunk]
        else:
            expected = [("gather", 4 * tokens), *[("reduce", tokens * 8 // chunks)] * chunks]
        ranks.expect(called == expected, f"{called}, must be {expected}")


def kernels_in_16_bits(ranks: Ranks) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for sequence_parallel in FLAGS:
            ranks.label = f"{dtype}, sequence_parallel={sequence_parallel}"
            problem, ends = draw_cut(ranks, 24 * ranks.count, 16, 157, padding=3, ignored=0.2)
            ranks.compare(
                _narrow(problem, dtype), ends, sequence_parallel=sequence_parallel, bias=True, z_loss=0.01,
                reduction="none", tolerance=2.0 * torch.finfo(dtype).eps, implementation="triton",
            )  # fmt: skip


def kernels_with_a_filter(ranks: Ranks) -> None:
    """What all ranks together leave out of a token's gradient is within the bound."""
    bound = 0.05
    problem, ends = draw_cut(ranks, 64, 16, 64 * 5 * ranks.count)
    problem.weight *= 3
    _, (wanted, _), upstream = differentiate(problem, implementation="reference", reduction="none")
    own = ranks.part(_narrow(problem), ends, False)
    with interpreter.sizes(descriptors=False):
        output, (got, _), _ = differentiate(
            own, ("loss",), upstream, implementation="triton", reduction="none", filter_bound=bound
        )
    largest = problem.weight.norm(dim=1).max() * upstream["loss"].abs()
    off = (got.double() - wanted).norm(dim=1)
    ranks.label = "filter"
    ranks.expect(bool((off <= bound * largest + 1e-4).all()), f"off by {(off / largest).max()}")
    ranks.expect(0.0 < float(output.kept_share) <= 1.0, f"kept {output.kept_share}")


def _narrow(problem: Problem, dtype: torch.dtype = torch.float32) -> Problem:
    names = ("hidden", "weight", "bias", "token_weights", "class_weights", "perturbed_hidden")
    return replace(problem, **{name: getattr(problem, name).to(dtype) for name in names})
