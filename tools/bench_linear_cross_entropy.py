"""The linear cross-entropy beside its three bare matrix products and beside torch's own, on the CPU, interleaved.

    python tools/bench_linear_cross_entropy.py --out benchmarks/linear_cross_entropy_cpu.json

Forward and backward, warm. All variants of a size work on the same tensors in the same process, and each round runs all
of them in a shuffled order; the unit is CPU-seconds, process time with all threads. A warm-up round before is not
counted: in it losses, outputs and gradients are compared with float64, and one beyond its tolerance ends the run, for
fast and wrong is no result; and the peak of what torch allocates is recorded. At a size above `EXPENSIVE` only the
variants run that a goal speaks of.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from harness.kernels import LossOutput, chunk_length, linear_cross_entropy

PRODUCTS, HARNESS, PLAIN = "products", "harness", "plain"
PLAIN_CAST, TORCH, TORCH_CHUNKED = "plain, logits to fp32", "torch, default", "torch, chunked"
MEAN, NONE, IGNORED = "mean", "none", "sum, a tenth ignored"
FORMS: dict[str, dict[str, Any]] = {
    MEAN: {},
    NONE: {"reduction": "none"},
    IGNORED: {"reduction": "sum"},
    "mean, smoothing and z-loss": {"label_smoothing": 0.1, "z_loss": 1e-4},
    "mean, softcap": {"softcap": 30.0},
    "mean, three outputs": {"outputs": ("entropy", "lse", "correct")},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EXPENSIVE = 2e11
"""N·V·D above which only what a goal speaks of is measured."""
CHUNKS, EXPENSIVE_CHUNKS = (512, 1024, 2**31), (512, 1024)
"""Tokens a chunk of the bare products, at most all; the number that the harness takes comes in addition."""
UPSTREAM = 0.7
"""Gradient of a reduced loss. In training it is hardly ever 1, of which an implementation could make use."""
# Ours: a bf16 gradient is rounded by up to 2^-8 of its value, twice if it is scaled. Torch's own: in fp32 the label's
# p - 1 cancels, in bf16 logits and probabilities are rounded, too.
TOLERANCES, TORCH_TOLERANCES = {"fp32": 1e-5, "bf16": 8e-3}, {"fp32": 1e-4, "bf16": 0.1}
FLAT_TOKENS, FLAT_DIM, FLAT_VOCABULARIES = 2048, 256, (8192, 32768, 131072)
"""The shapes over which memory beyond the chunk is to stay the same."""
GOALS = {"products": 1.08, "plain": 1.0, "torch": 0.4, "memory": 0.1, "flat": 1.0}
NOTES = [
    "ratios are of CPU-seconds within a round, median and range over the rounds; below 1 is cheaper. "
    "ratio_to_products: over base_products, the fastest of the bare products in fp32 by the median over the rounds, "
    "whatever the dtype; ratio_to_plain: over the same form and dtype by F.linear and F.cross_entropy",
    "bare products: logits = X W', dX = P W, dW = P' X by chunks of so many tokens, no softmax between, into outputs "
    "and a buffer that exist already. 'outputs allocated' makes dX, dW and the chunk anew in each call, as a function "
    "that returns gradients has to: what it costs more is the first touch of that memory",
    "CPU-seconds count both threads, also while one waits for the other: it spins for a moment before it sleeps. "
    "load_average: of a minute, of which this program makes 2 itself; what else runs costs all variants their caches",
    "gradients are left in .grad, and dropped before the next call as zero_grad does it; the upstream gradient of a "
    f"reduced loss is {UPSTREAM}, that of unreduced losses random",
    "peak_bytes_beyond_gradients: the most that torch had allocated at once during the call, less the two gradients as "
    "returned, of its first call. In bf16 harness's fp32 dW and fp32 copy of the weight count",
    "relative_error: largest difference from float64 over the largest value, of the timed problem itself, all tokens",
    "logits are Gaussian of 2 nats, the label's raised by 0 to 20: its probability goes from nothing to 1",
    "'torch, default' is F.linear_cross_entropy without options, which does not chunk; 'torch, chunked' is with "
    "options=LinearCrossEntropyOptions(). 'plain, logits to fp32' casts between F.linear and F.cross_entropy",
]


class Size(NamedTuple):
    tokens: int
    vocab_size: int
    dim: int

    @classmethod
    def parse(cls, text: str) -> Size:
        return cls(*(int(part) for part in text.split("x")))

    def __str__(self) -> str:
        return "x".join(map(str, self))

    @property
    def expensive(self) -> bool:
        return self.tokens * self.vocab_size * self.dim > EXPENSIVE

    @property
    def chunk(self) -> int:
        """Tokens a chunk, as the harness takes them for fp32."""
        return chunk_length(self.tokens, self.vocab_size, 4, True)


@dataclass
class Problem:
    """One form of the loss on given tensors; the leaves are shared by all forms of a dtype."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    upstream: Tensor
    settings: dict[str, Any]

    @property
    def valid_tokens(self) -> int:
        return int((self.targets >= 0).sum())

    @property
    def gradients(self) -> list[Tensor]:
        assert self.hidden.grad is not None
        assert self.weight.grad is not None
        return [self.hidden.grad, self.weight.grad]

    def step(self, contender: Contender) -> LossOutput:
        """Forward and backward."""
        self.forget()
        output = contender(self)
        output.loss.backward(self.upstream.to(output.loss.dtype))
        return output

    def forget(self) -> None:
        self.hidden.grad = self.weight.grad = None


