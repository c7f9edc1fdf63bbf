"""Topics of a shared vocabulary about what goes beyond the plain loss: the comp-sum family, its adversarial variant,
class weights, differentiable outputs, the weight gradient's dtype, and all of it together."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.kernels import OUTPUTS, CompSum, CrossEntropy, VocabShard, linear_cross_entropy
from tests.kernels.cases import DIFFERENTIABLE, differentiate, draw
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

TAUS = (0.0, 0.5, 1.4, 2.0)


def comp_sums(ranks: Ranks) -> None:
    """Each tau and each reduction, with and without what weighs all tokens of the vocabulary."""
    settings: list[dict[str, Any]] = [
        {},
        {"label_smoothing": 0.13},
        {"class_weights": True, "bias": True, "z_loss": 0.01},
        {"class_weights": True, "label_smoothing": 0.3, "token_weights": True, "temperature": 0.8},
    ]
    for i, tau in enumerate(TAUS):
        for j, terms in enumerate(settings):
            for k, reduction in enumerate(REDUCTIONS):
                sequence_parallel, rho = (i + j + k) % 2 == 1, (1.0, 1.6)[j % 2]
                ranks.label = f"tau {tau}, rho {rho}, {terms}, {reduction}, sequence_parallel={sequence_parallel}"
                problem, ends = draw_cut(ranks, (4, 6), 5, 37, padding=3, ignored=0.2)
                with chunks(7, 37):
                    ranks.compare(
                        problem,
                        ends,
                        sequence_parallel=sequence_parallel,
                        loss=CompSum(tau, rho),
                        reduction=reduction,
                        outputs=OUTPUTS,
                        **terms,
                    )


def adversarial(ranks: Ranks) -> None:
    """The change of the margins: gradients by both hidden states and by the weight; padding and ignored tokens hold
    NaN."""
    settings: list[dict[str, Any]] = [
        {"loss": CompSum(nu=0.7)},
        {"loss": CompSum(tau=0.0, rho=1.6, nu=0.3), "token_weights": True, "bias": True},
        {"loss": CompSum(tau=1.4, nu=2.0), "class_weights": True, "label_smoothing": 0.2, "shift": 1},
    ]
    for terms in settings:
        for reduction in REDUCTIONS:
            for sequence_parallel in FLAGS:
                ranks.label = f"{terms}, {reduction}, sequence_parallel={sequence_parallel}"
                problem, ends = draw_cut(ranks, (4, 6), 5, 37, padding=3, ignored=0.3)
                problem.weight[37:] = float("nan")
                if "shift" not in terms:
                    ignored = problem.targets == -100
                    for values in (problem.hidden, problem.perturbed_hidden, problem.token_weights):
                        assert values is not None
                        values[ignored] = float("nan")
                ranks.compare(
                    problem, ends, sequence_parallel=sequence_parallel, reduction=reduction, tolerance=1e-12, **terms
                )
    ranks.label = "nothing changes"
    problem, ends = draw_cut(ranks, 6, 5, 37)
    ranks.compare(replace(problem, perturbed_hidden=problem.hidden), ends, loss=CompSum(nu=0.7))


def differentiable_outputs(ranks: Ranks) -> None:
    """Each output alone and all together, beside the loss and without it, under every reduction."""
    for i, names in enumerate((*((name,) for name in DIFFERENTIABLE), DIFFERENTIABLE)):
        for j, reduction in enumerate(REDUCTIONS):
            for beside in FLAGS:
                sequence_parallel = (i + j + beside) % 2 == 1
                terms = EVERYTHING if (i + j) % 3 == 0 else {}
                fields = ("loss", *names) if beside else names
                ranks.label = f"{fields}, {reduction}, {len(terms)} terms, sequence_parallel={sequence_parallel}"
                problem, ends = draw_cut(ranks, 24, 5, 37, padding=3, ignored=0.3)
                with chunks(7, 37):
                    ranks.compare(
                        problem,
                        ends,
                        sequence_parallel=sequence_parallel,
                        fields=fields,
                        reduction=reduction,
                        outputs=names,
                        **terms,
                    )


def all_together(ranks: Ranks) -> None:
    """507 tokens of vocabulary, cut anyhow, and with one or two ranks that hold nothing but padding."""
    inner = [101, 211, 389]
    layouts = [
        ranks.cut(512),
        [0, *inner[: ranks.count - 2], 507, 512],
        [0, *inner[: max(ranks.count - 3, 0)], 507, 510, 512][-ranks.count - 1 :],
    ]
    layouts[2][0] = 0
    terms = {**EVERYTHING, "shift": 1}
    call = 0
    for ends in layouts:
        for reduction in REDUCTIONS:
            for sequence_parallel in FLAGS:
                for nu in (0.0, 0.4):
                    tau = TAUS[call % 4]
                    call += 1
                    linear = {"softcap": None} if nu else {}
                    ranks.label = f"ends {ends}, tau {tau}, nu {nu}, {reduction}, sequence_parallel={sequence_parallel}"
                    problem = draw((4, 6), 13, 507, padding=5, ignored=0.2)
                    with chunks(7, 507):
                        ranks.compare(
                            problem,
                            ends,
                            sequence_parallel=sequence_parallel,
                            reduction=reduction,
                            outputs=OUTPUTS,
                            fields=("loss", *DIFFERENTIABLE) if call % 3 else ("loss",),
                            tolerance=1e-12,
                            **{**terms, **linear, "loss": CompSum(tau, 1.2, nu)},
                        )


def of_equal_words_the_first(ranks: Ranks) -> None:
    """Wherever it lies, the lowest id is the likeliest token, and the only one to get max_prob's gradient."""
    ends = [0, 2, 3, 5, 6][: ranks.count + 1]
    vocab_size = ends[-1]
    shard = VocabShard(ends[ranks.rank], ends[ranks.rank + 1], vocab_size, ranks.group)
    weight, targets = torch.zeros(shard.stop - shard.start, 3), torch.arange(vocab_size)
    for first in range(vocab_size):
        ranks.label = f"first likeliest word {first}"
        whole = torch.where(targets < first, -1.0, 2.0).double()
        bias, upstream = whole[shard.start : shard.stop].requires_grad_(), torch.randn(vocab_size).double()
        output = linear_cross_entropy(
            torch.randn(vocab_size, 3).double(),
            weight,
            targets,
            bias=bias,
            shard=shard,
            outputs=("correct", "max_prob"),
            reduction="none",
        )
        assert output.correct is not None
        assert output.max_prob is not None
        ranks.expect(output.correct.tolist() == [word == first for word in range(vocab_size)], f"{output.correct}")
        (got,) = torch.autograd.grad(output.max_prob, bias, upstream)
        probabilities = whole.softmax(0)
        wanted = probabilities[first] * ((targets == first).double() - probabilities) * upstream.sum()
        summed = probabilities * upstream.abs().sum()  # the tokens' parts may cancel each other
        ranks.expect_close("gradient of bias", got, wanted[shard.start : shard.stop], summed, 1e-14)


