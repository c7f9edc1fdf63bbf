"""The exact answer in float64, and how far from it something is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpu.cases import Case
from gpu.problems import LEAVES, Problem, solve
from harness.kernels import IGNORE_INDEX, LossOutput

REFERENCE_ELEMENTS = 1 << 24
"""Logits at a time, of which the reference holds several copies."""
PIECE = 1 << 26
"""Logits in float64 at a time, where only some rows of the gradients are formed."""


@dataclass(frozen=True)
class Tolerance:
    """Of ‖error‖/‖exact‖: for losses and outputs; for gradients; and for the worst row of a gradient.

    Losses have the rounding of fp32 sums whatever the inputs' dtype, since products of 16-bit numbers are exact there.
    A gradient of 16 bits is rounded, and made of rounded gradients of the logits, each by up to half of `eps`: `eps` is
    allowed, and three times that for a row, whose roundings may go the same way."""

    values: float
    gradient: float
    row: float


TOLERANCES = {
    "float64": Tolerance(1e-11, 1e-11, 1e-10),
    "fp32": Tolerance(1e-5, 3e-5, 3e-4),
    "fp16": Tolerance(5e-5, 2**-10, 3 * 2**-10),
    "bf16": Tolerance(5e-5, 2**-7, 3 * 2**-7),
}
FEW_TOKENS = 16
"""Below which nothing averages out: a gradient may be as far off as a row."""
FEW_COMPONENTS = 16
QUANTUM = 2**-24
"""Of fp16 where it is smallest, which is no fault of what is rounded to it."""
CERTAIN = 2e-3
"""Relative error of each loss where p is nearly 1: that of exp at logits of about 20, summed in fp32 from products."""
LARGE = 30.0
"""The factor to tolerances where logits of 1e4 leave fp32 three digits behind the point."""
EXPANDED = 5.0
"""The factor where all tokens have one hidden state, whose gradients of weight cancel far below their roundings."""
FLOOR = 1e-6
"""Of a whole gradient's norm: parts below it are compared with that, not with themselves."""
Errors = dict[str, tuple[float, float]]
"""Error and tolerance of each quantity."""


def exact(problem: Problem) -> tuple[LossOutput, dict[str, Tensor]]:
    """What `solve` gives of the reference in float64, some tokens at a time where the case says so."""
    if not problem.case.chunked:
        return solve(problem, "reference", torch.float64, weight_grad_dtype=None)
    step = max(1, REFERENCE_ELEMENTS // problem.case.vocab_size)
    outputs, gradients = [], []
    for rows in torch.arange(len(problem.targets), device=problem.targets.device).split(step):
        part = replace(
            problem,
            leaves={**problem.leaves, "hidden": problem.leaves["hidden"][rows]},
            targets=problem.targets[rows],
            upstream={name: value[rows] for name, value in problem.upstream.items()},
        )
        output, found = solve(part, "reference", torch.float64)
        outputs.append(output)
        gradients.append(found)
    first = outputs[0]._replace(loss=torch.cat([output.loss.detach() for output in outputs]))
    weight = torch.stack([found["weight"] for found in gradients]).sum(0)
    return first, {"hidden": torch.cat([found["hidden"] for found in gradients]), "weight": weight}


def norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values.detach().double()))


def difference_of(got: Tensor, wanted: Tensor) -> Tensor:
    """In float64, without what fp16 cannot help."""
    difference = got.double() - wanted.double()
    if got.dtype != torch.float16:
        return difference
    return torch.where(difference.abs() <= QUANTUM, torch.zeros_like(difference), difference)


def distance(got: Tensor, wanted: Tensor, floor: float = 0.0) -> float:
    """‖got − wanted‖ / ‖wanted‖, or over `floor` where that is more; inf where anything is not finite."""
    if got.shape != wanted.shape:
        return math.inf
    difference, whole = norm(difference_of(got, wanted)), max(norm(wanted), floor)
    if not math.isfinite(difference):
        return math.inf
    return 0.0 if difference == 0.0 else difference / whole if whole else math.inf


