"""Runs a check and says what came out: errors beside tolerances, or the exception."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from gpu.cases import Case, list_cases, tiling_cases
from gpu.device import Device
from gpu.problems import Problem, draw, replaced, solve
from gpu.truth import Errors, compare, exact
from harness.kernels.linear_cross_entropy.choice import capability
from harness.kernels.linear_cross_entropy.fused import launch, passes, plan, tilings

Result = dict[str, Any]
TRACEBACK_CHARACTERS = 3000
OUT_OF_RANGE = "a target out of range is refused"
FATAL = (OUT_OF_RANGE,)
"""Checks after which a GPU is lost to the process, rightly."""


class UnsupportedError(Exception):
    """What a check is about cannot be done here, which is reported and is no failure."""


def run_check(name: str, device: Device, seed: int, check: Callable[[], tuple[Errors, dict[str, Any]]]) -> Result:
    """A check gives errors with their tolerances, and figures to report beside them. Its outcome is "passed", "failed",
    or "unsupported"."""
    started = time.perf_counter()
    result: Result = {"name": name, "outcome": "passed"}
    torch.manual_seed(seed_of(seed, name))
    try:
        errors, figures = check()
        if name not in FATAL:
            device.synchronize()
        result |= figures
        result["errors"] = {what: [plain(error), tolerance] for what, (error, tolerance) in errors.items()}
        if not all(error <= tolerance for error, tolerance in errors.values()):  # this way round for nan
            result["outcome"] = "failed"
    except UnsupportedError as reason:
        result |= {"outcome": "unsupported", "exception": str(reason)}
    except Exception as error:
        result |= {"outcome": "failed", "exception": f"{type(error).__name__}: {error}"[:TRACEBACK_CHARACTERS]}
        result["traceback"] = traceback.format_exc()[-TRACEBACK_CHARACTERS:]
    result["seconds"] = round(time.perf_counter() - started, 3)
    return result


def plain(error: float) -> float | str:
    """JSON has no infinity."""
    return error if math.isfinite(error) else "not finite"


def seed_of(seed: int, name: str) -> int:
    """Each check has its own, so that one alone draws the same tensors as all together."""
    return (seed * 1_000_003 + sum((place + 1) * ord(letter) for place, letter in enumerate(name))) % 2**31


def cases_of(device: Device, seed: int, combinations: int) -> list[Case]:
    """All of cases.py."""
    counts = {name: len(tilings_of(device, rich=name == "rich")) for name in ("plain", "rich")}
    return [*list_cases(device.kind, seed, combinations), *tiling_cases(device.kind, counts)]


def problem_class(device: Device, kernel: str, *, rich: bool) -> tilings.ProblemClass:
    """Of 16-bit problems with many tokens on this device."""
    major, minor = capability(device.torch) if device.kind == "cuda" else (0, 0)
    return tilings.ProblemClass(kernel, 10 * major + minor, 2, rich, False)


def tilings_of(device: Device, *, rich: bool) -> list[tilings.Tiling]:
    """All that can be chosen for either kernel."""
    found = [
        each for kernel in tilings.KERNELS for each in tilings.candidates(problem_class(device, kernel, rich=rich))
    ]
    return list(dict.fromkeys(found))


@contextmanager
def only_tiling(tiling: tilings.Tiling) -> Iterator[None]:
    """The kernels take this one wherever it may be chosen."""
    before = launch.choose

    def choose(problem: tilings.ProblemClass, *, describable: bool) -> tilings.Tiling:
        fits = tiling in tilings.candidates(problem) and (describable or not tiling.descriptors)
        return tiling if fits else before(problem, describable=describable)

    with replaced(launch, choose=choose):
        yield


@contextmanager
def small_blocks(device: Device) -> Iterator[None]:
    """The backward in as many chunks and strips as it can be."""
    blocks = plan.Plan(device.least_block, device.least_block)
    with replaced(passes, plan_blocks=lambda *arguments, **options: blocks):
        yield


def check_case(case: Case, device: Device) -> tuple[Errors, dict[str, Any]]:
    """Beside float64."""
    problem = draw(case, device)
    wanted = exact(problem)
    with ExitStack() as stack:
        if case.small_blocks:
            stack.enter_context(small_blocks(device))
        if case.tiling is not None:
            tiling = tilings_of(device, rich=case.tiling[0] == "rich")[case.tiling[1]]
            stack.enter_context(only_tiling(tiling))
        device.poison(case.poison_bytes)
        got = solve(problem, case.implementation)
    refuse_wrong_kind(problem, got[0].implementation, got[1])
    figures = {"ran": got[0].implementation}
    return compare(problem, got, wanted), figures if case.tiling is None else figures | {"tiling": str(tiling)}


def refuse_wrong_kind(problem: Problem, ran: str, gradients: dict[str, torch.Tensor]) -> None:
    """Raises ValueError where another implementation ran than was asked for, or a gradient has another dtype."""
    if not ran.startswith(problem.case.implementation):
        raise ValueError(f"asked for {problem.case.implementation}, and {ran!r} ran")
    arguments = problem.arguments()
    for name, gradient in gradients.items():
        dtype = problem.leaves[name].dtype
        if name == "weight" and hasattr(gradient, "grad_dtype"):
            dtype = arguments.get("weight_grad_dtype", dtype)
        if gradient.dtype != dtype:
            raise ValueError(f"the gradient of {name} is {gradient.dtype} and not {dtype}")