def masked_out_words(ranks: Ranks) -> None:
    """A bias of −inf takes a word out, and may take out all words of one rank."""
    ends = [0, 4, 9, 11, 14][: ranks.count + 1]
    smoothed: dict[str, Any] = {"label_smoothing": 0.2, "class_weights": True, "temperature": 0.7}
    settings: list[dict[str, Any]] = [
        {"z_loss": 0.1, "loss": CrossEntropy()},
        {**smoothed, "loss": CompSum(1.4)},
        {**smoothed, "loss": CompSum(2.0)},
        {"class_weights": True, "loss": CompSum(0.5)},
    ]
    for gone in range(ranks.count):
        out = slice(ends[gone], ends[gone + 1])
        kept = torch.cat([torch.arange(out.start), torch.arange(out.stop, ends[-1])])
        for reduction in REDUCTIONS:
            for terms in settings:
                ranks.label = f"words of rank {gone} masked out, {terms}, {reduction}"
                problem = draw(8, 5, ends[-1])
                problem.bias[out] = float("-inf")
                problem.targets = kept[torch.randint(len(kept), (8,))]
                fields = ("loss", "lse", "logprob", "max_prob")
                ranks.compare(problem, ends, bias=True, reduction=reduction, outputs=OUTPUTS, fields=fields, **terms)
        # The reference's gradient of the entropy would be NaN; that of the words that are left is not.
        ranks.label = f"words of rank {gone} masked out, entropy"
        settled: dict[str, Any] = {"bias": True, "outputs": ("entropy",), "reduction": "none"}
        own, left = (
            ranks.part(problem, ends, False),
            replace(
                problem,
                weight=problem.weight[kept],
                bias=problem.bias[kept],
                targets=torch.zeros_like(problem.targets),
                shard=VocabShard(0, len(kept), len(kept)),
            ),
        )
        exact, wanted, upstream = differentiate(left, ("entropy",), implementation="reference", **settled)
        output, got, _ = differentiate(own, ("entropy",), upstream, **settled)
        assert output.entropy is not None
        assert exact.entropy is not None
        ranks.expect_close("entropy", output.entropy, exact.entropy, exact.entropy, 2e-13)
        ranks.expect_close("gradient of hidden", got[0], wanted[0], wanted[0], 2e-13)
        for name, own_part, some in (("weight", got[1], wanted[1]), ("bias", got[2], wanted[2])):
            whole = torch.zeros_like(getattr(problem, name)).index_copy(0, kept, some)
            ranks.expect_close(
                f"gradient of {name}", own_part, whole[ends[ranks.rank] : ends[ranks.rank + 1]], whole, 2e-13
            )


