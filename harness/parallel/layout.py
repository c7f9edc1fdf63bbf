"""Which process this is, how the ranks divide a model and a batch, and where randomness comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from harness.config import ConfigError, HarnessError

from .channel import Channel
from .config import ParallelSection
from .hub import Verdict
from .processes import Identity, Processes
from .randomness import ForwardSeeds, derive_seed
from .tensor import TensorParallel
from .watch import is_collective_failure
from .watchdog import Watchdog


class ParallelLayout:
    """The ranks, groups and seeds of a run; a context manager that owns the process groups.

    world size = tensor size x data size. Tensor-parallel ranks are neighbours, so they share a machine where there are
    several: rank = data rank x tensor size + tensor rank. Only this room touches torch.distributed's global state.
    Raises HarnessError where the processes don't divide.
    """

    def __init__(
        self, section: ParallelSection, identity: Identity | None = None, device: torch.device | None = None
    ) -> None:
        """Who this process is, the environment says, and where it computes, the section, unless given."""
        self.section = section
        self.identity = identity or Identity.from_environment()
        self.rank, self.world_size = self.identity.rank, self.identity.world_size
        if self.world_size % section.tensor:
            raise ConfigError(
                f"parallel.tensor: a job of size {self.world_size} does not divide into groups of {section.tensor}; "
                f"start a multiple of {section.tensor} processes, or set parallel.tensor to a divisor (1, with "
                f"parallel.sequence_parallel=false, on one process)"
            )
        self.tensor_size, self.data_size = section.tensor, self.world_size // section.tensor
        self.tensor_rank, self.data_rank = self.rank % section.tensor, self.rank // section.tensor
        self.device = device or _choose_device(section.device, self.identity.local_rank)
        self.forward_seeds = ForwardSeeds()
        self._processes: Processes | None = None
        self._owns_processes = False
        self._awaited_verdict = False

    # ---- life ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> ParallelLayout:
        if self.section.threads is not None:
            torch.set_num_threads(self.section.threads)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self._processes = Processes.current
        if self._processes is None:
            # On one rank too: megatron-core's datasets ask for a process group.
            self._processes = Processes.meet(
                self.identity, self.device, self.section.timeout_seconds, self.section.lost_after_seconds
            )
            self._owns_processes = True
        self.watchdog: Watchdog = self._processes.watchdog  # off until it is armed; one a process
        try:
            self.tensor_group, self.data_group = self._processes.groups(self.tensor_size)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._owns_processes and self._processes is not None:
            if error is not None:
                self.await_verdict(error)
            self._processes.close(error)
            self._owns_processes = False
        self._processes = None

    def on_end(self, tell: Callable[[Verdict], None]) -> None:
        """Call `tell` with the verdict, on another thread, before this process is ended because of another rank or by
        the watchdog."""
        if self._processes is not None:
            self._processes.ending.on_end = tell

    def await_verdict(self, error: BaseException) -> None:
        """Where `error` is a collective's that another rank did not come to: wait to be ended by what is found about
        that rank. Returns, in a bounded time, where nothing is found; the second time at once. Leaving the context by
        an error does it too."""
        if self._processes is None or self._processes.watch is None or self._awaited_verdict:
            return
        if is_collective_failure(error):
            self._awaited_verdict = True
            self._processes.watch.wait_for_verdict()

    @property
    def tensor_ranks(self) -> list[int]:
        """The ranks that share this one's model, in the order of their parts."""
        return dist.get_process_group_ranks(self.tensor_group)

    @property
    def data_ranks(self) -> list[int]:
        """The ranks that have this one's part of the model and other samples."""
        return dist.get_process_group_ranks(self.data_group)

    # ---- what ranks tell each other ---------------------------------------------------------------------------------

    def tensor_parallel(self) -> TensorParallel:
        """The tensor-parallel part of the layout, for building a model."""
        return TensorParallel(
            self.tensor_group,
            self.tensor_rank,
            self.tensor_size,
            sequence_parallel=self.section.sequence_parallel,
            forward_seeds=self.forward_seeds,
        )

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        """`tensor`, summed in place over the data-parallel ranks."""
        if self.data_size > 1:
            dist.all_reduce(tensor, group=self.data_group)
        return tensor

    def sum_over_all(self, tensor: Tensor) -> Tensor:
        """`tensor`, summed in place over all ranks; the same bits on all."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_max(self, numbers: Sequence[int]) -> list[int]:
        """The largest that any rank came with, number by number."""
        whole = [int(number) for number in numbers]
        if self.world_size == 1:
            return whole
        largest = torch.tensor(whole)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    def channel(self) -> Channel:
        """A new way for all ranks to agree, from a thread other than the one that calls collectives. To be made by all
        ranks in the same order."""
        assert self._processes is not None, "inside the layout's context only"
        return self._processes.channel()

    def first_number(self, number: int) -> int:
        """Rank 0's number, on all ranks."""
        if self.world_size == 1:
            return number
        told = torch.tensor([number])
        dist.broadcast(told, 0)
        return int(told)

    def first_decides(self, decide: Callable[[], Any]) -> Any:
        """What `decide` returns on rank 0 (JSON), on all ranks, however long it takes; its HarnessError is raised on
        all."""
        assert self._processes is not None, "inside the layout's context only"
        return self._processes.first_decides(decide)

    # ---- randomness ------------------------------------------------------------------------------------------------

    def seed_everything(self, seed: int, purpose: str, step: int) -> None:
        """Start torch's generators and the dropout seeds afresh from (seed, purpose, step, data rank), so that a
        resumed step draws what it drew before.

        Tensor-parallel ranks start equal; where their masks must differ, seed_dropout takes the rank in.
        """
        torch.manual_seed(derive_seed(seed, purpose, step, self.data_rank))
        self.forward_seeds.start(derive_seed(seed, purpose, step, self.data_rank, "dropout"))

    @property
    def axes(self) -> str:
        """What is divided: "tensor 2 x data 4, ZeRO 1, sequence parallel"."""
        axes = f"tensor {self.tensor_size} x data {self.data_size}, ZeRO {self.section.zero_stage}"
        return axes + (", sequence parallel" if self.section.sequence_parallel else "")

    def __repr__(self) -> str:
        return f"rank {self.rank} of {self.world_size} on {self.device} ({self.axes})"


def _choose_device(wanted: str, local_rank: int) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise HarnessError(
            "parallel.device: cuda is asked for, but torch sees no GPU; use auto or cpu, or see `harness doctor`"
        )
    if local_rank >= torch.cuda.device_count():
        raise HarnessError(
            f"local rank {local_rank} has no GPU of its own: torch sees {torch.cuda.device_count()} here; start that "
            f"many processes a machine, or set parallel.device=cpu"
        )
    return torch.device("cuda", local_rank)
