"""Every feature and every pair of features against the float64 reference: the loss, all outputs, all gradients."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
import torch

from harness.kernels import OUTPUTS, CompSum, linear_cross_entropy
from harness.kernels.linear_cross_entropy import sweep
from tests.kernels.cases import DIFFERENTIABLE, Problem, differentiate, draw, relative_error

# What a feature sets; two that set the same do not make a pair. tau, rho and nu go into one CompSum, what is in DRAWN
# into the problem, "also" names a further field of the result that is differentiated, and "dtypes" those of hidden
# and weight.
FEATURES: dict[str, dict[str, Any]] = {
    "bias": {"bias": True},
    "class weights": {"class_weights": True},
    "token weights": {"token_weights": True},
    "ignored": {"ignored": 0.4},
    "another ignore_index": {"ignore_index": 3},
    "shift": {"shift": 2},
    "sequences": {"tokens": (3, 7)},
    "sum-exponential": {"tau": 0.0},
    "tau 0.5": {"tau": 0.5},
    "generalised": {"tau": 1.4},
    "mean absolute error": {"tau": 2.0},
    "rho": {"rho": 1.6},
    "adversarial": {"nu": 0.7, "perturbed_hidden": True},
    "label smoothing": {"label_smoothing": 0.23},
    "z-loss": {"z_loss": 0.03},
    "softcap": {"softcap": 1.7},
    "temperature": {"temperature": 0.7},
    "padding": {"padding": 3},
    **{name: {f"also {name}": name} for name in DIFFERENTIABLE},
    "fp32": {"dtypes": (torch.float32, torch.float32)},
    "bf16": {"dtypes": (torch.bfloat16, torch.bfloat16)},
    "fp16": {"dtypes": (torch.float16, torch.float16)},
    "bf16 hidden": {"dtypes": (torch.bfloat16, torch.float32)},
    "bf16 weight": {"dtypes": (torch.float32, torch.bfloat16)},
    "float64 hidden": {"dtypes": (torch.float64, torch.float32)},
    "float64 weight": {"dtypes": (torch.float32, torch.float64)},
}
DRAWN = {"ignored", "padding", "tokens"}
REFUSED = {("adversarial", "softcap")}
REDUCTIONS = ["mean", "sum", "none"]


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "plain", {}
    yield from FEATURES.items()
    for (first, some), (second, others) in combinations(FEATURES.items(), 2):
        if not some.keys() & others.keys() and (first, second) not in REFUSED:
            yield f"{first} + {second}", {**some, **others}


def prepare(settings: dict[str, Any], vocab_size: int = 37) -> tuple[Problem, tuple[str, ...], dict[str, Any]]:
    """The problem, the fields to differentiate, and the arguments, of dimensions that fit no block."""
    settings = dict(settings)
    drawn = {"tokens": 23, **{key: settings.pop(key) for key in DRAWN & settings.keys()}}
    problem = draw(dim=11, vocab_size=vocab_size, ignore_index=settings.get("ignore_index", -100), **drawn)
    problem.weight /= 2  # so that 1 / p stays within fp16
    if "dtypes" in settings:
        hidden, weight = settings.pop("dtypes")
        problem.hidden, problem.perturbed_hidden = problem.hidden.to(hidden), problem.perturbed_hidden.to(hidden)
        problem.weight, problem.bias = problem.weight.to(weight), problem.bias.to(weight)
    constants = {key: settings.pop(key) for key in ("tau", "rho", "nu") if key in settings}
    fields = ("loss", *(settings.pop(f"also {name}") for name in DIFFERENTIABLE if f"also {name}" in settings))
    return problem, fields, {**settings, **({"loss": CompSum(**constants)} if constants else {})}


def compare(name: str, settings: dict[str, Any], reduction: str, all_outputs: bool, without_loss: bool = False) -> None:
    problem, fields, arguments = prepare(settings)
    arguments |= {"reduction": reduction, "outputs": OUTPUTS if all_outputs else fields[1:]}
    fields = fields[1:] if without_loss else fields
    exact, exact_gradients, upstream = differentiate(problem, fields, implementation="reference", **arguments)
    output, gradients, _ = differentiate(problem, fields, upstream, implementation="blocked", **arguments)
    double = torch.float64 in (problem.hidden.dtype, problem.weight.dtype)
    bound = 1e-12 if double else 2e-5
    for field in ("loss", *arguments["outputs"]):
        error = relative_error(getattr(output, field), getattr(exact, field))
        assert error < bound, f"{name}: {field} is off by {error}"
    for index, (got, wanted) in enumerate(zip(gradients, exact_gradients, strict=True)):
        assert got.dtype == wanted.dtype
        assert got.is_contiguous()
        # Both are rounded to their dtype, once.
        error = relative_error(got, wanted)
        assert error < bound + 1.01 * torch.finfo(got.dtype).eps, f"{name}: gradient {index} is off by {error}"


def test_every_argument_is_in_the_table() -> None:
    arguments = set(inspect.signature(linear_cross_entropy).parameters)
    named = {"loss" if name in ("tau", "rho", "nu") else name for settings in FEATURES.values() for name in settings}
    elsewhere = {"hidden", "weight", "targets", "reduction", "outputs", "shard", "implementation"}
    without_effect = {"deterministic", "filter_bound", "filter_weight", "weight_grad_dtype"}  # on the blocked form
    assert arguments - elsewhere - without_effect <= named


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_pair_of_features(reduction: str, host_sees: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, (name, settings) in enumerate(cases()):
        length = (5, 1, 1000)[number % 3]
        monkeypatch.setattr(sweep, "chunk_length", lambda *_, length=length: length)
        compare(name, settings, reduction, all_outputs=number % 2 == 1)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("tau", [0.5, 1.0, 1.4])
@pytest.mark.parametrize("head", ["softcap", "adversarial"])
def test_everything_at_once(reduction: str, tau: float, head: str, chunk_tokens: int | None, host_sees: bool) -> None:
    together = ("bias", "class weights", "token weights", "ignored", "another ignore_index", "shift", "sequences")
    together += ("rho", "label smoothing", "z-loss", "temperature", "padding", *DIFFERENTIABLE, head)
    settings = {"tau": tau} | {key: value for name in together for key, value in FEATURES[name].items()}
    compare("everything", settings, reduction, all_outputs=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_an_output_differentiated_without_the_loss(name: str, reduction: str, host_sees: bool) -> None:
    for other in ("bias", "class weights", "token weights", "ignored", "shift", "tau 0.5", "softcap", "z-loss", "bf16"):
        settings = FEATURES[name] | FEATURES[other]
        compare(f"{name} alone, {other}", settings, reduction, all_outputs=False, without_loss=True)
