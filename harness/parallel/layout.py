"""Which process this is, what it computes on, and where its randomness comes from."""

from __future__ import annotations

import hashlib
import os
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist

from harness.config import HarnessError

from .config import ParallelSection


class ParallelLayout:
    """The ranks, groups and seeds of a run; a context manager that owns the process groups.

    The product of the axes is the number of processes. Only this room touches torch.distributed's global state.
    """

    def __init__(self, section: ParallelSection) -> None:
        self.section = section
        self.rank = _read_number("RANK", 0)
        self.world_size = _read_number("WORLD_SIZE", 1)
        if self.world_size != 1:
            raise HarnessError(
                f"rank {self.rank}: started with {self.world_size} processes (WORLD_SIZE), but this version trains on "
                f"one; start it without torchrun, or with --nproc-per-node=1"
            )
        self.tensor_rank, self.tensor_size = 0, 1
        self.data_rank, self.data_size = 0, 1
        self.device = _choose_device(section.device, _read_number("LOCAL_RANK", 0))
        self._owns_process_group = False

    def __enter__(self) -> ParallelLayout:
        if self.section.threads is not None:
            torch.set_num_threads(self.section.threads)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            # megatron-core's datasets ask for a process group even on one rank; a HashStore needs no port.
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
                store=dist.HashStore(),
                rank=self.rank,
                world_size=self.world_size,
                timeout=timedelta(seconds=self.section.timeout_seconds),
            )
            self._owns_process_group = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._owns_process_group:
            dist.destroy_process_group()
            self._owns_process_group = False

    def seed_everything(self, seed: int, purpose: str, step: int) -> None:
        """Start torch's generators afresh from (seed, purpose, step), so that a resumed step draws what it drew
        before."""
        torch.manual_seed(derive_seed(seed, purpose, step))

    def __repr__(self) -> str:
        return f"rank {self.rank} of {self.world_size} on {self.device}"


def derive_seed(*parts: object) -> int:
    """A seed below 2**63 from anything printable: the same parts give the same seed on every machine and rank."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _read_number(variable: str, default: int) -> int:
    """A launcher's environment variable."""
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise HarnessError(
            f"environment variable {variable} is {text!r}, not a number; unset it, or start with torchrun"
        )
    return int(text)


def _choose_device(wanted: str, local_rank: int) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise HarnessError(
            "parallel.device: cuda is asked for, but torch sees no GPU; use auto or cpu, or see `harness doctor`"
        )
    return torch.device("cuda", local_rank)
