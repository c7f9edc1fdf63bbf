"""The custom operators by torch's own checks, and compiled: no break, no graph for each batch size, eager's values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from harness.kernels import OUTPUTS, CompSum, LossOutput, linear_cross_entropy
from harness.kernels.linear_cross_entropy import operator
from tests.kernels.cases import Problem, draw, relative_error

REDUCTIONS = ["mean", "sum", "none"]


@pytest.fixture
def compiler() -> Iterator[Callable[..., tuple[Callable[..., Any], CompileCounterWithBackend]]]:
    """Compiles a function whole; counts the graphs."""

    def compile_whole(function: Callable[..., Any], backend: str = "aot_eager") -> Any:
        counter = CompileCounterWithBackend(backend)
        return torch.compile(function, backend=counter, fullgraph=True), counter

    torch._dynamo.reset()
    yield compile_whole
    torch._dynamo.reset()


def some(tokens: int, dtype: torch.dtype = torch.float64) -> Problem:
    problem = draw(tokens, 5, 17, padding=2, ignored=0.2, dtype=dtype)
    for tensor in (problem.hidden, problem.weight, problem.bias):
        tensor.requires_grad_()
    return problem


def gradients_of(value: Tensor, problem: Problem) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, (problem.hidden, problem.weight, problem.bias), allow_unused=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("outputs", ["", ",".join(OUTPUTS)])
def test_torch_finds_the_operators_in_order(reduction: str, outputs: str) -> None:
    for needed, dtype in (([True, True, True], torch.float16), ([True, False, False], torch.float64)):
        problem = draw((3, 7), 5, 9, padding=2, dtype=dtype)
        leaves = [problem.hidden, problem.weight, problem.bias]
        terms = ("", 9, -100, 1, 1.4, 0.1, 0.01, 2.0, 1.3)
        inputs = (*leaves, problem.class_weights, problem.targets, problem.token_weights)
        upstream, rest = [torch.randn(3, 7, dtype=dtype) for _ in range(5)], (torch.float32, False, needed)
        torch.library.opcheck(operator.gradients_operator, (*inputs, *upstream, [], *terms, outputs, *rest))
        inputs = (*(x.requires_grad_(need) for x, need in zip(leaves, needed, strict=True)), *inputs[3:])
        # Handing over the gradients that the forward formed overwrites them: that a caller of the bare operator, as
        # this check's tracing is, would see. No one else has them.
        utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
        if reduction == "none" or outputs:
            utilities += ("test_aot_dispatch_dynamic",)
        arguments = (*inputs, *terms, reduction, outputs, torch.float32, False, None, False, needed)
        torch.library.opcheck(operator.loss_operator, arguments, test_utils=utilities)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("differentiated", [(), ("entropy", "lse")])
def test_one_graph_for_all_batch_sizes(reduction: str, differentiated: tuple[str, ...], compiler: Any) -> None:
    def total(problem: Problem, upstream: Tensor) -> Tensor:
        output = linear_cross_entropy(
            problem.hidden * 1.5, problem.weight, problem.targets, bias=problem.bias, shard=problem.shard,
            token_weights=problem.token_weights, class_weights=problem.class_weights, shift=1, loss=CompSum(1.4),
            reduction=reduction, outputs=differentiated,
        )  # fmt: skip
        parts = [output.loss, *(getattr(output, name) for name in differentiated)]
        return sum((i + 1) * (part * (upstream if part.dim() else 0.7)).sum() for i, part in enumerate(parts))

    compiled, counter = compiler(total)
    for tokens in (13, 7, 31, 2, 19):
        problem, upstream = some(tokens), torch.randn(tokens, dtype=torch.float64)
        value, exact = compiled(problem, upstream), total(problem, upstream)
        assert relative_error(value.detach(), exact.detach()) < 1e-14
        for got, wanted in zip(gradients_of(value, problem), gradients_of(exact, problem), strict=True):
            assert relative_error(got, wanted) < 1e-13
    assert counter.frame_count == 2  # the first size, and all others


def test_another_z_loss_is_not_the_old_one(compiler: Any) -> None:
    problem = some(7)

    def loss(z_loss: float) -> Tensor:
        return linear_cross_entropy(
            problem.hidden, problem.weight, problem.targets, shard=problem.shard, z_loss=z_loss
        ).loss

    compiled, _ = compiler(loss)
    for z_loss in (0.01, 0.0, 0.02, 0.01, 0.5):
        assert relative_error(compiled(z_loss).detach(), loss(z_loss).detach()) < 1e-14


def test_through_the_inductor(compiler: Any) -> None:
    def total(problem: Problem) -> Tensor:
        output = linear_cross_entropy(
            torch.tanh(problem.hidden), problem.weight, problem.targets, shard=problem.shard, outputs=("correct",)
        )
        return output.loss * 3 + output.correct.sum()

    compiled, counter = compiler(total, "inductor")
    problem = some(13)
    value, exact = compiled(problem), total(problem)
    assert counter.frame_count == 1
    assert relative_error(value.detach(), exact.detach()) < 1e-13
    for got, wanted in zip(gradients_of(value, problem)[:2], gradients_of(exact, problem)[:2], strict=True):
        assert relative_error(got, wanted) < 1e-13


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_second_use_of_a_compiled_graph_is_refused_or_right(reduction: str, compiler: Any) -> None:
    def both(problem: Problem) -> tuple[Tensor, Tensor]:
        output = linear_cross_entropy(
            problem.hidden, problem.weight, problem.targets, shard=problem.shard, reduction=reduction,
            outputs=("entropy",),
        )  # fmt: skip
        return output.loss.sum() * 0.3, output.entropy.sum()

    problem = some(11)
    compiled, _ = compiler(both)
    values, exact = compiled(problem), both(problem)
    refused = 0
    for index in (0, 1, 0):
        try:
            got = torch.autograd.grad(values[index], (problem.hidden, problem.weight), retain_graph=True)
        except RuntimeError:
            refused += 1
            continue
        fresh = both(problem)
        wanted = torch.autograd.grad(fresh[index], (problem.hidden, problem.weight))
        assert all(relative_error(g, w) < 1e-13 for g, w in zip(got, wanted, strict=True)), index
    assert refused <= 1, exact


def test_outputs_detached_in_the_graph_cost_nothing(compiler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.kernels.linear_cross_entropy import blocked

    sweeps: list[int] = []
    real = blocked.sweep
    monkeypatch.setattr(blocked, "sweep", lambda *rest: sweeps.append(1) or real(*rest))

    def both(problem: Problem) -> tuple[Tensor, Tensor]:
        output: LossOutput = linear_cross_entropy(
            problem.hidden, problem.weight, problem.targets, shard=problem.shard, outputs=("entropy",)
        )
        return output.loss * 0.3, output.entropy.detach()

    compiled, _ = compiler(both)
    compiled(some(11))
    sweeps.clear()
    problem = some(11)
    loss, entropy = compiled(problem)
    torch.autograd.grad(loss, (problem.hidden, problem.weight))
    assert len(sweeps) == 1
    assert entropy.shape == (11,)
