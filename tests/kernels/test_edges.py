"""The ugly cases: nothing to predict, certainty, huge logits, padding, NaN where it must not matter."""

from __future__ import annotations

import pytest
import torch

from harness.kernels import OUTPUTS, CompSum, VocabShard, linear_cross_entropy
from tests.kernels.cases import Problem, draw, relative_error, solve

REDUCTIONS = ["mean", "sum", "none"]
IMPLEMENTATIONS = ["blocked", "reference"]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", [0, 7])
def test_nothing_to_predict_gives_zero(reduction: str, implementation: str, tokens: int, host_sees: bool) -> None:
    problem = draw(tokens, 5, 11, padding=2)
    problem.targets.fill_(-100)
    output, gradients, _ = solve(
        problem, reduction=reduction, implementation=implementation, outputs=OUTPUTS, bias=True, token_weights=True
    )
    assert output.loss.shape == ((tokens,) if reduction == "none" else ())
    assert output.loss.eq(0).all()
    for gradient in gradients:
        assert gradient.eq(0).all()
    for name in OUTPUTS:
        assert getattr(output, name).shape == (tokens,)
        assert getattr(output, name).eq(0).all()
    assert output.correct.dtype == torch.bool


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("weights", ["token_weights", "class_weights"])
def test_mean_of_weights_that_sum_to_zero_is_zero(implementation: str, weights: str) -> None:
    problem = draw(7, 5, 11)
    getattr(problem, weights).zero_()
    output, gradients, _ = solve(problem, reduction="mean", implementation=implementation, **{weights: True})
    assert output.loss.item() == 0
    assert all(gradient.eq(0).all() for gradient in gradients)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_tokens_may_hold_nan(reduction: str, host_sees: bool, chunk_tokens: int | None) -> None:
    problem = draw(16, 5, 11, ignored=0.5)
    problem.targets[0], problem.targets[1] = 3, -100
    exact, exact_gradients, upstream = solve(problem, reduction=reduction, implementation="reference")
    ignored = problem.targets == -100
    problem.hidden[ignored] = float("nan")
    problem.token_weights = torch.ones(16, dtype=torch.float64).masked_fill(ignored, float("nan"))
    output, gradients, _ = solve(problem, upstream, reduction=reduction, token_weights=True)
    assert relative_error(output.loss, exact.loss) < 1e-13
    for got, wanted in zip(gradients, exact_gradients, strict=True):
        assert relative_error(got, wanted) < 1e-13


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_shift_beyond_the_sequence_leaves_nothing(reduction: str, implementation: str) -> None:
    problem = draw((3, 4), 5, 11)
    for shift in (4, 9):
        output, gradients, _ = solve(problem, reduction=reduction, implementation=implementation, shift=shift)
        assert output.loss.eq(0).all()
        assert all(gradient.eq(0).all() for gradient in gradients)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_changes_where_the_perturbation_is_nothing(reduction: str) -> None:
    problem = draw(13, 5, 11, ignored=0.2)
    problem.perturbed_hidden = problem.hidden.clone()
    exact, exact_gradients, upstream = solve(problem, reduction=reduction)
    output, gradients, _ = solve(problem, upstream, reduction=reduction, loss=CompSum(nu=0.7), perturbed_hidden=True)
    assert torch.equal(output.loss, exact.loss)
    assert all(torch.equal(got, wanted) for got, wanted in zip(gradients, exact_gradients, strict=False))
    assert gradients[2].eq(0).all()


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.4, 2.0])
def test_an_impossible_target_is_infinite_below_tau_1_and_harmless_above(tau: float) -> None:
    problem = draw(5, 2, 7, dtype=torch.float32)
    problem.hidden /= 10
    problem.weight[:2], problem.targets[0], problem.targets[1:] = torch.tensor([[10.0], [-10.0]]), 1, 3
    problem.hidden[0] = 500.0
    output, gradients, _ = solve(problem, torch.ones(5), reduction="none", loss=CompSum(tau))
    if tau < 1:
        assert output.loss[0] == float("inf")
    else:
        assert output.loss[0].item() == pytest.approx(1 / (tau - 1))
        assert all(gradient.isfinite().all() for gradient in gradients)
    assert output.loss[1:].isfinite().all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_an_fp16_gradient_may_pass_through_numbers_beyond_fp16(reduction: str) -> None:
    problem = draw(7, 4, 11)
    problem.hidden, problem.token_weights = problem.hidden.half(), torch.full((7,), 1e5)
    settings = {"reduction": reduction, "token_weights": True}
    upstream = torch.full((7,) if reduction == "none" else (), 1e-5)
    _, exact, _ = solve(problem, upstream, implementation="reference", **settings)
    _, gradients, _ = solve(problem, upstream, **settings)
    assert all(relative_error(got, wanted) < 1e-3 for got, wanted in zip(gradients, exact, strict=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_rows_take_no_probability_and_no_gradient(
    reduction: str, implementation: str, chunk_tokens: int | None
) -> None:
    problem = draw(12, 5, 11, padding=6, ignored=0.2)
    problem.targets[0] = 1
    # If padding took any part, these would drown the rest or make it NaN.
    problem.weight[11:], problem.bias[11:] = 1e30, float("inf")
    settings = {"reduction": reduction, "implementation": implementation, "label_smoothing": 0.1, "softcap": 3.0}
    output, (hidden_grad, weight_grad, bias_grad), upstream = solve(
        problem, bias=True, outputs=OUTPUTS, z_loss=0.1, **settings
    )
    assert weight_grad[11:].eq(0).all()
    assert bias_grad[11:].eq(0).all()
    bare = Problem(
        problem.hidden,
        problem.weight[:11].clone(),
        problem.targets,
        problem.bias[:11].clone(),
        problem.token_weights,
        VocabShard(0, 11, 11),
    )
    exact, exact_gradients, _ = solve(bare, upstream, bias=True, outputs=OUTPUTS, z_loss=0.1, **settings)
    assert relative_error(output.loss, exact.loss) < 1e-13
    got_gradients = (hidden_grad, weight_grad[:11], bias_grad[:11])
    for got, wanted in zip(got_gradients, exact_gradients, strict=True):
        assert relative_error(got, wanted) < 1e-13
    for name in OUTPUTS:
        assert relative_error(getattr(output, name), getattr(exact, name)) < 1e-13


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_logits_of_ten_thousand(reduction: str) -> None:
    # Integers, so that fp32 logits are exact and only the softmax is judged: targets are the best, the worst, or in
    # a tie with 0.25 nats to spare.
    problem = draw(30, 4, 50, dtype=torch.float32)
    problem.hidden = torch.randint(-100, 101, (30, 4)).float()
    problem.weight = torch.randint(-100, 101, (50, 4)).float() / 4
    logits = problem.hidden @ problem.weight.T
    assert 1e3 < logits.abs().max() < 1.1e4
    problem.targets = torch.where(torch.arange(30) % 2 == 0, logits.argmax(-1), logits.argmin(-1))
    problem.targets[5] = logits[5].topk(2).indices[1]
    exact, exact_gradients, upstream = solve(problem, implementation="reference", reduction=reduction, outputs=OUTPUTS)
    output, gradients, _ = solve(problem, upstream, reduction=reduction, outputs=OUTPUTS)
    torch.testing.assert_close(output.loss.double(), exact.loss, rtol=1e-6, atol=1e-6)
    for got, wanted in zip(gradients, exact_gradients, strict=True):
        assert relative_error(got, wanted) < 1e-6
    for name in OUTPUTS:
        torch.testing.assert_close(getattr(output, name).double(), getattr(exact, name).double(), rtol=1e-6, atol=1e-6)


def test_a_softcap_tames_infinite_bias() -> None:
    problem = draw(6, 3, 9)
    problem.bias[2], problem.bias[4] = float("inf"), float("-inf")
    exact, exact_gradients, upstream = solve(
        problem, implementation="reference", reduction="sum", softcap=2.0, bias=True
    )
    output, gradients, _ = solve(problem, upstream, reduction="sum", softcap=2.0, bias=True)
    assert relative_error(output.loss, exact.loss) < 1e-13
    for got, wanted in zip(gradients, exact_gradients, strict=True):
        assert relative_error(got, wanted) < 1e-12


def test_a_masked_out_word_has_no_probability() -> None:
    problem = draw(6, 3, 9)
    problem.bias[2] = float("-inf")
    problem.targets[problem.targets == 2] = 3
    exact, exact_gradients, upstream = solve(problem, implementation="reference", bias=True, outputs=("entropy",))
    output, gradients, _ = solve(problem, upstream, bias=True, outputs=("entropy",))
    assert relative_error(output.entropy, exact.entropy) < 1e-13
    for got, wanted in zip(gradients, exact_gradients, strict=True):
        assert relative_error(got, wanted) < 1e-12


def test_of_equal_likeliest_tokens_the_lowest_is_the_prediction(chunk_tokens: int | None) -> None:
    output = linear_cross_entropy(
        torch.zeros(5, 3), torch.randn(7, 3), torch.arange(5), outputs=("correct",), reduction="none"
    )
    assert output.correct.tolist() == [True, False, False, False, False]


def test_non_finite_hidden_is_passed_on_not_hidden() -> None:
    hidden = torch.randn(4, 3)
    hidden[1, 0] = float("nan")
    loss = linear_cross_entropy(hidden, torch.randn(6, 3), torch.arange(4), reduction="none").loss
    assert loss.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_non_finite_upstream_gradient_is_passed_on(reduction: str, host_sees: bool) -> None:
    problem = draw(5, 3, 7)
    upstream = torch.ones((5,) if reduction == "none" else ())
    upstream.view(-1)[0] = float("nan")
    _, (hidden_grad, weight_grad), _ = solve(problem, upstream, reduction=reduction)
    assert hidden_grad[0].isnan().all()
    assert weight_grad.isnan().all()
    assert hidden_grad[1:].isnan().all() == (reduction != "none")
    problem.targets[0] = -100  # an ignored token has no gradient to pass
    _, gradients, _ = solve(problem, upstream, reduction=reduction)
    assert any(gradient.isnan().any() for gradient in gradients) == (reduction != "none")
