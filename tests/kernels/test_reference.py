"""The float64 reference against torch's own functions and closed forms, which it shares no line with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.kernels import OUTPUTS, CompSum
from tests.kernels.cases import Problem, differentiate, draw, relative_error, solve


def leaves_of(problem: Problem) -> list[Tensor]:
    return [x.clone().requires_grad_() for x in (problem.hidden, problem.weight, problem.bias)]


def judge(got: tuple[Any, list[Tensor], Tensor], loss: Tensor, leaves: list[Tensor]) -> None:
    """The reference's loss and gradients are those of `loss`, which torch differentiates."""
    output, gradients, upstream = got
    torch.testing.assert_close(output.loss, loss, rtol=1e-12, atol=1e-12)
    exact = torch.autograd.grad(loss, leaves[: len(gradients)], upstream)
    for mine, torchs in zip(gradients, exact, strict=True):
        assert relative_error(mine, torchs) < 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.17, 1.0])
@pytest.mark.parametrize("class_weights", [False, True])
def test_equals_torch_cross_entropy(reduction: str, label_smoothing: float, class_weights: bool) -> None:
    problem = draw(31, 7, 53, padding=5, ignored=0.3)
    problem.class_weights[:20] = 0.0
    got = solve(
        problem, reduction=reduction, label_smoothing=label_smoothing, implementation="reference", bias=True,
        class_weights=class_weights,
    )  # fmt: skip
    leaves = leaves_of(problem)
    logits = F.linear(leaves[0], leaves[1][:53], leaves[2][:53])
    weight = problem.class_weights if class_weights else None
    loss = F.cross_entropy(logits, problem.targets, weight=weight, reduction=reduction, label_smoothing=label_smoothing)
    judge(got, loss, leaves)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_shift_is_a_slice_of_hidden_and_targets(reduction: str) -> None:
    problem = draw((3, 8), 5, 11, ignored=0.2)
    output, gradients, upstream = solve(
        problem, reduction=reduction, shift=2, token_weights=True, implementation="reference"
    )
    leaves = leaves_of(problem)
    logits, targets = leaves[0][:, :-2] @ leaves[1].T, problem.targets[:, 2:]
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none") * problem.token_weights[:, 2:]
    loss = F.pad(losses, (0, 2)) if reduction == "none" else losses.sum()
    if reduction == "mean":
        loss = loss / (problem.token_weights[:, 2:] * (targets != -100)).sum()
    judge((output, gradients, upstream), loss, leaves)


def test_softcap_temperature_z_loss_and_weights_by_their_formulas() -> None:
    problem = draw(19, 5, 23)
    settings = {"softcap": 1.5, "temperature": 0.7, "z_loss": 0.03, "reduction": "mean", "class_weights": True}
    got = solve(problem, implementation="reference", token_weights=True, **settings)
    leaves = leaves_of(problem)
    capped = 1.5 * torch.tanh(leaves[0] @ leaves[1].T / 1.5) / 0.7
    log_normaliser = capped.exp().sum(-1).log()
    label = capped[torch.arange(19), problem.targets]
    classes = problem.class_weights[problem.targets]
    losses = classes * (log_normaliser - label) + 0.03 * log_normaliser**2
    judge(got, (problem.token_weights * losses).sum() / (problem.token_weights * classes).sum(), leaves)


@pytest.mark.parametrize(
    ("loss", "closed_form"),
    [
        (CompSum.sum_exponential(), lambda p: 1 / p - 1),
        (CompSum(0.5), lambda p: 2 * (p**-0.5 - 1)),
        (CompSum.logistic(), lambda p: -p.log()),
        (CompSum.generalized_cross_entropy(0.4), lambda p: (1 - p**0.4) / 0.4),
        (CompSum.generalized_cross_entropy(), lambda p: (1 - p**0.7) / 0.7),
        (CompSum.mean_absolute_error(), lambda p: 1 - p),
        (CompSum(3.5), lambda p: (1 - p**2.5) / 2.5),
    ],
)
def test_comp_sum_losses_by_their_closed_forms(loss: CompSum, closed_form: Any) -> None:
    problem = draw(19, 5, 23, ignored=0.2)
    got = solve(
        problem, implementation="reference", reduction="sum", loss=loss, class_weights=True, label_smoothing=0.2
    )
    leaves = leaves_of(problem)
    kept = problem.targets >= 0
    values = problem.class_weights * closed_form((leaves[0] @ leaves[1].T).softmax(-1)[kept])
    label = values.gather(1, problem.targets[kept, None]).squeeze(1)
    judge(got, (0.8 * label + 0.2 * values.mean(1)).sum(), leaves)


