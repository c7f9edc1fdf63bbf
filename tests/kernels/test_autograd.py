"""How it sits in a graph: what is computed for whom, second uses, recomputation."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from harness.kernels import OUTPUTS, linear_cross_entropy
from harness.kernels.linear_cross_entropy import blocked
from tests.kernels.cases import differentiate, draw, relative_error, solve


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_grad_gives_the_same_loss_for_a_third_of_the_work(reduction: str) -> None:
    problem = draw(9, 4, 17, ignored=0.2)
    hidden, weight = problem.hidden.requires_grad_(), problem.weight.requires_grad_()
    settings = {"reduction": reduction, "outputs": OUTPUTS, "softcap": 2.0}
    with_graph = linear_cross_entropy(hidden, weight, problem.targets, **settings)
    with torch.no_grad():
        under_no_grad = linear_cross_entropy(hidden, weight, problem.targets, **settings)
        reference = linear_cross_entropy(hidden, weight, problem.targets, implementation="reference", **settings)
    detached = linear_cross_entropy(hidden.detach(), weight.detach(), problem.targets, **settings)
    assert reference.implementation == "reference, 2 NVD"
    for output in (under_no_grad, detached):
        assert output.implementation == "blocked, 2 NVD"
        assert not output.loss.requires_grad
        for name in ("loss", *OUTPUTS):
            assert torch.equal(getattr(output, name), getattr(with_graph, name))


@pytest.mark.parametrize(
    ("reduction", "nvd"), [("sum", "formed in the forward, 4"), ("none", "recomputed in the backward, 6")]
)
@pytest.mark.parametrize("needs", ["hidden", "weight"])
def test_only_the_gradients_that_are_needed(reduction: str, nvd: str, needs: str) -> None:
    problem = draw(9, 4, 17, ignored=0.2)
    _, exact, upstream = solve(problem, reduction=reduction, implementation="reference")
    leaves = {"hidden": problem.hidden, "weight": problem.weight}
    leaves[needs].requires_grad_()
    output = linear_cross_entropy(**leaves, targets=problem.targets, reduction=reduction)
    assert output.implementation == f"blocked, {nvd} NVD"
    output.loss.backward(upstream)
    assert relative_error(leaves[needs].grad, exact[needs == "weight"]) < 1e-13
    assert [leaf.grad is None for name, leaf in leaves.items() if name != needs] == [True]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_second_backward_is_refused(reduction: str) -> None:
    problem = draw(9, 4, 17)
    hidden = problem.hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, problem.weight, problem.targets, reduction=reduction).loss
    loss.backward(retain_graph=True)
    first = hidden.grad.clone()
    with pytest.raises(RuntimeError, match="second backward through one loss"):
        loss.backward()
    assert torch.equal(hidden.grad, first)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_outputs_one_after_the_other(reduction: str) -> None:
    problem = draw(9, 4, 17, ignored=0.2)
    _, exact, upstream = differentiate(
        problem, ("loss", "entropy", "lse"), reduction=reduction, outputs=("entropy", "lse"), implementation="reference"
    )
    leaves = problem.hidden.requires_grad_(), problem.weight.requires_grad_()
    output = linear_cross_entropy(*leaves, problem.targets, reduction=reduction, outputs=("entropy", "lse"))
    output.loss.backward(upstream["loss"], retain_graph=True)
    (output.entropy * upstream["entropy"]).sum().backward(retain_graph=True)
    (output.lse * upstream["lse"]).sum().backward()
    for leaf, wanted in zip(leaves, exact, strict=True):
        assert relative_error(leaf.grad, wanted) < 1e-13


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("fields", "sweeps"), [(("loss",), 1), (("loss", "entropy"), 2), (("entropy", "max_prob"), 2), (("logprob",), 2)]
)
def test_outputs_cost_a_second_pass_only_where_they_are_differentiated(
    reduction: str, fields: tuple[str, ...], sweeps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, made = draw(9, 4, 17, ignored=0.2), []
    _, exact, upstream = differentiate(
        problem, fields, reduction=reduction, outputs=OUTPUTS, implementation="reference"
    )
    real = blocked.sweep
    monkeypatch.setattr(blocked, "sweep", lambda *arguments: made.append(1) or real(*arguments))
    _, gradients, _ = differentiate(problem, fields, upstream, reduction=reduction, outputs=OUTPUTS)
    assert len(made) == (2 if reduction == "none" else sweeps)
    assert all(relative_error(got, wanted) < 1e-13 for got, wanted in zip(gradients, exact, strict=True))


def test_a_loss_used_with_its_outputs_cannot_be_used_again_by_itself() -> None:
    problem = draw(9, 4, 17)
    output = linear_cross_entropy(problem.hidden.requires_grad_(), problem.weight, problem.targets, outputs=("lse",))
    output.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward through one loss"):
        (output.loss + output.lse.sum()).backward()


def test_a_second_backward_of_unreduced_losses_is_right() -> None:
    problem = draw(9, 4, 17)
    hidden = problem.hidden.requires_grad_()
    losses = linear_cross_entropy(hidden, problem.weight, problem.targets, reduction="none").loss
    for _ in range(2):
        _, (exact, _), upstream = solve(problem, reduction="none", implementation="reference")
        (got,) = torch.autograd.grad(losses, hidden, upstream, retain_graph=True)
        assert relative_error(got, exact) < 1e-13


def test_unreduced_losses_notice_a_weight_changed_before_the_backward() -> None:
    problem = draw(9, 4, 17)
    weight = problem.weight.requires_grad_()
    losses = linear_cross_entropy(problem.hidden, weight, problem.targets, reduction="none").loss
    with torch.no_grad():
        weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reduced_losses_do_not_keep_what_they_no_longer_need(reduction: str) -> None:
    problem = draw(9, 4, 17)
    _, (_, exact), _ = solve(problem, torch.tensor(1.0), reduction=reduction, implementation="reference")
    weight, hidden = problem.weight.requires_grad_(), problem.hidden.clone()
    kept = weakref.ref(hidden)
    loss = linear_cross_entropy(hidden, weight, problem.targets, reduction=reduction, outputs=("correct",)).loss
    del hidden
    assert kept() is None
    with torch.no_grad():
        weight.mul_(2.0)
    loss.backward()
    assert relative_error(weight.grad, exact) < 1e-13


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_are_refused(reduction: str) -> None:
    problem = draw(9, 4, 17)
    hidden = problem.hidden.requires_grad_()
    for power in (1, 2):  # with 1 the upstream gradient depends on nothing, but the gradient still does
        loss = linear_cross_entropy(hidden, problem.weight, problem.targets, reduction=reduction).loss
        (gradient,) = torch.autograd.grad(loss.pow(power).sum(), hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            (gradient.square().sum() + loss.detach().sum()).backward()


def test_forward_mode_is_refused() -> None:
    problem = draw(9, 4, 17)

    def loss(hidden: Tensor, implementation: str = "blocked") -> Tensor:
        return linear_cross_entropy(hidden, problem.weight, problem.targets, implementation=implementation).loss

    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(loss, (problem.hidden,), (problem.hidden,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        loss(forward_ad.make_dual(problem.hidden, problem.hidden))
    with forward_ad.dual_level():
        loss(problem.hidden)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_results_may_be_changed_in_place(reduction: str) -> None:
    problem = draw(9, 4, 17)
    hidden = problem.hidden.requires_grad_()
    gradients = []
    for in_place in (False, True):
        output = linear_cross_entropy(hidden, problem.weight, problem.targets, reduction=reduction, outputs=("lse",))
        loss = output.loss.mul_(3.0) if in_place else output.loss * 3.0
        lse = output.lse.add_(1.0).square_() if in_place else (output.lse + 1.0).square()
        gradients.append(torch.autograd.grad(loss.sum() + lse.sum(), hidden)[0])
    assert torch.equal(*gradients)


class Net(nn.Module):
    """A head tied to its embedding, so the weight's gradient has two sources."""

    def __init__(self, reduction: str, implementation: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(41, 8, dtype=torch.float64)
        self.middle = nn.Linear(8, 8, dtype=torch.float64)
        self.settings: dict[str, Any] = {"reduction": reduction, "implementation": implementation}

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.middle(self.embedding(tokens[:, :-1])))
        loss = linear_cross_entropy(hidden, self.embedding.weight, tokens[:, 1:], **self.settings).loss
        return loss * 0.7 if loss.dim() == 0 else (loss * torch.arange(loss.shape[1])).sum()


