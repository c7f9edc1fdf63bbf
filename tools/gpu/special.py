"""Checks that are more than one comparison: the filter, determinism, compilers, graphs, more than 2³¹ logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu.cases import EVERYTHING, Case
from gpu.checks import OUT_OF_RANGE, UnsupportedError, small_blocks
from gpu.device import Device, Shape
from gpu.problems import Problem, draw, solve
from gpu.truth import TOLERANCES, Errors, compare, compare_rows, distance, exact, exact_rows, sample_rows
from harness.kernels import linear_cross_entropy

Check = Callable[[], tuple[Errors, dict[str, Any]]]
BOUND = 0.02


def list_checks(device: Device) -> dict[str, Check]:
    """By name; the one that may cost the device last."""
    found: dict[str, Check] = {}
    for dtype in ("bf16", "fp16", "fp32"):
        for filter_weight in (False, True):
            what = "and weight's" if filter_weight else "alone"
            name = f"filter, {dtype}: hidden's gradient {what} within the bound"
            found[name] = partial(check_filter, device, dtype, filter_weight=filter_weight)
    for implementation in ("triton", "blocked"):
        for terms in ({}, {**EVERYTHING, "small_blocks": implementation == "triton"}):
            what = "everything" if terms else "plain"
            case = _case(device, implementation, f"deterministic, {what}", terms)
            found[f"{implementation}: two runs give the same bits, {what}"] = partial(check_bits, device, case)
        name = f"{implementation}: torch.compile(fullgraph=True) gives the same"
        case = _case(device, implementation, "compiled", {"settings": {"reduction": "mean"}, "outputs": ("lse",)})
        found[name] = partial(check_compiled, device, case)
    for name, shape in huge_shapes(device).items():
        found[f"triton, bf16: {name}, {shape}"] = partial(check_huge, device, shape, "triton")
    found["blocked, bf16: more than 2**31 logits"] = partial(
        check_huge, device, huge_shapes(device)["more than 2**31 logits"], "blocked"
    )
    name = "triton: a CUDA graph of forward and backward gives the same"
    found[name] = partial(check_graph, device, _case(device, "triton", "graph", {}))
    found[OUT_OF_RANGE] = partial(check_refusal, device)
    return found


def huge_shapes(device: Device) -> dict[str, Shape]:
    """Where 32-bit addresses would wrap around, in logits, in weight and in hidden."""
    if device.kind == "cpu":
        shapes = Shape(70, 150, 16), Shape(33, 100, 40), Shape(100, 40, 24)
    else:
        shapes = Shape(20_000, 128_256, 64), Shape(256, 262_144, 8320), Shape(270_000, 512, 8192)
    names = "more than 2**31 logits", "more than 2**31 elements of weight", "more than 2**31 elements of hidden"
    return dict(zip(names, shapes, strict=True))


def _case(device: Device, implementation: str, name: str, terms: dict[str, Any], dtype: str = "bf16") -> Case:
    small = device.kind == "cpu"
    tokens, vocab_size, dim = ((2, 24), 128, 32) if small else ((2, 300), 4096, 256)
    return Case(
        name=name, implementation=implementation, dtype=dtype, tokens=tokens, vocab_size=vocab_size, dim=dim, **terms
    )


def steep_problem(device: Device, dtype: str) -> Problem:
    """Most of the probability in few tiles."""
    tokens, vocab_size, dim = ((30,), 320, 16) if device.kind == "cpu" else ((1000,), 16384, 256)
    settings = {"weight_grad_dtype": "fp32"}
    case = Case(
        name="filter", implementation="triton", dtype=dtype, tokens=tokens, vocab_size=vocab_size, dim=dim,
        data="steep", tensors=("bias",), settings=settings, poison_bytes=1 << 30,
    )  # fmt: skip
    return draw(case, device)


def check_filter(device: Device, dtype: str, *, filter_weight: bool) -> tuple[Errors, dict[str, Any]]:
    """What is left out of a token's gradient has at most BOUND of its probability: Σ p·‖W_v‖ over it is no more than
    the bound times the longest row of weight; and likewise Σ p·‖x‖ for weight's gradient. Nothing else changes."""
    problem = steep_problem(device, dtype)
    allowed = TOLERANCES[dtype]
    wanted = exact(problem)
    device.poison(problem.case.poison_bytes)
    got = solve(problem, "triton", filter_bound=BOUND, filter_weight=filter_weight)
    share = got[0].kept_share
    assert share is not None
    from_above = problem.upstream["loss"].double().abs()
    longest = problem.leaves["weight"].double().norm(dim=1).max()
    errors = compare(problem, got, wanted)
    for name in [name for name in errors if name.startswith("hidden") or (filter_weight and "gradient" in name)]:
        del errors[name]
    rounding = allowed.row * wanted[1]["hidden"].norm(dim=1)
    error = (got[1]["hidden"].double() - wanted[1]["hidden"]).norm(dim=1)
    rest = (error - rounding).clamp(min=0.0) / (from_above * longest)
    errors["hidden's gradient, of the bound, worst row"] = (float(rest.max()), BOUND)
    if filter_weight:
        most = (from_above * problem.leaves["hidden"].double().norm(dim=1)).sum()
        gap = (got[1]["weight"].double() - wanted[1]["weight"]).norm() - allowed.gradient * wanted[1]["weight"].norm()
        errors["weight's gradient, of the bound"] = (float(gap.clamp(min=0.0) / most), BOUND)
    errors["kept share, which must be below 0.9"] = (float(share), 0.9)
    return errors, {"kept_share": float(share), "largest_error_of_a_row": float(error.max())}