def test_comp_sum_tends_to_the_cross_entropy() -> None:
    problem = draw(19, 5, 23)
    exact, exact_gradients, upstream = solve(problem, implementation="reference")
    for step in (1e-7, -1e-7):
        output, gradients, _ = solve(problem, upstream, implementation="reference", loss=CompSum(1 + step))
        assert 1e-10 < relative_error(output.loss, exact.loss) < 1e-5
        assert all(relative_error(got, e) < 1e-5 for got, e in zip(gradients, exact_gradients, strict=True))


def test_comp_sum_keeps_its_digits_at_both_ends() -> None:
    # Of p near 0 and near 1: expm1(x) has the value of exp(x) − 1, but torch's derivative of it has not that of exp.
    problem = draw(2, 1, 2)
    problem.hidden, problem.weight = torch.ones(2, 1).double(), torch.tensor([[0.0], [60.0]]).double()
    problem.targets = torch.tensor([0, 1])
    for tau in (0.0, 0.5, 1.4, 2.0):
        output, (hidden_grad, _), _ = solve(
            problem, torch.ones(2), implementation="reference", loss=CompSum(tau), reduction="none"
        )
        surprise = torch.tensor([60.0]).double()
        exact = torch.expm1((1 - tau) * surprise) / (1 - tau)
        assert relative_error(output.loss[:1], exact) < 1e-14
        assert relative_error(hidden_grad[:1, 0], 60 * ((1 - tau) * surprise).exp()) < 1e-12


@pytest.mark.parametrize("rho", [1.0, 1.7])
def test_the_adversarial_term_by_explicit_margins(rho: float) -> None:
    problem = draw(19, 5, 23, padding=2)
    settings = {"loss": CompSum(1.4, rho=rho, nu=0.6), "temperature": 0.8, "reduction": "mean", "token_weights": True}
    output, gradients, upstream = differentiate(
        problem, implementation="reference", perturbed_hidden=True, bias=True, **settings
    )
    leaves = [*leaves_of(problem), problem.perturbed_hidden.clone().requires_grad_()]
    logits = [F.linear(x, leaves[1][:23], leaves[2][:23]) for x in (leaves[0], leaves[3])]
    rows = torch.arange(19)
    moved = [(x[rows, problem.targets][:, None] - x) for x in logits]
    probability = (logits[0] / rho / 0.8).softmax(-1)[rows, problem.targets]
    losses = (1 - probability**0.4) / 0.4 + 0.6 * (moved[1] - moved[0]).square().sum(-1).sqrt()
    loss = (losses * problem.token_weights).sum() / problem.token_weights.sum()
    judge((output, gradients, upstream["loss"]), loss, leaves)


def test_outputs_are_those_of_the_distribution() -> None:
    problem = draw(17, 6, 29, ignored=0.2)
    settings = {"implementation": "reference", "outputs": OUTPUTS}
    fields = ("lse", "logprob", "entropy", "max_prob")
    output, gradients, upstream = differentiate(problem, fields, **settings)
    leaves = leaves_of(problem)[:2]
    logits = leaves[0] @ leaves[1].T
    kept = problem.targets != -100
    chosen = torch.distributions.Categorical(logits=logits)
    exact = {
        "lse": logits.exp().sum(-1).log(),
        "logprob": chosen.log_prob(problem.targets.clamp(min=0)),
        "entropy": chosen.entropy(),
        "max_prob": chosen.probs.max(-1).values,
    }
    exact = {name: torch.where(kept, values, 0.0) for name, values in exact.items()}
    for name, values in exact.items():
        torch.testing.assert_close(getattr(output, name), values, rtol=1e-12, atol=1e-12)
    from_above = [upstream[name] for name in fields]
    wanted = torch.autograd.grad([exact[name] for name in fields], leaves, from_above)
    assert all(relative_error(got, want) < 1e-12 for got, want in zip(gradients, wanted, strict=True))
    assert torch.equal(output.correct, (logits.argmax(-1) == problem.targets) & kept)
    assert output.implementation == "reference, 6 NVD"