def gradients_of(call: Callable[[Tensor], Tensor], net: Net, tokens: Tensor) -> list[Tensor]:
    net.zero_grad(set_to_none=True)
    call(tokens).backward()
    return [parameter.grad for parameter in net.parameters()]


@pytest.fixture(params=["sum", "none"])
def nets(request: pytest.FixtureRequest) -> tuple[Net, Net, Tensor]:
    net, reference = Net(request.param, "blocked"), Net(request.param, "reference")
    reference.load_state_dict(net.state_dict())
    return net, reference, torch.randint(0, 41, (3, 12))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_activation_recomputation(nets: tuple[Net, Net, Tensor], use_reentrant: bool) -> None:
    net, reference, tokens = nets
    exact = gradients_of(reference, reference, tokens)
    needs_grad = torch.zeros((), requires_grad=True)  # reentrant checkpoints want an input that needs a gradient

    def call(tokens: Tensor) -> Tensor:
        return checkpoint(lambda tokens, _: net(tokens), tokens, needs_grad, use_reentrant=use_reentrant)

    for got, wanted in zip(gradients_of(call, net, tokens), exact, strict=True):
        assert relative_error(got, wanted) < 1e-12


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_autocast_does_not_reach_inside(reduction: str) -> None:
    problem = draw(33, 16, 50, ignored=0.3, dtype=torch.float32)
    exact, exact_gradients, upstream = solve(problem, reduction=reduction, implementation="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, gradients, _ = solve(problem, upstream, reduction=reduction)
    assert output.loss.dtype == torch.float32
    assert relative_error(output.loss, exact.loss) < 1e-5
    for got, wanted in zip(gradients, exact_gradients, strict=True):
        assert relative_error(got, wanted) < 1e-5
