"""The blocked implementation against the float64 reference: dtypes, sizes, strides. (test_pairs.py has the terms.)"""

from __future__ import annotations

import pytest
import torch

from harness.kernels import OUTPUTS, linear_cross_entropy
from tests.kernels.cases import draw, relative_error, solve

DTYPES = [
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("bfloat16", "float32"),
    ("float32", "bfloat16"),
    ("float64", "float32"),
]
REDUCTIONS = ["mean", "sum", "none"]


def test_what_ran_and_what_it_costs() -> None:
    problem = draw(5, 3, 7)
    for reduction, how in (("none", "recomputed in the backward, 8"), ("mean", "formed in the forward, 6")):
        output, _, _ = solve(problem, reduction=reduction, outputs=OUTPUTS)
        assert output.implementation == f"blocked, {how} NVD"
        for name in OUTPUTS:
            assert getattr(output, name).requires_grad == (name != "correct")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("hidden", "weight"), DTYPES)
def test_dtypes_of_results(reduction: str, hidden: str, weight: str) -> None:
    problem = draw(61, 32, 211, padding=2, ignored=0.2)
    problem.hidden = problem.hidden.to(getattr(torch, hidden))
    problem.weight = problem.weight.to(getattr(torch, weight))
    exact, exact_gradients, upstream = solve(problem, implementation="reference", reduction=reduction)
    output, gradients, _ = solve(problem, upstream, implementation="blocked", reduction=reduction, outputs=OUTPUTS)
    double = "float64" in (hidden, weight)
    assert {getattr(output, name).dtype for name in ("loss", *OUTPUTS[:-1])} == {
        torch.float64 if double else torch.float32
    }
    assert output.correct.dtype == torch.bool
    assert relative_error(output.loss, exact.loss) < (1e-12 if double else 1e-5)
    # A gradient is rounded to its dtype once, at the end: here, and in the reference.
    for got, wanted, leaf in zip(gradients, exact_gradients, (problem.hidden, problem.weight), strict=True):
        assert got.dtype == leaf.dtype
        assert relative_error(got, wanted) < 2e-5 + 1.01 * torch.finfo(leaf.dtype).eps


@pytest.mark.parametrize("upstream", [1.0, 1 / 3])
def test_a_16_bit_gradient_is_not_scaled_by_a_16_bit_factor(upstream: float) -> None:
    # A factor rounded to bf16 would shift all elements the same way, and not average out.
    problem = draw(64, 64, 100, dtype=torch.bfloat16)
    scalar = torch.tensor(upstream * 1.003)
    _, (got, _), _ = solve(problem, scalar, reduction="sum")
    _, (exact, _), _ = solve(problem, scalar, reduction="sum", implementation="reference")
    slope = (got.double() * exact.double()).sum() / exact.double().square().sum()
    assert abs(slope.item() - 1) < 3e-4


@pytest.mark.parametrize("tokens", [1, 2, 127])
@pytest.mark.parametrize("vocab_size", [1, 2, 131])
@pytest.mark.parametrize("dim", [1, 17])
def test_odd_sizes(tokens: int, vocab_size: int, dim: int) -> None:
    problem = draw(tokens, dim, vocab_size)
    exact, exact_gradients, upstream = solve(problem, implementation="reference", reduction="none", z_loss=0.1)
    output, gradients, _ = solve(problem, upstream, reduction="none", z_loss=0.1)
    assert relative_error(output.loss, exact.loss) < 1e-13
    for got, wanted in zip(gradients, exact_gradients, strict=True):
        assert relative_error(got, wanted) < 1e-12


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_three_dimensional_strided_hidden(reduction: str, chunk_tokens: int | None) -> None:
    targets = torch.randint(0, 13, (3, 5))
    weight = torch.randn(13, 6, dtype=torch.float64)
    base = torch.randn(6, 5, 3, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn((3, 5) if reduction == "none" else (), dtype=torch.float64)
    results = []
    for implementation in ("blocked", "reference"):
        hidden = base.transpose(0, 2)
        assert not hidden.is_contiguous()
        output = linear_cross_entropy(
            hidden, weight, targets, reduction=reduction, implementation=implementation, outputs=("lse", "correct")
        )
        assert output.lse.shape == output.correct.shape == (3, 5)
        assert output.entropy is None
        assert output.loss.shape == upstream.shape
        results.append((output, torch.autograd.grad(output.loss, base, upstream)[0]))
    assert relative_error(results[0][0].loss, results[1][0].loss) < 1e-13
    assert relative_error(results[0][1], results[1][1]) < 1e-13


def test_weight_may_be_a_view_with_strides() -> None:
    problem = draw(9, 8, 21)
    problem.weight = torch.randn(8, 42, dtype=torch.float64).T[::2]
    _, exact, upstream = solve(problem, implementation="reference", reduction="mean")
    _, gradients, _ = solve(problem, upstream, reduction="mean")
    for got, wanted in zip(gradients, exact, strict=True):
        assert relative_error(got, wanted) < 1e-13
