"""Measurements that inform tuning: each tiling, each step of the backward, workspaces of several sizes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gpu.checks import problem_class, seed_of
from gpu.device import Device, Shape
from gpu.problems import replaced
from gpu.speed import Teller
from harness.kernels import linear_cross_entropy
from harness.kernels.linear_cross_entropy.fused import launch, passes, plan, tilings
from harness.kernels.linear_cross_entropy.fused.products import accumulate
from harness.kernels.linear_cross_entropy.types import Terms

STRIPS = 16
"""Of the vocabulary, one after another in a call: one alone is too short to time."""
BLOCKS = (
    (1, 1),
    (1, 1 / 2),
    (1, 2),
    (1, 4),
    (1, 16),
    (1 / 2, 1),
    (1 / 2, 2),
    (1 / 4, 4),
    (2, 1 / 2),
    (4, 1 / 4),
    (100, 1),
)
"""Multiples of the planned tokens a chunk and columns a strip; at most all tokens."""


class Bench:
    """A shape's tensors and the works on them."""

    def __init__(self, shape: Shape, device: Device, seed: int) -> None:
        torch.manual_seed(seed_of(seed, f"tuning {shape}"))
        where = {"device": device.torch}
        self.shape, self.device = shape, device
        self.hidden = torch.randn(shape.tokens, shape.dim, **where).bfloat16()
        self.weight = (torch.randn(shape.vocab_size, shape.dim, **where) * (2 / shape.dim**0.5)).bfloat16()
        self.targets = torch.randint(shape.vocab_size, (shape.tokens,), **where)
        self.plan = plan.plan_blocks(shape.tokens, shape.vocab_size, shape.dim, 2, parts=passes.LEAST_CHUNKS)
        labels = self.targets.int()
        self.head = launch.Head(self.hidden, self.weight, None, None, labels, Terms(shape.vocab_size))
        chunk = min(self.plan.chunk, shape.tokens)
        self.chunk = self.head.of(self.hidden[:chunk], labels[:chunk])
        # Largest logit, scale of exp(z − largest), entry of the label: of about the size that they have.
        self.coefficients = torch.zeros(7, chunk, **where)
        self.coefficients[0], self.coefficients[1], self.coefficients[2] = 8.0, 1e-4, -1.0
        width = min(self.plan.strip, shape.vocab_size)
        self.workspace = torch.zeros(chunk, -(-width // 8) * 8, dtype=torch.bfloat16, **where)[:, :width]
        self.hidden_grad = torch.zeros(chunk, shape.dim, **where)
        self.weight_grad = torch.zeros(width, shape.dim, **where)

    def strips(self) -> list[range]:
        """Whole ones."""
        width = self.workspace.shape[1]
        starts = range(0, self.shape.vocab_size - width + 1, self.plan.strip)
        return [range(start, start + width) for start in starts[:STRIPS]]

    def measure(self, work: Callable[[], object], operations: float) -> dict[str, Any]:
        """Milliseconds, and the rate; the first call is not counted."""
        try:
            work()
            self.device.synchronize()
            times = [self.device.milliseconds(work) for _ in range(self.device.least_rounds)]
        except Exception as error:
            if not self.device.alive():
                raise
            return {"error": f"{type(error).__name__}: {error}"[:300]}
        median = statistics.median(times)
        return {"milliseconds": median, "range": [min(times), max(times)], "tflops": operations / median / 1e9}

    def facts(self, tiling: tilings.Tiling) -> dict[str, Any]:
        def work() -> object:
            return launch.run_facts(self.head, tiling, entropy=False, top=False, tile_lses=False)

        return self.measure(work, 2 * self.shape.products)

    def gradient(self, tiling: tilings.Tiling) -> dict[str, Any]:
        def work() -> None:
            for strip in self.strips():
                launch.run_gradient(
                    self.chunk, tiling, strip, self.coefficients, None, None, self.workspace, None, entropy=False
                )

        return self.measure(work, self._strip_operations())

    def _strip_operations(self) -> float:
        return 2 * self.workspace.numel() * self.shape.dim * len(self.strips())

    def steps(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The backward's parts, all over the same strips; and the same products with 16-bit results."""
        matrices = [self.weight[strip.start : strip.stop] for strip in self.strips()]
        chosen = self.chunk.tiling("gradient", rich=False, tokens=self.shape.tokens)
        narrow = [torch.empty_like(each, dtype=torch.bfloat16) for each in (self.hidden_grad, self.weight_grad)]
        yield "gradient kernel", {"tiling": str(chosen)} | self.gradient(chosen)

        def over_strips(work: Callable[[Tensor], object]) -> dict[str, Any]:
            return self.measure(lambda: [work(matrix) for matrix in matrices], self._strip_operations())

        left, right = self.workspace, self.chunk.hidden
        yield "hidden's product, added to fp32", over_strips(lambda w: accumulate(self.hidden_grad, left, w, add=True))
        yield "hidden's product, to bf16", over_strips(lambda w: torch.mm(left, w, out=narrow[0]))
        yield (
            "weight's product, to fp32",
            over_strips(lambda w: accumulate(self.weight_grad, left.t(), right, add=False)),
        )
        yield (
            "weight's product, added to fp32",
            over_strips(lambda w: accumulate(self.weight_grad, left.t(), right, add=True)),
        )
        yield "weight's product, to bf16", over_strips(lambda w: torch.mm(left.t(), right, out=narrow[1]))

    def whole(self) -> Callable[[], list[Tensor]]:
        """Forward and backward."""
        leaves = [self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_()]
        leaves[1].grad_dtype = wide = torch.float32

        def work() -> list[Tensor]:
            output = linear_cross_entropy(*leaves, self.targets, weight_grad_dtype=wide, implementation="triton")
            return list(torch.autograd.grad(output.loss, leaves))

        return work

    def in_graph(self) -> dict[str, Any]:
        """The same replayed as a CUDA graph: what the host costs is the difference."""
        try:
            return self.measure(self.device.replayable(self.whole()), 8 * self.shape.products)
        except Exception as error:
            self.device.synchronize()
            return {"error": f"{type(error).__name__}: {error}"[:300]}

    def workspaces(self) -> Iterator[dict[str, Any]]:
        """Forward and backward with other sizes of blocks."""
        work = self.whole()
        tokens, columns, _ = self.shape
        sizes = [
            (_up(self.plan.chunk * chunk, tokens), _up(self.plan.strip * strip, columns)) for chunk, strip in BLOCKS
        ]
        for chunk, strip in list(dict.fromkeys(sizes))[: self.device.workspaces]:
            with replaced(passes, plan_blocks=lambda *arguments, sizes=(chunk, strip), **options: plan.Plan(*sizes)):
                found = self.measure(work, 8 * self.shape.products)
                if "error" not in found:
                    found["peak_bytes"] = self.device.peak_bytes(work)
            yield {"chunk": chunk, "strip": strip, "block_bytes": 2 * chunk * strip, **found}


def _up(value: float, most: int) -> int:
    """To a multiple of what blocks are cut at, but to no more than holds `most`."""
    unit = plan.MULTIPLE
    return min(max(-(-int(value) // unit), 1), -(-most // unit)) * unit


def measure_shape(shape: Shape, device: Device, job: dict[str, Any], teller: Teller) -> dict[str, Any]:
    """All of one shape, as far as the time goes."""
    bench = Bench(shape, device, job["seed"])
    found: dict[str, Any] = {"name": str(shape), "plan": {"chunk": bench.plan.chunk, "strip": bench.plan.strip}}

    def in_time(what: str) -> bool:
        name = f"{shape}; {what}"
        if time.time() > job["until"] or name in job["lost"]:
            found.setdefault("left_out", []).append(what)
            return False
        teller.tell(begin=name)
        return True

    for kernel, measure in (("facts", bench.facts), ("gradient", bench.gradient)):
        rows = found.setdefault(kernel, [])
        for tiling in tilings.candidates(problem_class(device, kernel, rich=False)):
            if in_time(f"{kernel}, {tiling}"):
                rows.append({"tiling": str(tiling), **measure(tiling)})
    if in_time("steps"):
        found["steps"] = dict(bench.steps())
    if in_time("workspaces"):
        found["workspaces"] = list(bench.workspaces())
    if in_time("graph"):
        found["graph"] = bench.in_graph()
    return found


def store_fastest(results: list[dict[str, Any]], device: Device) -> dict[str, str]:
    """Keeps the tilings that are fastest over all shapes, each counting alike, in the kernels' cache."""
    stored = {}
    for kernel in tilings.KERNELS:
        problem = problem_class(device, kernel, rich=False)

        def measure(tiling: tilings.Tiling, kernel: str = kernel) -> float:
            rows = [row for result in results for row in result[kernel] if row["tiling"] == str(tiling)]
            if len(rows) < len(results) or any("error" in row for row in rows):
                raise ValueError("was not measured on all shapes")
            return statistics.mean(1.0 / row["tflops"] for row in rows)

        stored[kernel] = str(tilings.tune(problem, measure, describable=True))
    return stored


def measure_all(job: dict[str, Any], device: Device, teller: Teller) -> None:
    """All shapes, and the choice if it is wanted."""
    shapes = {str(shape): shape for shape in device.shapes}
    teller.tell(plan=list(shapes))
    results = []
    for name, shape in shapes.items():
        if name in job["finished"]:
            continue
        results.append(measure_shape(shape, device, job, teller))
        teller.tell(result=results[-1])
        device.free()
    if job["tune"] and len(results) == len(shapes):
        teller.tell(stored=store_fastest(results, device), file=str(tilings.cache_file()))