def worst_row(got: Tensor, wanted: Tensor, least: float = 1.0) -> float:
    """The largest norm of a row's error over that row's norm, or over `least` times the rows' root mean square where
    that is more."""
    if got.shape != wanted.shape:
        return math.inf
    if not wanted.numel():
        return 0.0
    errors, sizes = (values.flatten(0, -2).norm(dim=-1) for values in (difference_of(got, wanted), wanted.double()))
    if not errors.isfinite().all():
        return math.inf
    floor = least * sizes.square().mean().sqrt()
    ratios = torch.where(errors == 0, errors, errors / sizes.clamp(min=floor))
    return float(ratios.max())


def compare(
    problem: Problem,
    got: tuple[LossOutput, dict[str, Tensor]],
    wanted: tuple[LossOutput, dict[str, Tensor]],
) -> Errors:
    """All quantities of a case."""
    case, allowed = problem.case, TOLERANCES[problem.case.dtype]
    slack = LARGE if case.data == "large" else EXPANDED if case.layout == "expanded" else 1.0
    found: Errors = {"loss": (distance(got[0].loss, wanted[0].loss), slack * allowed.values)}
    if case.data == "certain":
        own = CERTAIN if case.dtype != "float64" else allowed.row
        found["loss, worst token"] = (worst_row(got[0].loss[..., None], wanted[0].loss[..., None], 0.0), own)
    for name in case.outputs:
        ours, exactly = getattr(got[0], name), getattr(wanted[0], name)
        if name == "correct":
            found["correct, share wrong"] = (float((ours != exactly).float().mean()) if ours.numel() else 0.0, 0.0)
        else:
            found[name] = (distance(ours, exactly), slack * allowed.values)
    for name in LEAVES:
        if name in got[1]:
            found |= _compare_gradient(problem, name, got[1][name], wanted[1][name], slack)
    return found


def _compare_gradient(problem: Problem, name: str, got: Tensor, wanted: Tensor, slack: float) -> Errors:
    case, allowed = problem.case, TOLERANCES[problem.case.dtype]
    label, gradient = f"{name}'s gradient", slack * allowed.gradient
    if math.prod(case.tokens) < FEW_TOKENS:
        gradient = slack * allowed.row
    if name in ("hidden", "perturbed_hidden"):
        row = worst_row(got, wanted, _least_row(case))
        return {
            label: (distance(got, wanted), gradient),
            f"{label}, worst row": (row, slack * allowed.row),
        }
    # Rows of labels are much larger than the others, in whose place anything could stand if all were measured at once.
    real = case.vocab_size
    labelled = torch.zeros(len(got), dtype=torch.bool, device=got.device)
    valid = problem.targets != case.settings.get("ignore_index", IGNORE_INDEX)
    labelled[problem.targets[valid]] = True
    others = ~labelled
    others[real:] = False
    floor = FLOOR * norm(wanted)
    found = {
        f"{label}, labels": (distance(got[labelled], wanted[labelled], floor), gradient),
        f"{label}, others": (distance(got[others], wanted[others], floor), gradient),
    }
    if name == "weight":
        found[f"{label}, worst row"] = (worst_row(got[:real], wanted[:real]), slack * allowed.row)
    if case.padding:
        found[f"{label}, padding"] = (norm(got[real:]), 0.0)
    return found


def _least_row(case: Case) -> float:
    """Below which share of the root mean square a row of hidden's gradient is not measured by itself: its entries are
    right to as many digits as others, but for those of fp16 that are out of its range, and where logits of 1e4 or a
    handful of components leave fewer."""
    if case.data == "certain":
        return 0.0
    return 1.0 if case.dtype == "fp16" or case.data == "large" or case.dim < FEW_COMPONENTS else 0.01