Contender = Callable[[Problem], LossOutput]
Result = TypeVar("Result")


def draw(size: Size, dtype: str) -> Callable[[str], Problem]:
    """Random tensors; gives the problem of a form on them."""
    generator = torch.Generator().manual_seed(sum(size))
    weight = torch.randn(size.vocab_size, size.dim, generator=generator).mul_(2 / size.dim**0.5)
    targets = torch.randint(size.vocab_size, (size.tokens,), generator=generator)
    hidden = torch.randn(size.tokens, size.dim, generator=generator)
    # Raises the label's logit by up to 20: a row of the weight has a squared length of about 4.
    hidden += weight[targets] * (5 * torch.rand(size.tokens, 1, generator=generator))
    some_ignored = targets.masked_fill(torch.rand(size.tokens, generator=generator) < 0.1, -100)
    each = torch.randn(size.tokens, generator=generator)
    leaves = [tensor.to(DTYPES[dtype]).requires_grad_() for tensor in (hidden, weight)]

    def pose(form: str) -> Problem:
        upstream = each if form == NONE else torch.tensor(UPSTREAM)
        return Problem(leaves[0], leaves[1], some_ignored if form == IGNORED else targets, upstream, FORMS[form])

    return pose


def harness(problem: Problem) -> LossOutput:
    return linear_cross_entropy(problem.hidden, problem.weight, problem.targets, **problem.settings)


def plain(problem: Problem, dtype: torch.dtype | None = None) -> LossOutput:
    """What one would write by hand; the outputs without gradients. `dtype` is what the logits are cast to."""
    settings = dict(problem.settings)
    outputs, softcap, z_loss = (settings.pop(name, None) for name in ("outputs", "softcap", "z_loss"))
    logits = F.linear(problem.hidden, problem.weight)
    if dtype is not None:
        logits = logits.to(dtype)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, problem.targets, **settings)
    if z_loss:
        loss = loss + z_loss * logits.logsumexp(-1).square().mean()
    if not outputs:
        return LossOutput(loss, PLAIN)
    with torch.no_grad():
        lse = logits.logsumexp(-1)
        log_probs = logits - lse[:, None]
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return LossOutput(loss, PLAIN, lse, entropy=entropy, correct=logits.argmax(-1) == problem.targets)


def torch_default(problem: Problem) -> LossOutput:
    return LossOutput(F.linear_cross_entropy(problem.hidden, problem.weight, problem.targets), TORCH)


