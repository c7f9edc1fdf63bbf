"""The float64 reference against torch's own functions, which it shares no line with."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from harness.kernels import OUTPUTS
from tests.kernels.cases import draw, relative_error, solve


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.17])
def test_equals_torch_cross_entropy(reduction: str, label_smoothing: float) -> None:
    problem = draw(31, 7, 53, padding=5, ignored=0.3)
    output, gradients, upstream = solve(
        problem, reduction=reduction, label_smoothing=label_smoothing, implementation="reference", bias=True
    )
    leaves = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight, problem.bias)]
    logits = F.linear(leaves[0], leaves[1][:53], leaves[2][:53])
    loss = F.cross_entropy(logits, problem.targets, reduction=reduction, label_smoothing=label_smoothing)
    torch.testing.assert_close(output.loss, loss, rtol=1e-12, atol=1e-12)
    for got, exact in zip(gradients, torch.autograd.grad(loss, leaves, upstream), strict=True):
        assert relative_error(got, exact) < 1e-12


def test_softcap_temperature_z_loss_and_weights_by_their_formulas() -> None:
    problem = draw(19, 5, 23)
    settings = {"softcap": 1.5, "temperature": 0.7, "z_loss": 0.03, "reduction": "mean"}
    output, gradients, upstream = solve(problem, implementation="reference", token_weights=True, **settings)
    leaves = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight)]
    capped = 1.5 * torch.tanh(leaves[0] @ leaves[1].T / 1.5) / 0.7
    log_normaliser = capped.exp().sum(-1).log()
    label = capped[torch.arange(19), problem.targets]
    losses = log_normaliser - label + 0.03 * log_normaliser**2
    loss = (problem.token_weights * losses).sum() / problem.token_weights.sum()
    torch.testing.assert_close(output.loss, loss, rtol=1e-12, atol=1e-12)
    for got, exact in zip(gradients, torch.autograd.grad(loss, leaves, upstream), strict=True):
        assert relative_error(got, exact) < 1e-12


def test_outputs_are_those_of_the_distribution() -> None:
    problem = draw(17, 6, 29, ignored=0.2)
    output, _, _ = solve(problem, implementation="reference", outputs=OUTPUTS)
    logits = problem.hidden @ problem.weight.T
    kept = problem.targets != -100
    chosen = torch.distributions.Categorical(logits=logits)
    exact = {
        "lse": logits.exp().sum(-1).log(),
        "logprob": chosen.log_prob(problem.targets.clamp(min=0)),
        "entropy": chosen.entropy(),
        "max_prob": chosen.probs.max(-1).values,
    }
    for name, values in exact.items():
        torch.testing.assert_close(getattr(output, name), torch.where(kept, values, 0.0), rtol=1e-12, atol=1e-12)
    assert torch.equal(output.correct, (logits.argmax(-1) == problem.targets) & kept)
    assert output.implementation == "reference, 6 NVD"