@dataclass
class Rows:
    """Some rows of the gradients, and all losses, of Σ upstream · cross-entropy; tokens and columns say which rows."""

    losses: Tensor
    hidden_grad: Tensor
    weight_grad: Tensor
    tokens: Tensor
    columns: Tensor


def exact_rows(
    hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor, tokens: Tensor, columns: Tensor
) -> Rows:
    """In float64, of the plain loss of hidden (N, D), without a target ignored: never more than PIECE logits."""
    count = len(hidden)
    chunk = max(1, min(count, 4096))
    step = max(1, min(PIECE // chunk, 4 * PIECE // hidden.shape[1]))
    largest = torch.full((count,), -math.inf, dtype=torch.float64, device=hidden.device)
    total = torch.zeros_like(largest)
    for strip in weight.split(step):
        matrix = strip.double()
        for rows in _slices(count, chunk):
            logits = hidden[rows].double() @ matrix.T
            peak = torch.maximum(largest[rows], logits.amax(1))
            total[rows] = total[rows] * (largest[rows] - peak).exp() + (logits - peak[:, None]).exp().sum(1)
            largest[rows] = peak
    lse = largest + total.log()
    own = torch.cat([(hidden[rows].double() * weight[targets[rows]].double()).sum(1) for rows in _slices(count, chunk)])

    sampled = hidden[tokens].double()
    hidden_grad = -weight[targets[tokens]].double()
    for strip in weight.split(step):
        matrix = strip.double()
        hidden_grad += (sampled @ matrix.T - lse[tokens, None]).exp() @ matrix
    rows_of_weight = weight[columns].double()
    weight_grad = torch.zeros_like(rows_of_weight)
    for rows in _slices(count, chunk):
        x = hidden[rows].double()
        values = (x @ rows_of_weight.T - lse[rows, None]).exp()
        values -= (targets[rows, None] == columns[None, :]).double()
        weight_grad += (values * upstream[rows, None].double()).T @ x
    return Rows(lse - own, hidden_grad * upstream[tokens, None].double(), weight_grad, tokens, columns)


def sample_rows(targets: Tensor, vocab_size: int, count: int) -> tuple[Tensor, Tensor]:
    """Some tokens and some columns, of targets and of others, the first and the last among them."""
    where = targets.device
    ends = torch.tensor([0, -1], device=where)
    tokens = torch.cat([torch.randint(len(targets), (count,), device=where), ends % len(targets)])
    others = (~_labelled(targets, vocab_size)).nonzero().squeeze(1)
    labels = targets[torch.randint(len(targets), (count,), device=where)]
    if len(others):
        others = others[torch.randint(len(others), (count,), device=where)]
    return tokens.unique(), torch.cat([labels, others, ends % vocab_size]).unique()


def compare_rows(
    loss: Tensor, hidden_grad: Tensor, weight_grad: Tensor, targets: Tensor, wanted: Rows, dtype: str
) -> Errors:
    """`loss` may be all tokens' or their mean; gradients whole."""
    allowed = TOLERANCES[dtype]
    losses = wanted.losses if loss.dim() else wanted.losses.mean()
    dx, dw = hidden_grad[wanted.tokens].double(), weight_grad[wanted.columns].double()
    labelled = _labelled(targets, len(weight_grad))[wanted.columns]
    return {
        "loss": (distance(loss, losses), allowed.values),
        "hidden's gradient": (distance(dx, wanted.hidden_grad), allowed.gradient),
        "hidden's gradient, worst row": (worst_row(dx, wanted.hidden_grad), allowed.row),
        "weight's gradient, labels": (distance(dw[labelled], wanted.weight_grad[labelled]), allowed.gradient),
        "weight's gradient, others": (distance(dw[~labelled], wanted.weight_grad[~labelled]), allowed.gradient),
    }


def _labelled(targets: Tensor, vocab_size: int) -> Tensor:
    """Whether a column is any token's target."""
    found = torch.zeros(vocab_size, dtype=torch.bool, device=targets.device)
    found[targets] = True
    return found


def _slices(count: int, step: int) -> Iterable[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
