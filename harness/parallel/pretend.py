"""A layout of many processes, laid out on one: to look at, not to compute with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from harness.config import HarnessError

from .config import ParallelSection
from .layout import ParallelLayout
from .processes import Identity, Processes


@contextmanager
def pretended_layout(section: ParallelSection, processes: int, rank: int) -> Iterator[ParallelLayout]:
    """The layout that `rank` of so many processes has, on the device `meta`.

    Its groups have the right ranks, by torch's fake process group, whose collectives return at once and do nothing.
    Raises HarnessError for a layout that could not be started either, and where a process group is running already.
    """
    identity = Identity(rank, processes, local_rank=0)
    layout = ParallelLayout(section, identity, torch.device("meta"))
    if dist.is_initialized():
        raise HarnessError("a layout cannot be pretended inside a running process group; use a process of its own")
    try:
        # Importing it registers the backend `fake`. Private, but what torch's own tools of this kind stand on.
        from torch.testing._internal.distributed.fake_pg import FakeStore
    except ImportError as error:
        raise HarnessError(
            f"torch {torch.__version__} has no fake process group ({error}); use one of torch 2.11 to 2.13"
        ) from None
    store = FakeStore()
    dist.init_process_group("fake", store=store, rank=rank, world_size=processes)
    Processes.current = pretended = Processes(identity, store, watch=None)
    try:
        with layout:
            yield layout
    finally:
        pretended.close()
