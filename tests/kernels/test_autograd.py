"""How it sits in a graph: what is computed for whom, second uses, recomputation, compiled surroundings, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from harness.kernels import OUTPUTS, linear_cross_entropy
from tests.kernels.cases import draw, relative_error, solve


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


def test_second_derivatives_are_refused() -> None:
    problem = draw(9, 4, 17)
    hidden = problem.hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, problem.weight, problem.targets).loss
    (gradient,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


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


def test_in_a_compiled_module(nets: tuple[Net, Net, Tensor]) -> None:
    net, reference, tokens = nets
    exact = gradients_of(reference, reference, tokens)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(net, backend=backend)
    for _ in range(3):
        for got, wanted in zip(gradients_of(compiled, net, tokens), exact, strict=True):
            assert relative_error(got, wanted) < 1e-12
    assert compiled(tokens).item() == pytest.approx(reference(tokens).item(), rel=1e-12)
    # The surroundings are compiled, and nothing of the loss is, not even in pieces.
    assert any("tanh" in graph for graph in graphs)
    assert not any(name in graph for graph in graphs for name in ("softmax", "nonzero", "amax", "ignore"))
    torch._dynamo.reset()


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


def allocations(work: Callable[[], object]) -> list[int]:
    """Bytes of every allocation (positive) and release (negative) on the CPU, in order."""

    def walk(nodes: list[Any]) -> Iterator[Any]:
        for node in nodes:
            yield node
            yield from walk(node.children)

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True, with_stack=True) as traced:
        work()
    events = [
        event
        for event in walk(traced.profiler.kineto_results.experimental_event_tree())
        if type(event.extra_fields).__name__ == "_ExtraFields_Allocation"
    ]
    return [event.extra_fields.alloc_size for event in sorted(events, key=lambda event: event.start_time_ns)]


def peak_bytes(work: Callable[[], object]) -> int:
    live = peak = 0
    for size in allocations(work):
        live += size
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_memory_is_a_chunk_whatever_the_tokens(reduction: str) -> None:
    vocab_size, dim = 1500, 8
    weight = torch.randn(vocab_size, dim, requires_grad=True)
    beyond_results = {}
    for tokens in (2048, 6144):
        hidden = torch.randn(tokens, dim, requires_grad=True)
        targets = torch.randint(0, vocab_size, (tokens,))

        def work(hidden: Tensor = hidden, targets: Tensor = targets) -> None:
            weight.grad = hidden.grad = None
            loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction).loss
            loss.backward(torch.full_like(loss, 0.3))

        peak = peak_bytes(work)
        assert peak > 1024 * vocab_size * 4  # the profiler sees the chunk at all
        beyond_results[tokens] = peak - 4 * (hidden.numel() + weight.numel())
    chunk_bytes = 1024 * vocab_size * 4
    assert max(beyond_results.values()) < 1.15 * chunk_bytes
    # What grows with the tokens is a few numbers each, far from a row of logits.
    assert beyond_results[6144] - beyond_results[2048] < 4096 * 64


def test_the_weight_gradient_is_handed_over_not_copied() -> None:
    weight = torch.randn(40_000, 32, requires_grad=True)
    hidden, targets = torch.randn(16, 32), torch.randint(0, 40_000, (16,))

    def work() -> None:
        (linear_cross_entropy(hidden, weight, targets, reduction="mean").loss * 0.5).backward()

    chunk_bytes = 16 * 40_000 * 4
    assert peak_bytes(work) < 1.05 * weight.numel() * 4 + chunk_bytes
