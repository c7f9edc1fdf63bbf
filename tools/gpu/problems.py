"""Random tensors for a case, and what an implementation makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpu.cases import Case
from gpu.device import Device
from harness.kernels import IGNORE_INDEX, CompSum, LossOutput, VocabShard, linear_cross_entropy

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "float64": torch.float64}
DIFFERENTIABLE = ("lse", "logprob", "entropy", "max_prob")
LEAVES = ("hidden", "weight", "bias", "perturbed_hidden")
STEEPNESS = 14.0
"""Nats by which a steep bias falls over the vocabulary: far columns hold next to nothing."""
FEW_CLASSES = 8
"""Up to which no target's logit is raised: float64 itself has no digits of a loss of 1e-17."""
LEAST_GAP = 1e-4
"""Between the two largest logits of a token whose likeliest class is compared: rounding must not decide it."""
DRAWS = 100


@dataclass
class Problem:
    """A case's tensors, and the upstream gradients of the loss and of the differentiable outputs."""

    case: Case
    leaves: dict[str, Tensor]
    targets: Tensor
    class_weights: Tensor | None
    token_weights: Tensor | None
    upstream: dict[str, Tensor]

    def arguments(self) -> dict[str, Any]:
        """What the interface takes beside tensors with gradients, targets and implementation."""
        case = self.case
        settings: dict[str, Any] = {"reduction": "none", **case.settings}
        if "weight_grad_dtype" in settings:
            settings["weight_grad_dtype"] = DTYPES[settings["weight_grad_dtype"]]
        if case.tau is not None:
            settings["loss"] = CompSum(case.tau, case.rho, case.nu)
        rows = len(self.leaves["weight"])
        settings["shard"] = VocabShard(0, rows, rows - case.padding)
        settings["class_weights"] = self.class_weights
        return settings | {"outputs": case.outputs}


def draw(case: Case, device: Device) -> Problem:
    """Fresh tensors, from torch's generator."""
    for _ in range(DRAWS):
        problem = _draw(case, device)
        if not {"correct", "max_prob"} & {*case.outputs} or _least_gap(problem) > LEAST_GAP:
            return problem
    raise RuntimeError(f"{case.name}: in {DRAWS} draws the two largest logits of a token were closer than {LEAST_GAP}")


def _draw(case: Case, device: Device) -> Problem:
    where, dtype = {"device": device.torch}, DTYPES[case.dtype]
    rows, dim = case.vocab_size + case.padding, case.dim
    targets = torch.randint(0, case.vocab_size, case.tokens, **where)
    if case.data == "steep":
        targets = targets // 8
    weight = torch.randn(rows, dim, **where) * (2 / dim**0.5)
    hidden = torch.randn(*case.tokens, dim, **where)
    if case.data == "certain":
        hidden = hidden * 0.1 + weight[targets] * (3.5 + 1.5 * torch.rand(*case.tokens, 1, **where))
    elif case.data == "flat":
        weight = torch.zeros_like(weight)
    elif case.data == "large":
        weight = weight * 1500
    elif case.tau is not None and case.tau < 1.0:
        hidden = hidden * 0.5  # else the least likely token's 1/p is all that counts
    elif case.vocab_size > FEW_CLASSES:
        hidden = hidden + weight[targets] * (5 * torch.rand(*case.tokens, 1, **where))
    leaves = {"hidden": hidden.to(dtype), "weight": weight.to(dtype)}
    if "bias" in case.tensors:
        bias = torch.randn(rows, **where)
        if case.data == "masked":
            masked = torch.rand(rows, **where) < 0.25
            masked[targets.unique()] = False
            bias = bias.masked_fill(masked, float("-inf"))
        elif case.data == "steep":
            bias = 0.1 * bias + torch.linspace(0.0, -STEEPNESS, rows, **where)
        leaves["bias"] = bias.to(dtype)
    if "perturbed_hidden" in case.tensors:
        leaves["perturbed_hidden"] = (hidden + torch.randn_like(hidden) / 3).to(dtype)
    for name in ("hidden", "weight"):
        leaves[name] = _lay_out(leaves[name], case.layout, name)
    targets = targets.masked_fill(
        torch.rand(case.tokens, **where) < case.ignored, case.settings.get("ignore_index", IGNORE_INDEX)
    )
    shape = case.tokens if case.reduction == "none" else ()
    upstream = {"loss": torch.randn(shape, **where) + 0.1 if shape else 0.5 + torch.rand((), **where)}
    for name in case.outputs:
        if name in DIFFERENTIABLE:
            upstream[name] = torch.randn(case.tokens, **where)
    return Problem(
        case=case,
        leaves=leaves,
        targets=targets,
        class_weights=2 * torch.rand(case.vocab_size, **where) if "class_weights" in case.tensors else None,
        token_weights=torch.rand(case.tokens, **where) if "token_weights" in case.tensors else None,
        upstream=upstream,
    )


def _lay_out(matrix: Tensor, layout: str, name: str) -> Tensor:
    """The same values, elsewhere in memory."""
    dim = matrix.shape[-1]
    if layout == "offset":  # begins beside a multiple of 16 bytes
        return torch.nn.functional.pad(matrix, (1, 0))[..., 1:]
    if layout == "every other row":
        return matrix.repeat_interleave(2, dim=0)[::2]
    if layout == "rows apart":
        return torch.nn.functional.pad(matrix, (0, 24))[..., :dim]
    if layout == "transposed weight" and name == "weight":
        return matrix.t().contiguous().t()
    if layout == "expanded" and name == "hidden":
        return matrix.reshape(-1, dim)[:1].expand(*matrix.shape)
    return matrix


def _least_gap(problem: Problem) -> float:
    """Between the two largest logits of any token."""
    real = problem.case.vocab_size
    logits = problem.leaves["hidden"].double() @ problem.leaves["weight"][:real].double().T
    if "bias" in problem.leaves:
        logits = logits + problem.leaves["bias"][:real].double()
    gaps = logits.topk(min(2, real), dim=-1).values.diff(dim=-1).abs()
    return gaps.min().item() if gaps.numel() else 1.0


def solve(
    problem: Problem, implementation: str, dtype: torch.dtype | None = None, **more: Any
) -> tuple[LossOutput, dict[str, Tensor]]:
    """The result, and the gradients of the leaves by name, which are cast to `dtype` first."""
    leaves = {name: leaf.detach() if dtype is None else leaf.to(dtype) for name, leaf in problem.leaves.items()}
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    arguments = problem.arguments() | more
    wide = arguments.get("weight_grad_dtype")
    if wide is not None and hasattr(leaves["weight"], "grad_dtype"):
        leaves["weight"].grad_dtype = wide  # else autograd rounds it
    output = linear_cross_entropy(
        **leaves,
        targets=problem.targets,
        token_weights=problem.token_weights,
        implementation=implementation,
        **arguments,
    )
    names = list(problem.upstream)
    values = [getattr(output, name) for name in names]
    given = [problem.upstream[name].to(value.dtype) for name, value in zip(names, values, strict=True)]
    gradients = torch.autograd.grad(values, list(leaves.values()), given)
    return output, dict(zip(leaves, gradients, strict=True))


@contextmanager
def replaced(module: Any, **values: Any) -> Iterator[None]:
    """Attributes of a module with other values for a while."""
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
