"""The Triton kernels in the interpreter against the float64 reference: terms, sizes, blocks, dtypes, edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.kernels import OUTPUTS, CompSum, linear_cross_entropy
from harness.kernels.linear_cross_entropy.types import Terms
from tests.kernels import interpreter
from tests.kernels.cases import DIFFERENTIABLE, Problem, differentiate, draw, relative_error
from tests.kernels.test_pairs import FEATURES, cases, prepare

if interpreter.why_not() is None:
    from harness.kernels.linear_cross_entropy.fused.facts import merge_splits

pytestmark = pytest.mark.skipif(interpreter.why_not() is not None, reason=str(interpreter.why_not()))

REDUCTIONS = ["mean", "sum", "none"]
GRADIENT_ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-9, torch.float16: 2**-12}
"""Of a logit's gradient, before the products that it enters."""
CANCELLATION = 4
"""How many times the largest sum of products the largest sum of their absolute values may be: by so much a rounding of
the factors grows. With random hidden states and a hundred columns 2 was passed about once in a hundred draws."""


TWO_TILES = 101
"""Columns, of which a tile has 64."""


def unlike(settings: dict[str, Any]) -> bool:
    """Whether hidden and weight have dtypes that the kernels do not take."""
    hidden, weight = settings.get("dtypes", (None, None))
    return hidden != weight or hidden == torch.float64


def in_dtype(problem: Problem, dtype: torch.dtype) -> Problem:
    for name in ("hidden", "weight", "bias", "perturbed_hidden"):
        setattr(problem, name, getattr(problem, name).to(dtype))
    return problem


def compare(
    problem: Problem, what: str, fields: tuple[str, ...] = ("loss",), tolerance: float = 2e-5, **arguments: Any
) -> Any:
    """Loss, outputs and gradients of the kernels beside the reference's, under random upstream gradients."""
    exact, exact_gradients, upstream = differentiate(problem, fields, implementation="reference", **arguments)
    output, gradients, _ = differentiate(problem, fields, upstream, implementation="triton", **arguments)
    for field in ("loss", *arguments.get("outputs", ())):
        error = relative_error(getattr(output, field), getattr(exact, field))
        assert error < tolerance, f"{what}: {field} is off by {error}"
    for index, (got, wanted) in enumerate(zip(gradients, exact_gradients, strict=True)):
        assert got.dtype == wanted.dtype
        error = relative_error(got, wanted)
        # Rounded to its dtype once, at the end, and made of rounded gradients of the logits.
        rounding = 1.01 * torch.finfo(got.dtype).eps + CANCELLATION * GRADIENT_ROUNDING[problem.hidden.dtype]
        assert error < tolerance + rounding, f"{what}: gradient {index} is off by {error}"
    assert output.implementation.startswith("triton for the interpreter, recomputed in the backward, ")
    return output


