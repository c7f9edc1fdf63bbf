"""The figures that are aimed at, judged from the JSON's shapes; and the table that README shows. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

OURS, OURS_BF16 = "triton, dW in fp32", "triton, dW in bf16"
FORWARD, COMPILED = "triton, forward alone", "torch.compile"
RATE, STRETCH, FORWARD_RATE, MEMORY, NARROW = 0.70, 0.80, 0.80, 0.01, 768
"""Shares of the products' rate at 8 and, of the forward, 2 NVD; of the gradients' memory; the width at which the whole
should be no slower than torch.compile."""


def method(shape: dict[str, Any], name: str) -> dict[str, Any]:
    """A method's record; empty where it has no times."""
    found = (each for each in shape.get("methods", ()) if each["name"] == name and "milliseconds" in each)
    return next(found, {})


def judge(shapes: Sequence[dict[str, Any]], narrow: int = NARROW) -> list[dict[str, Any]]:
    """Every goal on every shape: figure and whether it is met; a figure of None was not measured, and is not met."""
    return [
        {"what": what, "goal": goal, "figure": figure, "met": figure is not None and sign * figure >= sign * goal}
        for shape in shapes
        for what, goal, figure, sign in _goals(shape, narrow)
    ]


def _goals(shape: dict[str, Any], narrow: int) -> Iterator[tuple[str, float, float | None, int]]:
    name, ours = shape["name"], method(shape, OURS)
    rate = ours.get("share_of_rate_at_8")
    yield f"{name}: forward and backward, share of the products' rate at 8 NVD", RATE, rate, 1
    yield f"{name}: the same, stretch", STRETCH, rate, 1
    forward = method(shape, FORWARD).get("share_of_rate")
    yield f"{name}: forward alone, share of the products' rate", FORWARD_RATE, forward, 1
    yield f"{name}: memory beyond the fp32 gradients, share of theirs", MEMORY, ours.get("beyond_share"), -1
    if shape.get("shape", (0, 0, 0))[2] == narrow:
        compiled = method(shape, COMPILED).get("milliseconds")
        mine = method(shape, OURS_BF16).get("milliseconds")
        ratio = mine / compiled if mine and compiled else None
        yield f"{name}: time over torch.compile's, gradients of 16 bits both", 1.0, ratio, -1


def goal_lines(goals: Sequence[dict[str, Any]]) -> list[str]:
    """One for each."""
    lines = []
    for goal in goals:
        figure = "not measured" if goal["figure"] is None else f"{goal['figure']:.3f}"
        lines.append(f"{'met    ' if goal['met'] else 'NOT MET'} {figure:>12} (goal {goal['goal']:g}): {goal['what']}")
    return lines


def shape_lines(shape: dict[str, Any]) -> list[str]:
    """A shape's table, for a terminal."""
    if "methods" not in shape:
        return [f"{shape['name']}: {shape.get('error', 'not measured')}"]
    lines = [f"{shape['name']}: the three products run at {shape['products_tflops']:.3g} TFLOP/s"]
    for each in shape["methods"]:
        if "milliseconds" not in each:
            lines.append(f"  {each['name']:41} {each.get('error', 'not timed')[:80]}")
            continue
        share = each.get("share_of_rate_at_8") or each.get("share_of_rate")
        line = f"  {each['name']:41} {each['milliseconds']:9.2f} ms  {share:6.1%} of the rate"
        if "beyond_bytes" in each:
            line += f"  {each['beyond_bytes'] / 2**20:9.1f} MiB beyond ({each['beyond_share']:.1%})"
        worst = max(_number(error) for error, _ in each["errors"].values())
        lines.append(f"{line}  error {worst:.1e}" + ("" if each["right"] else "  WRONG"))
    return lines


def _number(error: float | str) -> float:
    """JSON has no infinity: a string says that an error is not finite."""
    return math.inf if isinstance(error, str) else error


def readme_lines(document: dict[str, Any] | None, path: str) -> list[str]:
    """README's passage, of the newest run on a GPU; None: there is none."""
    if document is None:
        return [
            "On a GPU: no run has been made yet. `python tools/gpu_check.py` is the one command: it checks every",
            "implementation against float64, times them beside torch's and others', and writes one JSON file.",
        ]
    machine, counts = document["machine"], document["counts"]
    return [
        f"On one {machine['name']}, bf16, forward and backward, with torch {machine['torch']} and triton "
        f"{machine['triton']} ([script](tools/gpu_check.py),",
        f"[result]({path})). Checks against float64: {counts['passed']} passed, {counts['failed']} failed, "
        f"{counts['not run']} not run.",
        "Shares are of the rate of the three bare products in the same run, for 8 NVD (2 for the forward alone):",
        "",
        "| tokens × vocabulary × width | products, TFLOP/s | share of it | forward alone | memory beyond the gradients "
        "| time over torch.compile's | over plain torch's | over the fastest other's |",
        "|---|---|---|---|---|---|---|---|",
        *(_row(shape) for shape in document["speed"] if "methods" in shape),
        "",
        "Goals:",
        "",
        *(f"- {' '.join(line.split())}" for line in goal_lines(document["goals"])),
    ]


def _row(shape: dict[str, Any]) -> str:
    ours, forward = method(shape, OURS), method(shape, FORWARD)
    bf16 = method(shape, OURS_BF16).get("milliseconds")
    others = [
        each for each in shape["methods"] if not each["ours"] and "milliseconds" in each and each["right"]
        and not each["name"].startswith("torch")
    ]  # fmt: skip
    fastest = min(others, key=lambda each: each["milliseconds"], default={})

    def ratio(other: dict[str, Any]) -> str:
        return f"{bf16 / other['milliseconds']:.2f}" if bf16 and other else "–"

    def share(value: float | None) -> str:
        return "–" if value is None else f"{value:.1%}"

    beside = ratio(fastest) + (f" ({fastest['name']})" if fastest else "")
    cells = [
        " × ".join(map(str, shape["shape"])),
        f"{shape['products_tflops']:.0f}",
        share(ours.get("share_of_rate_at_8")),
        share(forward.get("share_of_rate")),
        share(ours.get("beyond_share")),
        ratio(method(shape, COMPILED)),
        ratio(method(shape, "torch, plain")),
        beside,
    ]
    return f"| {' | '.join(cells)} |"
