"""Gradients against finite differences of the function itself, in float64: the one truth that needs no reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from harness.kernels import CompSum, linear_cross_entropy
from tests.kernels.cases import DIFFERENTIABLE, draw

TERMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cross-entropy": {"label_smoothing": 0.2, "z_loss": 0.01, "softcap": 4.0, "temperature": 0.6, "shift": 1},
    "sum-exponential": {"loss": CompSum(0.0, rho=1.5, nu=0.4), "label_smoothing": 0.1},
    "generalised": {"loss": CompSum.generalized_cross_entropy(), "label_smoothing": 0.1, "softcap": 2.0},
}


def losses_and_outputs(reduction: str, terms: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """A function of hidden, weight, bias and perturbed_hidden to loss and (for none) outputs; and its inputs."""
    problem = draw((2, 3), 3, 5, padding=1)
    problem.targets[1, 2] = -100
    names = DIFFERENTIABLE if reduction == "none" else ()
    adversarial = getattr(terms.get("loss"), "nu", 0.0) > 0

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor, perturbed_hidden: Tensor) -> tuple[Tensor, ...]:
        output = linear_cross_entropy(
            hidden, weight, problem.targets, bias=bias, class_weights=problem.class_weights,
            token_weights=problem.token_weights, perturbed_hidden=perturbed_hidden if adversarial else None,
            shard=problem.shard, reduction=reduction, outputs=names, **terms,
        )  # fmt: skip
        return (output.loss, *(getattr(output, name) for name in names))

    inputs = [problem.hidden, problem.weight, problem.bias, problem.perturbed_hidden]
    return compute, [x.requires_grad_(i < 3 or adversarial) for i, x in enumerate(inputs)]


@pytest.mark.parametrize("terms", TERMS)
def test_gradcheck_of_losses_and_outputs(terms: str, chunk_tokens: int | None) -> None:
    assert torch.autograd.gradcheck(*losses_and_outputs("none", TERMS[terms]))


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_slopes_of_reduced_losses(terms: str, reduction: str, chunk_tokens: int | None) -> None:
    # gradcheck goes through one graph several times, which these reductions refuse: the same differences, by hand.
    compute, leaves = losses_and_outputs(reduction, TERMS[terms])
    needing = [leaf for leaf in leaves if leaf.requires_grad]
    for leaf, gradient in zip(needing, torch.autograd.grad(compute(*leaves)[0], needing), strict=True):
        flat = leaf.detach().view(-1)
        for i in range(len(flat)):
            value = flat[i].item()
            ends = []
            for step in (1e-6, -1e-6):
                flat[i] = value + step
                ends.append(compute(*leaves)[0].item())
            flat[i] = value
            # The differences are good to the rounding of their ends.
            off = 1e-6 * max(1.0, abs(ends[0]))
            assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(gradient.view(-1)[i].item(), rel=1e-6, abs=off)