def torch_chunked(problem: Problem) -> LossOutput:
    options = torch.nn.LinearCrossEntropyOptions()
    loss = F.linear_cross_entropy(problem.hidden, problem.weight, problem.targets, options=options)
    return LossOutput(loss, TORCH_CHUNKED)


class Products:
    """The three products alone, by chunks of so many tokens."""

    def __init__(self, problem: Problem) -> None:
        self.hidden, self.weight = problem.hidden.detach(), problem.weight.detach()
        self._kept: list[Tensor] = []

    def allocate(self, length: int) -> list[Tensor]:
        """A chunk of logits, dX and dW."""
        logits = self.hidden.new_empty(length, len(self.weight))
        return [logits, torch.empty_like(self.hidden), torch.empty_like(self.weight)]

    def compute(self, length: int, into_kept: bool) -> None:
        """Into tensors that earlier calls have left, or into new ones."""
        if into_kept and (not self._kept or len(self._kept[0]) < length):
            self._kept = self.allocate(length)
        logits, hidden_grad, weight_grad = self._kept if into_kept else self.allocate(length)
        for start in range(0, len(self.hidden), length):
            part = self.hidden[start : start + length]
            chunk = torch.mm(part, self.weight.t(), out=logits[: len(part)])
            torch.mm(chunk, self.weight, out=hidden_grad[start : start + length])
            weight_grad.addmm_(chunk.t(), part, beta=0.0 if start == 0 else 1.0)


@dataclass
class Variant:
    """Something to be timed, and what was seen of it."""

    who: str
    form: str
    dtype: str
    work: Callable[[], LossOutput | None]
    problem: Problem | None = None
    """None for the products, which have no result to judge."""
    ran: str | None = None
    errors: dict[str, float] | None = None
    peak_bytes: int | None = None
    """Of one call, beyond the gradients."""
    spent: list[tuple[float, float]] = field(default_factory=list)
    """CPU and wall seconds of each counted round."""

    @property
    def name(self) -> str:
        return f"{self.who}; {self.form}; {self.dtype}"

    @property
    def tolerance(self) -> float:
        return (TOLERANCES if self.who == HARNESS else TORCH_TOLERANCES)[self.dtype]

    @property
    def cost(self) -> float:
        return statistics.median(cpu for cpu, _ in self.spent)

    def over(self, other: Variant | None) -> dict[str, Any] | None:
        """Spread of this one's CPU-seconds over the other's in the same round."""
        if other is None:
            return None
        return spread(ours / theirs for (ours, _), (theirs, _) in zip(self.spent, other.spent, strict=True))


def list_variants(size: Size) -> tuple[list[Variant], dict[str, str]]:
    """All that is measured at a size, and what is not, with the reason."""
    skipped = dict.fromkeys(("Liger's fused linear cross-entropy", "cut-cross-entropy"), "runs on GPUs only")
    contenders: list[tuple[str, str, str, Contender]] = [(HARNESS, MEAN, "fp32", harness)]
    if 4 * size.tokens * size.vocab_size * 4 < memory_line("/proc/meminfo", "MemAvailable"):
        contenders.append((PLAIN, MEAN, "fp32", plain))
    else:
        skipped[PLAIN] = "three times the logits, and what else there is, do not fit into this machine's memory"
    if hasattr(F, "linear_cross_entropy"):
        contenders.append((TORCH_CHUNKED, MEAN, "fp32", torch_chunked))
    else:
        skipped[TORCH_CHUNKED] = f"torch {torch.__version__} has no F.linear_cross_entropy, torch 2.13 has"
    if not size.expensive:
        for form in FORMS:
            if form != MEAN:
                contenders += [(HARNESS, form, "fp32", harness), (PLAIN, form, "fp32", plain)]
        if TORCH_CHUNKED not in skipped:
            contenders.append((TORCH, MEAN, "fp32", torch_default))
        contenders += [(HARNESS, MEAN, "bf16", harness), (PLAIN, MEAN, "bf16", plain)]
        contenders.append((PLAIN_CAST, MEAN, "bf16", partial(plain, dtype=torch.float32)))
    poses = {dtype: draw(size, dtype) for dtype in dict.fromkeys(dtype for _, _, dtype, _ in contenders)}
    variants = [variant for dtype, pose in poses.items() for variant in list_products(size, dtype, pose(MEAN))]
    for who, form, dtype, contender in contenders:
        problem = poses[dtype](form)
        variants.append(Variant(who, form, dtype, partial(problem.step, contender), problem))
    return variants, skipped


