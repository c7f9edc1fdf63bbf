"""What training really holds in memory: read from engines and from torch's allocations. Also, started by torchrun as
`held.py JOBS FOLDER`, a worker that measures a JSON list of {name, settings} on all ranks."""

from __future__ import annotations

import gc
import json
import sys
import warnings
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.config import validate
from harness.model import Decoder, build_decoder
from harness.optim import build_adamw
from harness.parallel import Engine, ParallelLayout, ParallelSection, build_divider, build_engine
from harness.settings import Settings


class Made(TorchDispatchMode):
    """Watches which memory comes into being; what of it is still there, `bytes` says."""

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in known:
                storage = leaf.untyped_storage()
                self._found[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def bytes(self) -> int:
        gc.collect()
        return sum(size for storage, size in self._found.values() if not storage.expired())


def peak(run: Callable[[], Any]) -> int:
    """The most bytes that `run` has allocated at a time."""
    run()
    with profile(profile_memory=True, activities=[ProfilerActivity.CPU]) as profiler:
        run()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def build(settings: Settings, layout: ParallelLayout | None = None) -> Decoder:
    """The decoder as training builds it."""
    return build_decoder(
        settings.model,
        seed=1,
        loss=settings.loss,
        recompute=settings.train.recompute,
        tensor=layout.tensor_parallel() if layout is not None else None,
        divide=build_divider(layout, settings.train.precision) if layout is not None else None,
    )


def forward_bytes(settings: Settings, layout: ParallelLayout | None = None) -> int:
    """What the blocks' forward pass of a micro-batch leaves allocated."""
    model = build(settings, layout)
    if settings.train.precision == "bf16":
        model.to(torch.bfloat16)
    tokens = torch.zeros((settings.train.micro_batch_size or 1, settings.data.sequence_length), dtype=torch.int64)
    documents = torch.zeros_like(tokens) if settings.data.document_masking else None
    with Made() as made:
        hidden = model.hidden_states(tokens, None, documents)
    if layout is not None:
        layout.all_max([0])  # the collectives before it have let go of their tensors
    held = made.bytes()
    del hidden
    return held


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by address, each memory once."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel() > 0}


def live() -> dict[int, int]:
    """Of all tensors of this process."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated attributes of things that are no tensors
        tensors = [thing for thing in gc.get_objects() if isinstance(thing, Tensor) and thing.device.type == "cpu"]
    return storages([*tensors, *(t.grad for t in tensors if t.is_leaf and t.grad is not None)])


def state_bytes(engine: Engine, stage: int) -> dict[str, int]:
    """Weights, masters and moments of an engine, padding included."""
    inner: Any = engine
    optimizer = inner._optimizer if stage == 0 else inner._access._inner
    model = inner.module if stage == 0 else inner.module.module
    weights = list(model.parameters())
    masters = [] if stage == 0 and not inner._separate else list(optimizer.state)
    held = weights if stage < 3 else [weight.ds_tensor for weight in weights]
    whole = [weight for weight in weights if weight.ds_persist] if stage == 3 else []
    return {
        "weights": sum(storages(held).values()) + sum(weight.nbytes for weight in whole),
        "masters": sum(storages(masters).values()),
        "moments": sum(v.nbytes for state in optimizer.state.values() for v in state.values() if v.dim() > 0),
    }


def measure_state(settings: Settings) -> dict[str, int]:
    """State of a real engine, and `all` that it holds between the micro-batches of a step."""
    before = live()
    with ParallelLayout(settings.parallel) as layout:
        model = build(settings, layout)
        engine = build_engine(
            model,
            lambda masters: build_adamw(settings.optimizer, masters),
            settings.train.precision,
            model.placements(),
            layout,
        )
        tokens = torch.zeros((1, settings.data.sequence_length), dtype=torch.int64)
        for last in (True, False):  # in the first step ZeRO still learns what follows what
            engine.backward(engine.module(tokens, tokens).loss, 64, last=last)
            if last:
                engine.step(1e-3)
        found = state_bytes(engine, settings.parallel.zero_stage)
        return found | {"all": sum(size for address, size in live().items() if address not in before)}


def main() -> None:
    torch.set_num_threads(1)
    jobs, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    found = {}
    with ParallelLayout(ParallelSection(device="cpu", timeout_seconds=120)) as world:
        for job in jobs:
            settings = validate(Settings, job["settings"], "held")
            if job["what"] == "state":
                found[job["name"]] = measure_state(settings)
            else:
                with ParallelLayout(settings.parallel) as layout:
                    found[job["name"]] = {"forward": forward_bytes(settings, layout)}
        (folder / f"rank-{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
