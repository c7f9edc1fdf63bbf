"""A job laid out on one process: what one of its ranks would be, hold and do; nothing is started, read or written.

The model is the one that training builds, tensor-parallel layers and all, on the device `meta`, where tensors have a
shape and no memory; so are the optimizer's groups. Only activations are a formula.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import torch

from harness.config import HarnessError
from harness.data import TokenizerSection, open_tokenizer
from harness.model import Decoder, ParameterCounts, count_parameters
from harness.optim import build_adamw
from harness.parallel import Identity, ParallelSection, Placement, StatePart, pretended_layout, state_parts

from .activations import Workload, kept_terms, loss_bytes, outside_terms, recomputed_bytes
from .config import DryRunSection
from .job import Job

FP32_BYTES = 4


@dataclass(frozen=True)
class ParameterShape:
    """Parameters of one shape and place, such as one matrix of all layers."""

    name: str
    """With * for the layer's number, where every layer has it."""
    local: tuple[int, ...]
    """On this rank, before data-parallel ranks divide it, padding included."""
    place: Placement
    count: int = 1


@dataclass(frozen=True)
class DryRun:
    """What one rank of a job would be, hold and do."""

    section: DryRunSection
    parallel: ParallelSection
    processes: int
    rank: int
    tensor_rank: int
    data_rank: int
    data_size: int
    tensor_ranks: list[int]
    data_ranks: list[int]
    shapes: list[ParameterShape]
    counts: ParameterCounts
    state: list[StatePart]
    work: Workload
    global_batch_size: int
    loss_bytes: int
    asynchronous_saves: bool

    @property
    def padding(self) -> int:
        """Elements on this rank that belong to no parameter."""
        return sum(shape.count * (prod(shape.local) - prod(shape.place.shape)) for shape in self.shapes)

    @property
    def elements(self) -> int:
        """Parameters on this rank before data-parallel ranks divide them, padding included."""
        return sum(shape.count * prod(shape.local) for shape in self.shapes)

    @property
    def activation_bytes(self) -> int:
        """Kept by all blocks and beside them, for one micro-batch."""
        a_token = self.work.model.layers * sum(kept_terms(self.work).values()) + sum(outside_terms(self.work).values())
        return round(a_token * self.work.tokens)

    @property
    def staging_bytes(self) -> int:
        """Host memory for the copy of masters and moments that a checkpoint is written from: this rank's share."""
        share = -(-self.elements // self.data_size)
        return 3 * FP32_BYTES * share if self.asynchronous_saves else 0

    @property
    def total_bytes(self) -> int:
        """State and activations, with the loss or a block's recomputation on top, whichever is more; on the CPU the
        copy for checkpoints too."""
        on_top = max(self.loss_bytes, recomputed_bytes(self.work))
        staging = self.staging_bytes if self.work.on_host else 0
        return sum(part.bytes for part in self.state) + staging + self.activation_bytes + on_top

    @property
    def micro_batches(self) -> int:
        """A step, on each data-parallel rank."""
        return self.global_batch_size // (self.data_size * self.work.micro_batch)


def lay_out(job: Job) -> DryRun:
    """The dry run of a job. Raises HarnessError where its layout could not be started, with the same line."""
    section, parallel = job.dry_run, job.parallel
    launched = Identity.from_environment().world_size
    processes = section.processes or (launched if launched > 1 else parallel.tensor)
    if section.rank >= processes:
        raise HarnessError(f"dry_run.rank: {section.rank} of {processes} processes; ranks are 0 to {processes - 1}")
    with pretended_layout(parallel, processes, section.rank) as layout:
        micro_batch = job.train.micro_batch_on(layout.data_size)
        job.check_sequences(parallel)
        job = job.resolved(_vocab_size(job))
        with torch.device("meta"):
            model = Decoder(job.model, job.loss, job.train.recompute, layout.tensor_parallel())
        weights, placements = dict(model.named_parameters()), model.placements()
        groups = build_adamw(job.optimizer, weights).param_groups
        work = Workload(
            model=job.model,
            loss=job.loss,
            tensor=layout.tensor_size,
            sequence_parallel=parallel.sequence_parallel,
            precision=job.train.precision,
            recompute=job.train.recompute,
            micro_batch=micro_batch,
            sequence_length=job.data.sequence_length,
            document_masking=job.data.document_masking,
            on_host=parallel.device == "cpu",
        )
        head = placements["token_embedding.weight" if job.model.tied_head else "head.weight"]
        return DryRun(
            section=section,
            parallel=parallel,
            processes=processes,
            rank=layout.rank,
            tensor_rank=layout.tensor_rank,
            data_rank=layout.data_rank,
            data_size=layout.data_size,
            tensor_ranks=layout.tensor_ranks,
            data_ranks=layout.data_ranks,
            shapes=_shapes(weights, placements),
            counts=count_parameters(job.model),
            state=state_parts(
                [[weight.numel() for weight in group["params"]] for group in groups],
                job.train.precision,
                parallel,
                layout.data_size,
                layout.data_rank,
            ),
            work=work,
            global_batch_size=job.train.global_batch_size,
            loss_bytes=loss_bytes(work, len(model.head.weight), head.shape[0]),
            asynchronous_saves=job.checkpoint.asynchronous,
        )


def _vocab_size(job: Job) -> int:
    """The tokenizer's, without reading a corpus; the model's, where only a file would tell that is not here."""
    tokenizer: TokenizerSection = job.data.tokenizer
    if tokenizer.is_trained_here:
        return tokenizer.vocab_size
    try:
        return open_tokenizer(tokenizer).vocab_size
    except HarnessError as error:
        if job.model.vocab_size is not None:
            return job.model.vocab_size
        raise HarnessError(f"{error}; for a dry run without it set model.vocab_size") from None


def _shapes(weights: Mapping[str, torch.Tensor], placements: Mapping[str, Placement]) -> list[ParameterShape]:
    """Each distinct shape once, in the order of the model."""
    found: dict[tuple[str, tuple[int, ...], Placement], ParameterShape] = {}
    for name, weight in weights.items():
        general = ".".join("*" if part.isdecimal() else part for part in name.split("."))
        shape = ParameterShape(general, tuple(weight.shape), placements[name])
        known = found.get((shape.name, shape.local, shape.place))
        found[shape.name, shape.local, shape.place] = replace(known, count=known.count + 1) if known else shape
    return list(found.values())