def list_products(size: Size, dtype: str, problem: Problem) -> Iterator[Variant]:
    products = Products(problem)
    lengths = [size.chunk, *((EXPENSIVE_CHUNKS if size.expensive else CHUNKS) if dtype == "fp32" else ())]
    for length in sorted({min(length, size.tokens) for length in lengths}):
        yield Variant(PRODUCTS, chunks_of(length), dtype, partial(products.compute, length, into_kept=True))
    if dtype == "fp32" and not size.expensive:
        form = f"{chunks_of(size.chunk)}, outputs allocated"
        yield Variant(PRODUCTS, form, dtype, partial(products.compute, size.chunk, into_kept=False))


def chunks_of(length: int) -> str:
    return f"{length} tokens a chunk"


def exact(problem: Problem) -> dict[str, Tensor]:
    """Loss, outputs and gradients in float64, from the reference, some tokens at a time."""
    hidden, weight = (leaf.detach().double().requires_grad_() for leaf in (problem.hidden, problem.weight))
    reduction = problem.settings.get("reduction", "mean")
    share = 1.0 / problem.valid_tokens if reduction == "mean" else 1.0
    upstream = (problem.upstream.double() * share).expand(len(hidden))
    found: dict[str, list[Tensor]] = {}
    for rows in torch.arange(len(hidden)).split(512):
        settings = {**problem.settings, "reduction": "none", "implementation": "reference"}
        output = linear_cross_entropy(hidden[rows], weight, problem.targets[rows], **settings)
        output.loss.backward(upstream[rows])
        for name, value in values_of(output).items():
            found.setdefault(name, []).append(value)
    joined = {name: torch.cat(parts) for name, parts in found.items()}
    if reduction != "none":
        joined["loss"] = joined["loss"].sum() * share
    assert hidden.grad is not None
    assert weight.grad is not None
    return {**joined, "hidden_grad": hidden.grad, "weight_grad": weight.grad}


