"""What every rank of a group runs: cases of a shared vocabulary, each against the float64 reference of one rank.

All ranks draw the same problems from the same seed and know the whole answer; each takes its part and judges what it
gets. What is wrong goes into a report, so that all ranks go on to meet in the next collective.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from harness.kernels import CompSum, LossOutput, VocabShard
from harness.kernels.linear_cross_entropy import blocked, checks, sweep, vocab_parallel
from tests.kernels.cases import Problem, differentiate, draw

GROUP_TIMEOUT = timedelta(seconds=60)
REDUCTIONS = ("mean", "sum", "none")
FLAGS = (False, True)
EVERYTHING: dict[str, Any] = {
    "bias": True,
    "class_weights": True,
    "token_weights": True,
    "loss": CompSum(tau=1.4, rho=1.2),
    "label_smoothing": 0.2,
    "z_loss": 0.01,
    "softcap": 4.0,
    "temperature": 0.6,
}


@dataclass
class Ranks:
    """The ranks of a group from the view of one: splits problems, solves its part, and notes what is wrong."""

    group: dist.ProcessGroup | None
    failures: list[str] = field(default_factory=list)
    label: str = ""

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    @property
    def count(self) -> int:
        return 1 if self.group is None else self.group.size()

    def expect(self, fine: bool, what: str) -> None:
        if not fine:
            self.failures.append(f"rank {self.rank} of {self.count}, {self.label}: {what}")

    def cut(self, rows: int) -> list[int]:
        """Random ends of the ranks' rows; each has at least one."""
        inner = (torch.randperm(rows - 1)[: self.count - 1] + 1).sort().values.tolist()
        return [0, *inner, rows]

    def part(self, problem: Problem, ends: list[int], sequence_parallel: bool) -> Problem:
        start, stop = ends[self.rank], ends[self.rank + 1]
        own = {name: getattr(problem, name)[start:stop] for name in ("weight", "bias")}
        if sequence_parallel:
            own |= {name: self.own_tokens(getattr(problem, name)) for name in ("hidden", "perturbed_hidden")}
        shard = VocabShard(start, stop, problem.shard.vocab_size, self.group, sequence_parallel)
        return replace(problem, shard=shard, **own)

    def own_tokens(self, whole: Tensor) -> Tensor:
        """This rank's (tokens / ranks, D) of (..., D)."""
        return whole.reshape(-1, whole.shape[-1]).chunk(self.count)[self.rank]

    def compare(
        self,
        problem: Problem,
        ends: list[int],
        *,
        sequence_parallel: bool = False,
        tolerance: float = 2e-13,
        atol: float = 1e-14,
        fields: Sequence[str] = ("loss",),
        implementation: str = "blocked",
        **settings: Any,
    ) -> LossOutput:
        """Solves the part and compares loss, outputs and the gradients of `fields` under random upstream gradients:
        with the reference of the whole problem in float64, and bit by bit among ranks.

        tolerance is relative to the largest value, and one rounding to a 16-bit dtype is allowed on top; atol is
        absolute, by default what the reference itself may be off.
        """
        nu = settings["loss"].nu if isinstance(settings.get("loss"), CompSum) else 0.0
        settings = {"perturbed_hidden": nu > 0.0, **settings}
        exact, exact_gradients, upstream = differentiate(
            in_float64(problem), fields, implementation="reference", **settings
        )
        own = self.part(problem, ends, sequence_parallel)
        output, gradients, _ = differentiate(own, fields, upstream, implementation=implementation, **settings)

        outputs = settings.get("outputs", ())
        for name in ("loss", *outputs):
            wanted = getattr(exact, name)
            self.expect_close(name, getattr(output, name), wanted, wanted, tolerance, atol)
        names = ["hidden", "weight", *(name for name in ("bias", "perturbed_hidden") if settings.get(name))]
        found = dict(zip(names, gradients, strict=True))
        for name, got, wanted in zip(names, gradients, exact_gradients, strict=True):
            if name in ("hidden", "perturbed_hidden"):
                own_wanted = self.own_tokens(wanted) if sequence_parallel else wanted
            else:
                own_wanted = wanted[ends[self.rank] : ends[self.rank + 1]]
                self.expect(
                    bool(got[own.shard.columns :].eq(0).all()), f"gradient of padding in {name} is not exactly 0"
                )
            self.expect_close(f"gradient of {name}", got, own_wanted, wanted, tolerance, atol)
        self.expect_same_bits("loss and outputs", [output.loss, *(getattr(output, name) for name in outputs)])
        if not sequence_parallel:
            tokenwise = [found[name] for name in ("hidden", "perturbed_hidden") if name in found]
            self.expect_same_bits("gradient of hidden", tokenwise)
        return output

    def expect_close(
        self, name: str, got: Tensor, wanted: Tensor, scale: Tensor, tolerance: float, atol: float = 0.0
    ) -> None:
        """tolerance is relative to the largest of `scale`; one rounding to a 16-bit dtype is allowed on top."""
        if got.shape != wanted.shape or not got.isfinite().all():
            return self.expect(False, f"{name} {tuple(got.shape)} {got.flatten()[:5]}, must be {wanted.flatten()[:5]}")
        if not got.numel():
            return None
        rounding, largest = 0.0, scale.double().abs().max().item()
        if got.dtype in (torch.bfloat16, torch.float16):
            limits = torch.finfo(got.dtype)
            # Below the smallest normal number (6e-5 in fp16) what is lost no longer shrinks with the value.
            rounding, largest = 0.505 * limits.eps, max(largest, limits.smallest_normal)
        off = (got.double() - wanted.double()).abs().max().item()
        allowed = max(atol, (tolerance + rounding) * largest)
        return self.expect(off <= allowed, f"{name} is off by {off:.3g}, allowed {allowed:.3g}")

    def expect_same_bits(self, what: str, tensors: list[Tensor]) -> None:
        raw = b"".join(bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()) for tensor in tensors)
        digests: list[str] = [""] * self.count
        dist.all_gather_object(digests, hashlib.sha256(raw).hexdigest(), group=self.group)
        self.expect(len(set(digests)) == 1, f"{what} has not the same bits on all ranks")

    def expect_same_error(self, line: str, call: Callable[[], object]) -> None:
        try:
            call()
            said = "nothing raised"
        except ValueError as error:
            said = str(error)
        self.expect(said == line, f"said {said!r}, must say {line!r}")


