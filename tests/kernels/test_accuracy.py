"""Errors against float64 at most those of torch's own path, F.linear and F.cross_entropy, on the same 16 or 32 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.kernels import CompSum
from tests.kernels.cases import Problem, draw, solve

FP32_ROUNDINGS = 3e-6
"""Of the arithmetic, which torch's own path may happen to avoid; more of them where a power of a small p is taken."""
ONE_ROUNDING = 0.505
"""Of a 16-bit gradient to its dtype, in units of eps, and a little of what came before."""
LUCK = 1.1
"""Where the rounding of the logits is all there is, it is as large in both, but not the same."""


def flat() -> Problem:
    """As a model starts: a softmax that hardly differs from 1/V."""
    problem = draw(61, 32, 211)
    problem.weight *= 0.01
    return problem


def certain() -> Problem:
    """Targets with all but 1e-1 to 1e-9 of the probability."""
    problem = draw(61, 32, 211)
    directions = problem.weight[problem.targets]
    length = directions.square().sum(1, keepdim=True)
    problem.hidden = directions / length * (torch.rand(61, 1, dtype=torch.float64) * 18 + 7) + problem.hidden / 100
    problem.weight *= 1 + 0.2 * torch.randn(211, 1, dtype=torch.float64)
    return problem


def impossible() -> Problem:
    """Half of the targets with a probability around 1e-30."""
    problem = draw(61, 32, 211)
    problem.hidden /= 8
    problem.hidden[:, 0] = 1.0
    problem.weight[:, 0] = 0.0
    problem.weight[:20, 0] = -69.0
    problem.targets[:30] = torch.randint(0, 20, (30,))
    problem.targets[30:] = torch.randint(20, 211, (31,))
    return problem


def huge() -> Problem:
    """Logits up to ten thousand, of either sign."""
    problem = draw(61, 32, 211)
    problem.hidden *= 1200
    return problem


PROBLEMS = [flat, certain, impossible, huge]


def torchs_own(
    hidden: Tensor, weight: Tensor, problem: Problem, reduction: str, tau: float, class_weights: bool, smoothing: float
) -> Tensor:
    logits = F.linear(hidden, weight)
    classes = problem.class_weights.to(logits.dtype) if class_weights else None
    if tau == 1.0:
        return F.cross_entropy(logits, problem.targets, weight=classes, reduction=reduction, label_smoothing=smoothing)
    probability = torch.softmax(logits, -1).gather(1, problem.targets[:, None]).squeeze(1)
    losses = (1 - probability.pow(tau - 1)) / (tau - 1)
    weights = torch.ones_like(losses) if classes is None else classes[problem.targets]
    losses = losses * weights
    return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / weights.sum()}[reduction]


def error(got: Tensor, exact: Tensor) -> float:
    """Root mean square, relative; infinite where a value is not finite.

    Gradients below 1e-10 count as that: near certainty the reference, of float64, has lost p − 1 before fp32 has here.
    """
    difference = (got.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-10)
    return float("inf") if difference.isnan() else difference.item()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("problem_of", PROBLEMS)
def test_errors_are_at_most_those_of_torch(
    problem_of: Callable[[], Problem], dtype: torch.dtype, reduction: str
) -> None:
    for tau, class_weights, smoothing in (
        (1.0, False, 0.0),
        (1.0, True, 0.0),
        (1.0, True, 0.1),
        (0.0, True, 0.0),
        (0.5, False, 0.0),
        (1.4, True, 0.0),
        (2.0, False, 0.0),
    ):
        problem = problem_of()
        problem.hidden, problem.weight = problem.hidden.to(dtype), problem.weight.to(dtype)
        problem.class_weights = problem.class_weights.to(dtype)
        problem.class_weights[::3] = 0.0
        if problem_of is huge and tau < 1:
            continue  # the loss itself is beyond fp32
        settings: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing, "loss": CompSum(tau)}
        settings["class_weights"] = class_weights
        # The exact gradients of the same numbers, without a last rounding to their dtype.
        wide = Problem(**{**vars(problem), "hidden": problem.hidden.double(), "weight": problem.weight.double()})
        exact, exact_gradients, upstream = solve(wide, implementation="reference", **settings)
        output, gradients, _ = solve(problem, upstream, **settings)

        leaves = [problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()]
        loss = torchs_own(*leaves, problem, reduction, tau, class_weights, smoothing)
        torchs = torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))
        names = ("loss", "hidden", "weight")
        for name, mine, other, right in zip(
            names, (output.loss, *gradients), (loss, *torchs), (exact.loss, *exact_gradients), strict=True
        ):
            own, theirs = error(mine, right), error(other, right)
            rounding = FP32_ROUNDINGS * (1 + abs(tau - 1) * (15 if problem_of is impossible else 1))
            if mine.dtype == torch.bfloat16:
                rounding = ONE_ROUNDING * torch.finfo(mine.dtype).eps
            bound = max(LUCK * theirs, rounding)
            assert own <= bound, f"{name}, tau {tau}, class weights {class_weights}: {own}, torch {theirs}"


def test_margins_of_rows_that_lie_together_far_from_the_origin() -> None:
    # As output weights come to lie: what all rows share moves no margin, and would drown those in the D × D form.
    problem = draw(61, 32, 211, dtype=torch.float32)
    problem.weight += 30 * torch.randn(32)
    problem.hidden /= 100
    problem.perturbed_hidden /= 100
    settings = {"loss": CompSum(nu=1.0), "perturbed_hidden": True, "reduction": "none"}
    exact, exact_gradients, upstream = solve(problem, implementation="reference", **settings)
    output, gradients, _ = solve(problem, upstream, **settings)
    assert error(output.loss, exact.loss) < 1e-5
    assert all(error(got, wanted) < 1e-5 for got, wanted in zip(gradients, exact_gradients, strict=True))


@pytest.mark.parametrize("margin", [3.0, 9.0, 14.0, 20.0])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_the_digits_of_near_certainty(margin: float, reduction: str) -> None:
    # p − 1 as a difference loses the digits that matter. Logits that fp32 holds exactly, so only the softmax is judged.
    vocab_size, tokens = 64, 40
    problem = draw(tokens, vocab_size, vocab_size, dtype=torch.float32)
    problem.weight = torch.eye(vocab_size)
    problem.hidden = torch.randint(-2, 3, (tokens, vocab_size)).float() / 4
    problem.hidden[torch.arange(tokens), problem.targets] = margin
    for tau in (0.0, 1.0, 1.4, 2.0):
        settings = {"reduction": reduction, "loss": CompSum(tau)}
        exact, exact_gradients, upstream = solve(problem, implementation="reference", **settings)
        output, gradients, _ = solve(problem, upstream, **settings)
        assert error(output.loss, exact.loss) < 1e-6
        assert all(error(got, wanted) < 2e-6 for got, wanted in zip(gradients, exact_gradients, strict=True))