def values_of(output: LossOutput) -> dict[str, Tensor]:
    """The loss and those outputs that there are."""
    return {name: value.detach() for name, value in output._asdict().items() if isinstance(value, Tensor)}


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest value; in pieces, so as not to hold a whole weight in float64 again."""
    pieces = zip(got.reshape(-1).split(2**24), wanted.reshape(-1).split(2**24), strict=True)
    difference = torch.stack([(one.double() - other.double()).abs().max() for one, other in pieces]).max()
    return (difference / wanted.double().abs().max()).item() if difference else 0.0


def warm_up_and_judge(variants: Sequence[Variant]) -> None:
    """Runs all once, and compares with float64. Raises ValueError where one is wrong."""
    for variant in variants:
        if variant.problem is None:
            variant.work()
    for kind in dict.fromkeys((variant.form, variant.dtype) for variant in variants if variant.problem):
        wanted: dict[str, Tensor] = {}
        for variant in variants:
            if variant.problem is None or (variant.form, variant.dtype) != kind:
                continue
            wanted = wanted or exact(variant.problem)
            variant.peak_bytes, output = watch_memory(variant.work, variant.problem)
            assert output is not None
            gradients = zip(("hidden_grad", "weight_grad"), variant.problem.gradients, strict=True)
            got = {**values_of(output), **dict(gradients)}
            variant.ran = output.implementation
            variant.errors = {name: relative_error(value, wanted[name]) for name, value in got.items()}
            variant.problem.forget()
            if not all(error <= variant.tolerance for error in variant.errors.values()):  # this way round for nan
                raise ValueError(f"{variant.name}: beyond {variant.tolerance} from float64: {variant.errors}")
            print(f"{variant.name}: right, {max(variant.errors.values()):.0e} from float64", flush=True)


def take_rounds(variants: Sequence[Variant], rounds: int) -> None:
    order = random.Random(1)
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", flush=True)
        for variant in order.sample(variants, len(variants)):
            cpu, wall = time.process_time(), time.perf_counter()
            variant.work()
            variant.spent.append((time.process_time() - cpu, time.perf_counter() - wall))
            if variant.problem is not None:
                variant.problem.forget()


def watch_memory(work: Callable[[], Result], problem: Problem) -> tuple[int, Result]:
    """The most bytes that torch held at once of what it allocated during a step, less the gradients that it leaves."""

    def walk(nodes: Iterable[Any]) -> Iterator[Any]:
        for node in nodes:
            yield node
            yield from walk(node.children)

    problem.forget()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True, with_stack=True) as traced:
        result = work()
    events = walk(traced.profiler.kineto_results.experimental_event_tree())
    allocations = [event for event in events if type(event.extra_fields).__name__ == "_ExtraFields_Allocation"]
    in_order = sorted(allocations, key=lambda event: event.start_time_ns)
    peak = max(accumulate((event.extra_fields.alloc_size for event in in_order), initial=0))
    return peak - sum(gradient.nbytes for gradient in problem.gradients), result


def memory_line(path: str, key: str) -> int:
    """Bytes that one of Linux's files states in kB."""
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def memory_over_vocabularies() -> dict[str, Any]:
    """What is allocated beyond the gradients and one chunk of logits as the vocabulary grows."""
    rows = []
    for vocab_size in FLAT_VOCABULARIES:
        size = Size(FLAT_TOKENS, vocab_size, FLAT_DIM)
        problem = draw(size, "fp32")(MEAN)
        peak, _ = watch_memory(partial(problem.step, harness), problem)
        chunk = size.chunk * vocab_size * 4
        rows.append({"vocab_size": vocab_size, "chunk_tokens": size.chunk, "chunk": chunk, "beyond": peak - chunk})
    return {"tokens": FLAT_TOKENS, "dim": FLAT_DIM, "dtype": "fp32", "bytes": rows}


def spread(values: Iterable[float]) -> dict[str, Any]:
    ordered = sorted(values)
    return {"median": statistics.median(ordered), "range": [ordered[0], ordered[-1]]}


def measure(size: Size, rounds: int, only: str) -> dict[str, Any]:
    """All of one size."""
    load = os.getloadavg()[0]
    variants, skipped = list_variants(size)
    variants = [each for each in variants if each.problem is None or re.search(only, each.name)]
    warm_up_and_judge(variants)
    take_rounds(variants, rounds)
    bare = [each for each in variants if each.who == PRODUCTS and each.dtype == "fp32" and "alloc" not in each.form]
    base = min(bare, key=lambda each: each.cost)
    plains = {(each.form, each.dtype): each for each in variants if each.who == PLAIN}
    chunked = next((each for each in variants if each.who == TORCH_CHUNKED), None)
    rows = []
    for each in variants:
        like = plains.get((each.form, each.dtype))
        row: dict[str, Any] = {
            "variant": each.who,
            "form": each.form,
            "dtype": each.dtype,
            "ran": each.ran,
            "ratio_to_products": each.over(base),
            "ratio_to_plain": each.over(like),
            "ratio_to_torch_chunked": each.over(chunked) if each.who == HARNESS else None,
            "cpu_seconds": spread(cpu for cpu, _ in each.spent),
            "wall_seconds": statistics.median(wall for _, wall in each.spent),
            "relative_error": each.errors,
            "peak_bytes_beyond_gradients": each.peak_bytes,
        }
        if each.problem is not None:
            row["cpu_microseconds_a_valid_token"] = each.cost / each.problem.valid_tokens * 1e6
        if each.peak_bytes and like and like.peak_bytes:
            row["memory_ratio_to_plain"] = each.peak_bytes / like.peak_bytes
        rows.append({key: value for key, value in row.items() if value is not None})
    return {
        "size": dict(size._asdict()),
        "chunk_tokens": size.chunk,
        "base_products": base.form,
        "load_average": {"before": load, "after": os.getloadavg()[0]},
        "rows": rows,
        "not_measured": skipped,
    }