def check_bits(device: Device, case: Case) -> tuple[Errors, dict[str, Any]]:
    """Over runs with other things in memory."""
    problem = draw(case, device)
    runs = []
    for _ in range(3):
        device.poison(case.poison_bytes)
        if case.small_blocks:
            with small_blocks(device):
                output, gradients = solve(problem, case.implementation)
        else:
            output, gradients = solve(problem, case.implementation)
        named = {name: getattr(output, name).detach() for name in ("loss", *case.outputs)}
        runs.append(named | {f"{name}'s gradient": value for name, value in gradients.items()})
    different = {
        name: (float(not all(torch.equal(value, run[name]) for run in runs[1:])), 0.0)
        for name, value in runs[0].items()
    }
    return different, {}


def check_compiled(device: Device, case: Case) -> tuple[Errors, dict[str, Any]]:
    """Loss, output and gradients beside the same call without a compiler."""
    problem = draw(case, device)

    def call(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        output = linear_cross_entropy(
            hidden, weight, problem.targets, reduction="mean", outputs=("lse",), implementation=case.implementation
        )
        assert output.lse is not None
        return output.loss * 1.5, output.lse.sin()

    compiled = torch.compile(call, fullgraph=True, backend=device.compiler)
    found = []
    for function in (call, compiled):
        leaves = [problem.leaves[name].detach().requires_grad_() for name in ("hidden", "weight")]
        loss, waves = function(*leaves)
        found.append([loss, waves, *torch.autograd.grad([loss, waves.sum()], leaves)])
    torch.compiler.reset()
    allowed = TOLERANCES[case.dtype]
    names = ("loss", "lse", "hidden's gradient", "weight's gradient")
    tolerances = (allowed.values, allowed.values, allowed.gradient, allowed.gradient)
    return {
        name: (distance(got.detach(), wanted.detach()), tolerance)
        for name, got, wanted, tolerance in zip(names, found[1], found[0], tolerances, strict=True)
    }, {}


def check_huge(device: Device, shape: Shape, implementation: str) -> tuple[Errors, dict[str, Any]]:
    """All losses, and some rows of the gradients."""
    where = {"device": device.torch}
    hidden = torch.empty(shape.tokens, shape.dim, dtype=torch.bfloat16, **where).normal_()
    weight = torch.empty(shape.vocab_size, shape.dim, dtype=torch.bfloat16, **where).normal_(0, 2 / shape.dim**0.5)
    targets = torch.randint(shape.vocab_size, (shape.tokens,), **where)
    upstream = torch.randn(shape.tokens, **where)
    rows = exact_rows(hidden, weight, targets, upstream, *sample_rows(targets, shape.vocab_size, 24))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    device.poison(min(4 * (shape.tokens + shape.vocab_size) * shape.dim, 8 << 30))
    output = linear_cross_entropy(hidden, weight, targets, reduction="none", implementation=implementation)
    gradients = torch.autograd.grad(output.loss, leaves, upstream)
    return compare_rows(output.loss.detach(), *gradients, targets, rows, "bf16"), {"ran": output.implementation}


def check_graph(device: Device, case: Case) -> tuple[Errors, dict[str, Any]]:
    """Captured once, replayed on other values."""
    problem, other = draw(case, device), draw(case, device)
    leaves = [problem.leaves[name].clone().requires_grad_() for name in ("hidden", "weight")]

    def work() -> list[Tensor]:
        output = linear_cross_entropy(*leaves, problem.targets, implementation="triton")
        return [output.loss.detach(), *torch.autograd.grad(output.loss, leaves)]

    try:
        replay = device.replayable(work)
    except Exception as error:
        device.synchronize()
        raise UnsupportedError(f"{type(error).__name__}: {error}") from error
    with torch.no_grad():
        for leaf, name in zip(leaves, ("hidden", "weight"), strict=True):
            leaf.copy_(other.leaves[name])
    got = [value.clone() for value in replay()]
    different = [float(not torch.equal(one, two)) for one, two in zip(got, work(), strict=True)]
    names = ("loss", "hidden's gradient", "weight's gradient")
    return {name: (value, 0.0) for name, value in zip(names, different, strict=True)}, {}


def check_refusal(device: Device) -> tuple[Errors, dict[str, Any]]:
    """By an error, at the latest where the host waits."""
    case = _case(device, "triton", "refusal", {})
    problem = draw(case, device)
    problem.targets.view(-1)[-1] = case.vocab_size
    try:
        solve(problem, "triton")
        device.synchronize()
    except Exception as error:
        return {}, {"refused_with": f"{type(error).__name__}: {error}"[:300]}
    return {"accepted": (1.0, 0.0)}, {}