def powers_of_what_underflows(ranks: Ranks) -> None:
    """In fp32 a probability of exp(−150) is 0, but its power −1/2 is a number; also where all of a rank is so far."""
    ends = [0, 4, 9, 11, 14][: ranks.count + 1]
    for far in range(ranks.count):
        for reduction in REDUCTIONS:
            ranks.label = f"words of rank {far} 150 nats off, {reduction}"
            problem = draw(8, 5, ends[-1], dtype=torch.float32)
            problem.bias[ends[far] : ends[far + 1]] -= 150.0
            ranks.compare(
                problem,
                ends,
                bias=True,
                label_smoothing=0.2,
                loss=CompSum(0.5),
                reduction=reduction,
                class_weights=True,
                tolerance=5e-5,
            )


def ml_cross_entropy_59_a_label_sentinel_hits_a_padded_column(ranks: Ranks) -> None:
    """Whatever ignore_index is: a number that, moved by a shard's start, is one of its columns, real or padding; a
    padding row's; or a real token's, which then is never predicted but keeps its probability."""
    vocab_size, ends = 11, [0, 4, 9, 12, 15][: ranks.count + 1]
    ends[-1] = 15
    starts = ends[1:-1]
    sentinels = {-100, -1, 0, 3, vocab_size, vocab_size + 1, 14, 15, *starts, *(-1 - at for at in starts)}
    for i, sentinel in enumerate(sorted(sentinels)):
        for j, reduction in enumerate(REDUCTIONS):
            sequence_parallel = (i + j) % 2 == 1
            ranks.label = f"ignore_index {sentinel}, {reduction}, sequence_parallel={sequence_parallel}"
            problem = draw(2 * 12, 5, vocab_size, padding=4)
            problem.targets[:11], problem.targets[11:15] = torch.arange(11), sentinel
            problem.weight[vocab_size:] = float("nan")
            with host_blind() if (i + j) % 4 < 2 else nullcontext():
                ranks.compare(
                    problem,
                    ends,
                    sequence_parallel=sequence_parallel,
                    ignore_index=sentinel,
                    reduction=reduction,
                    outputs=OUTPUTS,
                    fields=("loss", *DIFFERENTIABLE) if i % 2 else ("loss",),
                    label_smoothing=0.1,
                    class_weights=True,
                )


def megatron_7452_label_smoothing_wrong_under_tensor_parallelism(ranks: Ranks) -> None:
    """Against torch's own smoothed loss of all logits: the mean is over the whole vocabulary, without its padding."""
    for smoothing in (0.1, 1.0):
        for reduction in REDUCTIONS:
            for weighted in FLAGS:
                ranks.label = f"label_smoothing {smoothing}, {reduction}, class_weights={weighted}"
                problem, ends = draw_cut(ranks, 12, 5, 37, padding=3, ignored=0.3)
                hidden, weight = (x.clone().requires_grad_() for x in (problem.hidden, problem.weight))
                exact = F.cross_entropy(
                    hidden @ weight[:37].T,
                    problem.targets,
                    weight=problem.class_weights if weighted else None,
                    label_smoothing=smoothing,
                    reduction=reduction,
                )
                own, upstream = ranks.part(problem, ends, False), torch.randn_like(exact)
                wanted = torch.autograd.grad(exact, (hidden, weight), upstream)
                output, got, _ = differentiate(
                    own,
                    upstream={"loss": upstream},
                    label_smoothing=smoothing,
                    reduction=reduction,
                    class_weights=weighted,
                )
                rows = slice(own.shard.start, own.shard.stop)
                ranks.expect_close("loss", output.loss, exact.detach(), exact.detach(), 2e-13)
                ranks.expect_close("gradient of hidden", got[0], wanted[0], wanted[0], 2e-13)
                ranks.expect_close("gradient of weight", got[1], wanted[1][rows], wanted[1], 2e-13)


def weight_gradients_in_fp32(ranks: Ranks) -> None:
    """The weight's gradient in the dtype that was asked for, unrounded in between, for 16-bit weights."""
    for dtype in (torch.bfloat16, torch.float16):
        for reduction in REDUCTIONS:
            ranks.label = f"{dtype}, {reduction}"
            problem, ends = draw_cut(ranks, 24, 16, 37, padding=3, ignored=0.2, dtype=dtype)
            problem.token_weights = problem.token_weights.float()
            _, exact, upstream = differentiate(
                in_float64(problem), reduction=reduction, implementation="reference", token_weights=True
            )
            own = ranks.part(problem, ends, False)
            own.weight = own.weight.clone().requires_grad_()
            own.weight.grad_dtype = torch.float32
            loss = linear_cross_entropy(
                own.hidden,
                own.weight,
                own.targets,
                token_weights=own.token_weights,
                shard=own.shard,
                reduction=reduction,
                weight_grad_dtype=torch.float32,
            ).loss
            loss.backward(upstream["loss"].to(loss.dtype))
            got, wanted = own.weight.grad, exact[1]
            assert isinstance(got, Tensor)
            ranks.expect(got.dtype == torch.float32, f"gradient of weight is {got.dtype}")
            ranks.expect_close(
                "gradient of weight", got, wanted[own.shard.start : own.shard.stop], wanted, tolerance=2e-6
            )