def list_goals(results: Sequence[dict[str, Any]], flat: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures that were aimed at, beside those that came out."""
    goals: list[dict[str, Any]] = []

    def add(what: str, goal: float, figure: float) -> None:
        goals.append({"what": what, "goal": goal, "figure": figure, "met": figure <= goal})

    for result in results:
        where = Size(**result["size"])
        for row in result["rows"]:
            if row["variant"] != HARNESS or row["dtype"] != "fp32":
                continue
            of = f"{where}, {row['form']}:"
            if row["form"] == MEAN:
                add(f"{of} CPU-seconds over the bare products'", GOALS["products"], row["ratio_to_products"]["median"])
                if "ratio_to_torch_chunked" in row:
                    of_torch = row["ratio_to_torch_chunked"]["median"]
                    add(f"{of} CPU-seconds over F.linear_cross_entropy's, chunked", GOALS["torch"], of_torch)
            if "ratio_to_plain" in row:
                add(f"{of} CPU-seconds over plain torch's", GOALS["plain"], row["ratio_to_plain"]["median"])
            if "memory_ratio_to_plain" in row:
                add(f"{of} peak beyond dX and dW over plain torch's", GOALS["memory"], row["memory_ratio_to_plain"])
    beyond = [row["beyond"] for row in flat["bytes"]]
    small, large = (f"V = {row['vocab_size']}" for row in (flat["bytes"][0], flat["bytes"][-1]))
    add(f"bytes beyond the chunk at {large} over those at {small}", GOALS["flat"], beyond[-1] / beyond[0])
    return goals


def print_result(result: dict[str, Any]) -> None:
    print(f"\n{Size(**result['size'])}; the base is the products by {result['base_products']}. CPU-seconds:")
    for row in result["rows"]:
        ratio, (low, high) = row["ratio_to_products"]["median"], row["ratio_to_products"]["range"]
        line = f"{row['variant']:22}{row['form']:41}{row['dtype']:5}{row['cpu_seconds']['median']:7.2f}"
        line += f"  products x {ratio:.3f} ({low:.3f}-{high:.3f})"
        if "ratio_to_plain" in row:
            line += f"  plain x {row['ratio_to_plain']['median']:.3f}"
        if "relative_error" in row:
            line += f"  {row['peak_bytes_beyond_gradients'] / 1e6:5.0f} MB"
            line += f"  within {max(row['relative_error'].values()):.0e}"
        print(line, flush=True)


def machine() -> dict[str, Any]:
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_line("/proc/meminfo", "MemTotal"),
        "huge_pages": Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().strip(),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in ("torch", "numpy")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [Size(2048, 50304, 768), Size(4096, 128256, 1024)]
    parser.add_argument(
        "--sizes", type=Size.parse, nargs="+", default=sizes, help="tokens x vocabulary x D, as 96x99x8"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="a regular expression for 'who; form; dtype'; products always run")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    results = []
    for size in arguments.sizes:
        results.append(measure(size, arguments.rounds, arguments.only))
        print_result(results[-1])
    flat = memory_over_vocabularies()
    goals = list_goals(results, flat)
    print()
    for goal in goals:
        print(f"{'met   ' if goal['met'] else 'MISSED'} {goal['figure']:.3f} (goal {goal['goal']}): {goal['what']}")
    document = {
        "command": shlex.join(["python", "tools/bench_linear_cross_entropy.py", *sys.argv[1:]]),
        "machine": machine(),
        "rounds": arguments.rounds,
        "notes": NOTES,
        "goals": goals,
        "results": results,
        "memory_over_vocabularies": flat,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