@contextmanager
def chunks(tokens: int, columns: int, element_bytes: int = 8) -> Iterator[None]:
    """Chunks of at most so many tokens, by the bytes of the rank with most columns."""
    with ExitStack() as stack:
        for where in ("CPU", "ACCELERATOR"):
            stack.enter_context(mock.patch.object(sweep, f"{where}_CHUNK_BYTES", tokens * columns * element_bytes))
            stack.enter_context(mock.patch.object(sweep, f"{where}_CHUNK_TOKENS", (1, 10**6)))
        stack.enter_context(mock.patch.object(sweep, "CPU_CHUNKS", 10**6))
        yield


@contextmanager
def host_blind() -> Iterator[None]:
    """What is done on devices whose values the host doesn't look at, on the CPU."""
    with ExitStack() as stack:
        for module in (blocked, checks, sweep):
            stack.enter_context(mock.patch.object(module, "host_sees", return_value=False))
        yield


@contextmanager
def collectives() -> Iterator[list[tuple[str, int]]]:
    """Lists the collectives of the loss as they are called, each with how many numbers this rank hands in."""
    called: list[tuple[str, int]] = []

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            called.append((name, args[-1].numel()))
            return call(*args, **kwargs)

        return count

    with (
        mock.patch.object(vocab_parallel, "_all_gather", counted("gather", vocab_parallel._all_gather)),
        mock.patch.object(vocab_parallel, "_reduce_scatter", counted("scatter", vocab_parallel._reduce_scatter)),
        mock.patch.object(dist, "all_reduce", counted("reduce", dist.all_reduce)),
    ):
        yield called


def in_float64(problem: Problem) -> Problem:
    """The same values: what the reference then hands out is not rounded to the dtypes of the problem."""
    wide = {name: value.double() for name, value in vars(problem).items() if torch.is_tensor(value)}
    return replace(problem, **{**wide, "targets": problem.targets})


def draw_cut(
    ranks: Ranks, tokens: int | tuple[int, ...], dim: int, vocab_size: int, **settings: Any
) -> tuple[Problem, list[int]]:
    problem = draw(tokens, dim, vocab_size, **settings)
    return problem, ranks.cut(problem.shard.stop)


def run_rank(rank: int, world: int, folder: str, seed: int) -> None:
    """Runs every topic, and writes {topic: [what is wrong]} to folder/RANK.json."""
    from tests.kernels.vocab_parallel_topics import TOPICS

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world, timeout=GROUP_TIMEOUT
    )
    report: dict[str, list[str]] = {}
    for index, (name, topic) in enumerate(TOPICS.items()):
        torch.manual_seed(seed + index)
        ranks = Ranks(dist.group.WORLD)
        if world == 2 or not name.startswith("kernels_"):  # the interpreter is slow
            topic(ranks)
        report[name] = ranks.failures
    Path(folder, f"{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()