@pytest.mark.parametrize("part", range(4))
def test_every_pair_of_features(part: int) -> None:
    chosen = [case for case in cases() if not unlike(case[1]) or "dtypes" not in case[1]]
    for number, (name, settings) in enumerate(chosen):
        if number % 4 != part:
            continue
        problem, fields, arguments = prepare(settings, TWO_TILES)
        if "dtypes" not in settings:
            problem = in_dtype(problem, torch.float32)
        outputs = OUTPUTS if number % 3 == 0 else fields[1:]
        reduction = REDUCTIONS[(number // 4) % 3]
        chunk = (None, 32)[number // 2 % 2]
        with interpreter.sizes(descriptors=number % 2 == 0, chunk=chunk, tiles_a_split=1 + number // 4 % 2):
            compare(problem, name, fields, reduction=reduction, outputs=outputs, **arguments)


@pytest.mark.parametrize("dtype", list(GRADIENT_ROUNDING))
@pytest.mark.parametrize("tau", [0.5, 1.0, 1.4])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_everything_at_once(reduction: str, tau: float, dtype: torch.dtype) -> None:
    together = ("bias", "class weights", "token weights", "ignored", "another ignore_index", "shift", "rho")
    together += ("label smoothing", "z-loss", "temperature", "padding", "softcap", *DIFFERENTIABLE)
    settings = {"tau": tau} | {key: value for name in together for key, value in FEATURES[name].items()}
    problem, fields, arguments = prepare(settings | {"tokens": (3, 31)}, TWO_TILES)
    for descriptors in (False, True):
        with interpreter.sizes(descriptors=descriptors, chunk=64, tiles_a_split=2 if descriptors else 1):
            compare(in_dtype(problem, dtype), "all", fields, reduction=reduction, outputs=OUTPUTS, **arguments)


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("dim", [1, 8, 72])
@pytest.mark.parametrize("vocab_size", [1, 63, 64, 65, 211])
def test_odd_sizes(vocab_size: int, dim: int, descriptors: bool) -> None:
    for tokens in (1, 32, 33, 70):
        problem = in_dtype(draw(tokens, dim, vocab_size, padding=vocab_size % 3, ignored=0.2), torch.float32)
        with interpreter.sizes(descriptors=descriptors, chunk=32, tiles_a_split=1 + tokens % 3):
            # A gradient of a few numbers may be next to nothing, of terms that cancel.
            tolerance = 1e-3 if tokens * dim < 16 else 2e-5
            outputs = ("lse", "correct")
            compare(problem, f"{tokens} tokens", tolerance=tolerance, reduction="none", bias=True, outputs=outputs)


def test_strided_and_unaligned_matrices_are_read_through_pointers() -> None:
    base = torch.randn(72, 3, 7).transpose(0, 2)
    problem = in_dtype(draw((7, 3), 72, 131), torch.float32)
    problem.hidden, problem.weight = base, torch.randn(72, 262).T[::2]
    with interpreter.sizes(descriptors=True):
        compare(problem, "columns first", reduction="mean")
        problem.hidden, problem.weight = torch.randn(7, 3, 75)[..., 3:], torch.randn(131, 73)[:, 1:]
        compare(problem, "rows at odd places", reduction="mean")


def test_blocks_and_splits_change_no_more_than_the_order_of_sums() -> None:
    problem = in_dtype(draw(100, 16, 300, ignored=0.1), torch.bfloat16)
    found = []
    for chunk, strip, splits in ((None, 64, None), (32, 64, 1), (64, 192, 2), (128, 320, 5)):
        with interpreter.sizes(descriptors=False, chunk=chunk, strip=strip, tiles_a_split=splits):
            output, gradients, _ = differentiate(
                problem, ("loss",), {"loss": torch.tensor(0.3)}, implementation="triton", outputs=OUTPUTS
            )
            again, gradients_again, _ = differentiate(
                problem, ("loss",), {"loss": torch.tensor(0.3)}, implementation="triton", outputs=OUTPUTS
            )
        assert torch.equal(output.loss, again.loss)
        assert all(torch.equal(one, other) for one, other in zip(gradients, gradients_again, strict=True))
        found.append((output, gradients))
    for output, gradients in found[1:]:
        assert relative_error(output.loss, found[0][0].loss) < 1e-6
        assert torch.equal(output.correct, found[0][0].correct)
        for got, wanted in zip(gradients, found[0][1], strict=True):
            assert relative_error(got, wanted) < 1.01 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", list(GRADIENT_ROUNDING))
@pytest.mark.parametrize("tokens", [0, 3, 40])
def test_nothing_to_predict(tokens: int, dtype: torch.dtype, reduction: str) -> None:
    problem = in_dtype(draw(tokens, 16, 37, ignored=1.1), dtype)
    output, gradients, _ = differentiate(
        problem, implementation="triton", reduction=reduction, outputs=OUTPUTS, bias=True, label_smoothing=0.1
    )
    assert not output.loss.any()
    assert not any(getattr(output, name).any() for name in OUTPUTS)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_what_stands_at_ignored_tokens_has_no_effect(reduction: str) -> None:
    problem = in_dtype(draw(70, 16, 131, ignored=0.3), torch.float32)
    ignored = problem.targets == -100
    problem.hidden[ignored] = 1e15
    problem.token_weights[ignored] = math.nan
    output = compare(
        problem, "huge", reduction=reduction, outputs=OUTPUTS, token_weights=True, z_loss=0.1, label_smoothing=0.1
    )
    assert not output.lse[ignored].any()
    problem.hidden[ignored] = math.nan
    output, _, _ = differentiate(problem, implementation="triton", reduction=reduction, token_weights=True)
    assert output.loss.isfinite().all()
    labels = problem.targets.masked_fill(ignored, -2).int()
    facts, tops = torch.full((6, 3, 70), math.nan), torch.zeros(3, 70, dtype=torch.int32)
    facts[:, :, ~ignored] = 1.0
    softmax = merge_splits(facts, tops, labels, ignored, Terms(131, label_smoothing=0.1), entropy=True)
    assert all(value.isfinite().all() for value in vars(softmax).values() if value is not None)


@pytest.mark.parametrize("margin", [1.0, 12.0, 24.0])
def test_the_digits_of_near_certainty(margin: float) -> None:
    """The loss and its gradient are in proportion to 1 − p, of which 24 nats leave float64 7 digits, and fp32 none."""
    problem = in_dtype(draw(40, 24, 131), torch.float32)
    problem.bias = torch.zeros(131)
    problem.weight *= 0.01
    problem.bias[7] = margin
    problem.targets[:] = 7
    compare(problem, f"{margin} nats", reduction="none", bias=True, tolerance=1e-4)


def test_logits_of_ten_thousand() -> None:
    problem = in_dtype(draw(40, 16, 131), torch.float32)
    problem.weight = (problem.weight * 8).round() * 500  # products that fp32 holds exactly
    problem.hidden = (problem.hidden * 4).round() / 4
    output = compare(problem, "huge", reduction="none", outputs=("lse", "logprob", "max_prob"))
    assert output.lse.max() > 5000


def test_masked_out_words() -> None:
    problem = in_dtype(draw(40, 16, 211), torch.float32)
    problem.bias[3:140] = -math.inf  # whole tiles of them
    problem.targets = problem.targets % 3
    with interpreter.sizes(descriptors=False, tiles_a_split=1):
        for settings in ({}, {"loss": CompSum(1.4), "label_smoothing": 0.1}):
            output, gradients, _ = differentiate(
                problem, implementation="triton", bias=True, outputs=OUTPUTS, **settings
            )
            exact, _, _ = differentiate(problem, implementation="reference", bias=True, outputs=OUTPUTS, **settings)
            assert relative_error(output.loss, exact.loss) < 2e-5
            assert relative_error(output.entropy, exact.entropy) < 2e-5
            assert all(gradient.isfinite().all() for gradient in gradients)
            assert not gradients[1][3:140].any()
    problem.bias[:] = -math.inf
    problem.bias[2] = 0.0
    output, _, _ = differentiate(problem, implementation="triton", bias=True, reduction="none")
    assert output.loss[problem.targets != 2].eq(math.inf).all()
    assert not output.loss[problem.targets == 2].any()


def test_of_equal_likeliest_tokens_the_lowest_is_the_prediction() -> None:
    problem = in_dtype(draw(8, 16, 211), torch.float32)
    problem.weight[:] = 0.0
    problem.bias = torch.zeros(211)
    problem.bias[[70, 71, 150]] = 3.0
    problem.targets[:] = torch.tensor([70, 71, 150, 69] * 2)
    for tiles_a_split in (1, 4):
        with interpreter.sizes(descriptors=False, tiles_a_split=tiles_a_split):
            output, gradients, upstream = differentiate(
                problem, ("max_prob",), implementation="triton", bias=True, outputs=("correct", "max_prob")
            )
        assert output.correct.tolist() == [True, False, False, False] * 2
    exact, exact_gradients, _ = differentiate(
        problem, ("max_prob",), upstream, implementation="reference", bias=True, outputs=("max_prob",)
    )
    assert relative_error(output.max_prob, exact.max_prob) < 1e-6
    assert relative_error(gradients[2], exact_gradients[2]) < 1e-5


def test_fp16_keeps_gradients_far_below_its_smallest_number() -> None:
    """Upstream gradients of 1e-7 of tokens, whose logits' gradients are then 1e-10."""
    problem = in_dtype(draw(40, 16, 131), torch.float16)
    for scale in (1e-7, 1e3):
        upstream = {"loss": torch.rand(40) * scale}
        arguments = {"reduction": "none", "weight_grad_dtype": torch.float32}
        _, (_, exact), _ = differentiate(problem, ("loss",), upstream, implementation="reference", **arguments)
        _, (_, got), _ = differentiate(problem, ("loss",), upstream, implementation="triton", **arguments)
        wide = {"weight": problem.weight.float(), "hidden": problem.hidden.float()}
        weight = wide["weight"].requires_grad_()
        loss = linear_cross_entropy(wide["hidden"], weight, problem.targets, reduction="none").loss
        exact = torch.autograd.grad(loss, weight, upstream["loss"])[0]
        assert relative_error(got.float() if scale == 1e3 else got.double(), exact) < (2e-3 if scale == 1e3 else 1.0)


def test_fp16_stays_finite_where_class_weights_are_large() -> None:
    problem = in_dtype(draw(32, 16, 131), torch.float16)
    problem.class_weights = torch.ones(131)
    problem.class_weights[5] = 1e6
    for settings in ({"label_smoothing": 0.1}, {"label_smoothing": 0.1, "loss": CompSum(1.4)}):
        compare(problem, str(settings), class_weights=True, weight_grad_dtype=torch.float32, **settings)


@pytest.mark.parametrize("softcap", [0.3, 30.0, 1e4, 1e7, 1e30])
def test_a_softcap_of_any_size(softcap: float) -> None:
    problem = in_dtype(draw(40, 16, 131), torch.float32)
    compare(problem, f"softcap {softcap}", softcap=softcap, outputs=("lse", "max_prob"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_fp32_weight_gradient_is_not_rounded(dtype: torch.dtype) -> None:
    problem = in_dtype(draw(64, 16, 131), dtype)
    weight = problem.weight.requires_grad_()
    if not hasattr(weight, "grad_dtype"):
        pytest.skip("torch 2.10 is the first with grad_dtype")
    weight.grad_dtype = torch.float32
    output = linear_cross_entropy(
        problem.hidden, weight, problem.targets, implementation="triton", weight_grad_dtype=torch.float32
    )
    output.loss.backward()
    assert weight.grad.dtype == torch.float32
    rounded = weight.grad.bfloat16().float()
    assert not torch.equal(weight.grad, rounded)


class Shapes(TorchDispatchMode):
    """Shape and dtype of every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[tuple[int, ...], torch.dtype]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        made = function(*arguments, **(options or {}))
        self.seen |= {(tuple(value.shape), value.dtype) for value in tree_leaves(made) if torch.is_tensor(value)}
        return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_logits_and_no_whole_gradient_in_fp32_that_is_handed_out_in_16_bits(dtype: torch.dtype) -> None:
    problem = in_dtype(draw(96, 16, 203), torch.bfloat16)
    upstream = {"loss": torch.tensor(0.3)}
    with interpreter.sizes(descriptors=False, chunk=32 if dtype == torch.float32 else 96), Shapes() as shapes:
        differentiate(problem, ("loss",), upstream, implementation="triton", weight_grad_dtype=dtype)
    assert not {shape for shape, _ in shapes.seen} & {(96, 203), (203, 96)}
    assert ((203, 16), dtype) in shapes.seen
    assert ((203, 16), torch.float32) in shapes.seen or dtype == torch.bfloat16
    if dtype == torch.float32:  # chunk by chunk
        assert ((96, 16), torch.float32) not in shapes.seen
    else:  # strip by strip
        assert ((203, 16), torch.float32) not in shapes.seen


def test_a_second_backward_is_right_and_a_second_derivative_refused() -> None:
    problem = in_dtype(draw(20, 16, 37), torch.float32)
    hidden = problem.hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, problem.weight, problem.targets, implementation="triton").loss
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, hidden, retain_graph=True)[0])
    again = torch.autograd.grad(loss, hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        again.sum().backward()


def test_only_the_gradients_that_are_needed() -> None:
    problem = in_dtype(draw(40, 16, 131), torch.float32)
    for needs, nvd in ((("hidden",), 6), (("weight",), 6), (("bias",), 4), ((), 2)):
        leaves = {
            name: getattr(problem, name).detach().requires_grad_(name in needs) for name in ("hidden", "weight", "bias")
        }
        output = linear_cross_entropy(**leaves, targets=problem.targets, implementation="triton")
        assert output.implementation.endswith(f"{nvd} NVD")
        if needs:
            output.loss.backward()
        assert [name for name, leaf in leaves.items() if leaf.grad is not None] == list(needs)


def test_one_node_of_a_compiled_graph() -> None:
    problem = in_dtype(draw(40, 16, 131), torch.float32)

    def total(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        output = linear_cross_entropy(
            hidden * 2, weight, problem.targets, implementation="triton", outputs=("entropy", "max_prob")
        )
        return output.loss + output.entropy.sum() + output.max_prob.sum()

    leaves = [problem.hidden.requires_grad_(), problem.weight.requires_grad_()]
    plain = torch.autograd.grad(total(*leaves), leaves)
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(torch.autograd.grad(compiled(*leaves), leaves), plain, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("changes", [
    {"hidden": torch.bfloat16}, {"weight": torch.float64, "hidden": torch.float64},
])  # fmt: skip
def test_dtypes_that_do_not_fit_are_refused(changes: dict[str, torch.dtype]) -> None:
    problem = in_dtype(draw(4, 8, 9), torch.float32)
    for name, dtype in changes.items():
        setattr(problem, name, getattr(problem, name).to(dtype))
    with pytest.raises(ValueError, match="implementation 'triton' cannot run: hidden is torch"):
        linear_cross_entropy(problem.hidden, problem.weight, problem.targets, implementation="triton")
