"""The blocked implementation against the float64 reference: values, all gradients, every output, every dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from harness.kernels import OUTPUTS, linear_cross_entropy
from tests.kernels.cases import draw, relative_error, solve

TERMS: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"token_weights": True},
    {"label_smoothing": 0.13},
    {"z_loss": 0.02},
    {"softcap": 1.3},
    {"temperature": 1.7},
    {"bias": True, "token_weights": True, "label_smoothing": 0.2, "z_loss": 0.01, "softcap": 4.0, "temperature": 0.6},
]
DTYPES = [
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("bfloat16", "float32"),
    ("float32", "bfloat16"),
    ("float64", "float32"),
]
REDUCTIONS = ["mean", "sum", "none"]


def name_terms(terms: dict[str, Any]) -> str:
    return "+".join(terms) or "plain"


@pytest.mark.parametrize("terms", TERMS, ids=name_terms)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equals_the_reference_in_float64(
    terms: dict[str, Any], reduction: str, chunk_tokens: int | None, host_sees: bool
) -> None:
    problem = draw(23, 11, 37, padding=3, ignored=0.3)
    exact, exact_gradients, upstream = solve(
        problem, implementation="reference", reduction=reduction, outputs=OUTPUTS, **terms
    )
    output, gradients, _ = solve(
        problem, upstream, implementation="blocked", reduction=reduction, outputs=OUTPUTS, **terms
    )
    assert output.loss.dtype == torch.float64
    assert relative_error(output.loss, exact.loss) < 1e-13
    for got, wanted in zip(gradients, exact_gradients, strict=True):
        assert relative_error(got, wanted) < 1e-13
        assert got.is_contiguous()
    for name in OUTPUTS:
        assert relative_error(getattr(output, name), getattr(exact, name)) < 1e-13
        assert getattr(output, name).requires_grad == (name != "correct")
    assert output.implementation == (
        "blocked, recomputed in the backward, 8 NVD" if reduction == "none" else "blocked, formed in the forward, 6 NVD"
    )


@pytest.mark.parametrize("terms", [TERMS[0], TERMS[-1]], ids=name_terms)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("hidden", "weight"), DTYPES)
def test_lower_precisions(
    terms: dict[str, Any], reduction: str, hidden: str, weight: str, chunk_tokens: int | None
) -> None:
    problem = draw(61, 32, 211, padding=2, ignored=0.2)
    problem.hidden = problem.hidden.to(getattr(torch, hidden))
    problem.weight = problem.weight.to(getattr(torch, weight))
    exact, exact_gradients, upstream = solve(problem, implementation="reference", reduction=reduction, **terms)
    output, gradients, _ = solve(problem, upstream, implementation="blocked", reduction=reduction, **terms)
    assert output.loss.dtype == (torch.float64 if "float64" in (hidden, weight) else torch.float32)
    assert relative_error(output.loss, exact.loss) < 1e-5
    # A gradient may be rounded to its dtype twice: once as it is formed, once as it is scaled by the upstream one.
    for got, wanted, leaf in zip(
        gradients, exact_gradients, (problem.hidden, problem.weight, problem.bias), strict=False
    ):
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


@pytest.mark.parametrize("terms", TERMS, ids=name_terms)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_are_the_slopes_of_the_loss(terms: dict[str, Any], reduction: str, chunk_tokens: int | None) -> None:
    problem = draw(4, 3, 5, padding=1)
    problem.targets[1] = -100
    settings = {key: value for key, value in terms.items() if key not in ("bias", "token_weights")}
    weights = problem.token_weights if "token_weights" in terms else None

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(
            hidden, weight, problem.targets, bias=bias, token_weights=weights, shard=problem.shard, reduction=reduction,
            **settings,
        ).loss  # fmt: skip

    leaves = [x.requires_grad_() for x in (problem.hidden, problem.weight, problem.bias)]
    if reduction == "none":
        assert torch.autograd.gradcheck(loss, leaves)
        return
    # gradcheck goes through one graph several times, which these reductions refuse: the same differences, by hand.
    for leaf, gradient in zip(leaves, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        flat = leaf.detach().view(-1)
        for i in range(len(flat)):
            value = flat[i].item()
            ends = []
            for step in (1e-6, -1e-6):
                flat[i] = value + step
                ends.append(loss(*leaves).item())
            flat[i] = value
            assert abs((ends[0] - ends[1]) / 2e-6 - gradient.view(-1)[i].item()) < 1e-6
