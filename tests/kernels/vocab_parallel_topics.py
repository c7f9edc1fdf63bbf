"""The cases of a shared vocabulary by topic; each is run by all ranks of a group at once, in the same order.

Here are those about values; vocab_parallel_uses.py has those about how the loss is used.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from harness.kernels import OUTPUTS, CompSum, CrossEntropy
from tests.kernels import interpreter
from tests.kernels.cases import DIFFERENTIABLE, draw, solve
from tests.kernels.vocab_parallel_features import (
    adversarial,
    all_together,
    comp_sums,
    differentiable_outputs,
    masked_out_words,
    megatron_7452_label_smoothing_wrong_under_tensor_parallelism,
    ml_cross_entropy_59_a_label_sentinel_hits_a_padded_column,
    of_equal_words_the_first,
    powers_of_what_underflows,
    weight_gradients_in_fp32,
)
from tests.kernels.vocab_parallel_fused import (
    kernels_in_16_bits,
    kernels_send_each_chunk_once,
    kernels_where_ranks_hold_little,
    kernels_with_a_filter,
    kernels_with_every_term,
)
from tests.kernels.vocab_parallel_ranks import (
    EVERYTHING,
    FLAGS,
    REDUCTIONS,
    Ranks,
    chunks,
    draw_cut,
    host_blind,
    in_float64,
)
from tests.kernels.vocab_parallel_shards import (
    a_shard_is_dropped,
    arguments_that_do_not_fit,
    copies_of_a_shard,
    shards_that_do_not_fit,
)
from tests.kernels.vocab_parallel_uses import (
    one_collective_a_chunk,
    only_what_is_needed,
    recomputed_and_compiled,
    smaller_groups,
    the_reference_gathers,
)

TERMS: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"token_weights": True},
    {"label_smoothing": 0.13},
    {"z_loss": 0.02},
    {"softcap": 1.3},
    {"temperature": 1.7},
    {"shift": 2},
    {"class_weights": True},
    {"class_weights": True, "label_smoothing": 0.13},
    {**EVERYTHING, "loss": CrossEntropy()},
    {**EVERYTHING, "shift": 1},
]


def every_term(ranks: Ranks) -> None:
    """Each term alone and all together, each reduction, all outputs, several chunks, padding, uneven shards."""
    for i, terms in enumerate(TERMS):
        for j, reduction in enumerate(REDUCTIONS):
            sequence_parallel = (i + j) % 2 == 1
            ranks.label = f"{'+'.join(terms) or 'plain'}, {reduction}, sequence_parallel={sequence_parallel}"
            problem, ends = draw_cut(ranks, (4, 6), 11, 37, padding=3, ignored=0.3)
            with chunks(7, 37):
                output = ranks.compare(
                    problem, ends, sequence_parallel=sequence_parallel, reduction=reduction, outputs=OUTPUTS, **terms
                )
            how = "recomputed in the backward, 8" if reduction == "none" else "formed in the forward, 6"
            ranks.expect(output.implementation == f"blocked, {how} NVD", output.implementation)


def random_sizes(ranks: Ranks) -> None:
    for _ in range(12):
        sequence_parallel = bool(torch.randint(2, ()))
        tokens = int(torch.randint(1, 40, ())) * (ranks.count if sequence_parallel else 1)
        dim, vocab_size, padding = (int(torch.randint(*ends, ())) for ends in ((1, 20), (ranks.count, 200), (0, 30)))
        length = int(torch.randint(1, 30, ()))
        ranks.label = f"tokens {tokens}, dim {dim}, vocab_size {vocab_size}+{padding}, chunk {length}"
        problem, ends = draw_cut(ranks, tokens, dim, vocab_size, padding=padding, ignored=0.2)
        reduction = REDUCTIONS[int(torch.randint(3, ()))]
        with chunks(length, max(b - a for a, b in pairwise(ends))):
            ranks.compare(
                problem, ends, sequence_parallel=sequence_parallel, reduction=reduction, outputs=OUTPUTS, **EVERYTHING
            )


def nothing_to_predict(ranks: Ranks) -> None:
    for tokens in (0, 2 * ranks.count):
        for reduction in REDUCTIONS:
            for sequence_parallel in FLAGS:
                ranks.label = f"{tokens} tokens, all ignored, {reduction}, sequence_parallel={sequence_parallel}"
                problem, ends = draw_cut(ranks, tokens, 5, 11, padding=2)
                problem.targets.fill_(-100)
                output = ranks.compare(
                    problem, ends, sequence_parallel=sequence_parallel, reduction=reduction, outputs=OUTPUTS, bias=True
                )
                ranks.expect(bool(output.loss.eq(0).all()), f"loss {output.loss}")


def one_token(ranks: Ranks) -> None:
    for reduction in REDUCTIONS:
        for label in range(ranks.count):
            ranks.label = f"{reduction}, label of rank {label}"
            problem = draw(1, 4, ranks.count)
            problem.targets[0] = label
            ranks.compare(problem, list(range(ranks.count + 1)), reduction=reduction, outputs=OUTPUTS, **EVERYTHING)


def ranks_with_few_or_no_real_rows(ranks: Ranks) -> None:
    # Whatever padding holds: if it took any part, this would drown the rest or make it NaN.
    for vocab_size, ends in ((6, [0, 4, 9, 11, 13]), (1, [0, 3, 5, 8, 9]), (4, [0, 1, 2, 3, 7])):
        ends = ends[: ranks.count + 1]
        for reduction in REDUCTIONS:
            for terms in ({}, EVERYTHING):
                ranks.label = f"vocab_size {vocab_size} in {ends}, {reduction}, {len(terms)} terms"
                problem = draw(12, 5, vocab_size, padding=max(ends[-1] - vocab_size, 0), ignored=0.2)
                problem.weight[vocab_size:], problem.bias[vocab_size:] = float("nan"), float("inf")
                if ends[-1] >= vocab_size:
                    with chunks(5, vocab_size):
                        ranks.compare(problem, ends, reduction=reduction, outputs=OUTPUTS, **terms)


def ignored_tokens_may_hold_nan(ranks: Ranks) -> None:
    for reduction in REDUCTIONS:
        ranks.label = reduction
        problem, ends = draw_cut(ranks, 16, 5, 11, padding=2, ignored=0.5)
        ignored = problem.targets == -100
        problem.hidden[ignored], problem.token_weights[ignored] = float("nan"), float("nan")
        ranks.compare(problem, ends, reduction=reduction, outputs=OUTPUTS, token_weights=True)


def as_on_a_device(ranks: Ranks) -> None:
    """The way that waits for no value: ignored tokens stay in the chunks."""
    with host_blind(), chunks(5, 40):
        for reduction in REDUCTIONS:
            for sequence_parallel in FLAGS:
                ranks.label = f"{reduction}, sequence_parallel={sequence_parallel}"
                problem, ends = draw_cut(ranks, 12, 7, 37, padding=3, ignored=0.4)
                problem.hidden[problem.targets == -100] = float("nan")
                ranks.compare(
                    problem,
                    ends,
                    sequence_parallel=sequence_parallel,
                    reduction=reduction,
                    outputs=OUTPUTS,
                    **EVERYTHING,
                )
            ranks.label = f"{reduction}, all ignored"
            problem.targets.fill_(-100)
            ranks.compare(problem, ends, reduction=reduction, outputs=OUTPUTS, **EVERYTHING)


def huge_logits(ranks: Ranks) -> None:
    # Multiples of 1/4 of around 10,000, exact in fp32: hundreds of nats apart at even tokens, a few at odd ones.
    for reduction in REDUCTIONS:
        ranks.label = reduction
        problem, ends = draw_cut(ranks, 30, 4, 50, dtype=torch.float32)
        problem.hidden = torch.randint(-2, 3, (30, 4)).float()
        problem.hidden[::2] *= 1000.0
        problem.weight = torch.randint(-4, 5, (50, 4)) / 4
        problem.bias.fill_(1e4)
        logits = problem.hidden @ problem.weight.T + problem.bias
        problem.targets = torch.where(torch.arange(30) % 4 < 2, logits.argmax(-1), logits.argmin(-1))
        output = ranks.compare(problem, ends, reduction=reduction, outputs=OUTPUTS, bias=True, tolerance=1e-6)
        # Each on its own, since those of a fraction of a nat would be lost beside those of thousands.
        exact = logits.double().log_softmax(-1).gather(1, problem.targets[:, None]).squeeze(1)
        assert output.logprob is not None
        off = (output.logprob.double() - exact).abs() / exact.abs().clamp(min=1.0)
        ranks.expect(off.max().item() < 1e-6, f"log-probabilities are off by {off.max()}")


def near_certainty(ranks: Ranks) -> None:
    # p − 1 computed as a difference, or −log p from a sum near 1, loses the digits that matter.
    for margin in (3.0, 14.0, 20.0):
        for reduction in ("sum", "none"):
            ranks.label = f"margin {margin}, {reduction}"
            problem, ends = draw_cut(ranks, 40, 64, 64, dtype=torch.float32)
            problem.weight = torch.eye(64)
            problem.hidden = torch.randint(-2, 3, (40, 64)).float() / 4
            problem.hidden[torch.arange(40), problem.targets] = margin
            ranks.compare(problem, ends, reduction=reduction, outputs=("lse", "logprob"), tolerance=2e-6)


def lower_precisions(ranks: Ranks) -> None:
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    settings: tuple[dict[str, Any], ...] = (
        EVERYTHING,
        {**EVERYTHING, "fields": ("loss", *DIFFERENTIABLE), "outputs": DIFFERENTIABLE},
        {**EVERYTHING, "softcap": None, "loss": CompSum(1.4, 1.2, nu=0.3)},
    )
    for i, (hidden, weight) in enumerate(((brain, brain), (brain, single), (single, half), (half, half))):
        for j, reduction in enumerate(REDUCTIONS):
            for k, terms in enumerate(settings):
                sequence_parallel = (i + j + k) % 2 == 1
                ranks.label = f"{hidden} and {weight}, {terms}, {reduction}, sequence_parallel={sequence_parallel}"
                problem, ends = draw_cut(ranks, 60, 32, 211, padding=2, ignored=0.2)
                for name in ("bias", "class_weights", "token_weights"):
                    setattr(problem, name, getattr(problem, name).float())
                problem.weight = problem.weight.to(weight)
                problem.hidden, moved = problem.hidden.to(hidden), problem.perturbed_hidden
                problem.perturbed_hidden = None if moved is None else moved.to(hidden)
                with chunks(17, 211, element_bytes=4):
                    ranks.compare(
                        problem,
                        ends,
                        sequence_parallel=sequence_parallel,
                        tolerance=2e-5,
                        reduction=reduction,
                        **terms,
                    )


def hidden_gradient_is_rounded_once(ranks: Ranks) -> None:
    """The error of a bf16 gradient is that of the rounding alone, as if one rank had formed it in fp32."""
    problem, ends = draw_cut(ranks, 64, 32, 64 * ranks.count, dtype=torch.bfloat16)
    one = torch.tensor(1.0)
    # The reference hands its float64 gradient on in bf16; here the digits that this drops are wanted.
    _, (exact, _), _ = solve(in_float64(problem), one, reduction="sum", implementation="reference")
    _, (got, _), _ = solve(ranks.part(problem, ends, False), one, reduction="sum")
    error = ((got.double() - exact).norm() / exact.norm()).item()
    rounding = ((exact.bfloat16().double() - exact).norm() / exact.norm()).item()
    ranks.label = "bf16"
    ranks.expect(error < 1.05 * rounding, f"error {error}, of the rounding alone {rounding}")


KERNELS = (
    kernels_with_every_term,
    kernels_where_ranks_hold_little,
    kernels_send_each_chunk_once,
    kernels_in_16_bits,
    kernels_with_a_filter,
)
TOPICS: dict[str, Callable[[Ranks], None]] = {
    topic.__name__: topic
    for topic in (
        every_term,
        random_sizes,
        nothing_to_predict,
        one_token,
        ranks_with_few_or_no_real_rows,
        masked_out_words,
        ignored_tokens_may_hold_nan,
        as_on_a_device,
        huge_logits,
        near_certainty,
        comp_sums,
        adversarial,
        differentiable_outputs,
        all_together,
        powers_of_what_underflows,
        weight_gradients_in_fp32,
        ml_cross_entropy_59_a_label_sentinel_hits_a_padded_column,
        megatron_7452_label_smoothing_wrong_under_tensor_parallelism,
        of_equal_words_the_first,
        lower_precisions,
        hidden_gradient_is_rounded_once,
        the_reference_gathers,
        only_what_is_needed,
        one_collective_a_chunk,
        recomputed_and_compiled,
        smaller_groups,
        a_shard_is_dropped,
        copies_of_a_shard,
        shards_that_do_not_fit,
        arguments_that_do_not_fit,
        *(KERNELS if interpreter.why_not() is None else ()),
    )
}
