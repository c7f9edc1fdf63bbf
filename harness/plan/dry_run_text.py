"""A dry run as text for a person."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

from harness.parallel import Identity, stays_whole

from .activations import Terms, kept_terms, outside_terms, recomputed_bytes
from .dry_run import DryRun, ParameterShape, lay_out
from .job import Job

_LONGEST_LIST = 16


def print_dry_run(job: Job) -> None:
    """Print what a rank of the job would be. Of several processes the first does it, and the others do nothing."""
    if Identity.from_environment().rank == 0:
        print("\n".join(describe(lay_out(job))))


def describe(run: DryRun) -> list[str]:
    """The lines of the report."""
    return [
        f"dry run of {run.processes} processes; nothing is started, read or written",
        "",
        *_place(run),
        "",
        *_step(run),
        "",
        *_parameters(run),
        "",
        *_memory(run),
    ]


def _place(run: DryRun) -> Iterator[str]:
    layout = f"tensor {run.work.tensor} x data {run.data_size}, ZeRO {run.parallel.zero_stage}"
    if run.work.sequence_parallel:
        layout += ", sequence parallel"
    where = f"tensor rank {run.tensor_rank} of {run.work.tensor}, data rank {run.data_rank} of {run.data_size}"
    size = run.section.processes_per_machine
    if size is not None:
        where += f", machine {run.rank // size} of {-(-run.processes // size)}"
    yield f"layout         {layout}"
    yield f"rank {run.rank:<9} {where}"
    yield f"tensor group   {_list(run.tensor_ranks)}"
    yield f"data group     {_list(run.data_ranks)}"
    if size is not None and run.tensor_ranks[0] // size != run.tensor_ranks[-1] // size:
        yield (
            f"               the tensor group crosses machines of {size} processes: each block waits for the network "
            f"four times a micro-batch; choose a parallel.tensor that divides {size}"
        )


def _step(run: DryRun) -> Iterator[str]:
    tokens = run.global_batch_size * run.work.sequence_length
    yield f"a step         {run.global_batch_size} sequences of {run.work.sequence_length} tokens: {tokens:,} tokens"
    yield (
        f"               {run.data_size} data ranks x {run.micro_batches} micro-batches x {run.work.micro_batch} "
        f"sequences ({run.work.tokens:,} tokens a micro-batch)"
    )


def _parameters(run: DryRun) -> Iterator[str]:
    zero = run.parallel.zero_stage == 3
    rows = [["parameters", "on this rank", "of", "which", "layers", *(["kept by ZeRO 3"] if zero else [])]]
    for shape in run.shapes:
        layers = f"x {shape.count}" if "*" in shape.name else ""
        row = [shape.name, _shape(shape.local), _shape(shape.place.global_shape), _part(shape), layers]
        rows.append([*row, _kept(shape, run)] if zero else row)
    yield from _columns(rows)
    yield f"in all {run.counts.total:,} parameters, {run.counts.blocks:,} of them in the blocks"
    yield f"on tensor rank {run.tensor_rank} {run.elements:,} elements, {run.padding:,} of them padding"


def _memory(run: DryRun) -> Iterator[str]:
    rows = [["memory", "elements x bytes", "", "data ranks"]]
    for part in run.state:
        name = part.kind + (f" ({part.remark})" if part.remark else "")
        divided = f"divided by {run.data_size}" if part.divided else "not divided"
        if part.kind == "buffers":
            divided = ""
        rows.append([name, f"{part.elements:,} x {part.element_bytes}", _size(part.bytes), divided])
    if run.staging_bytes:
        where = "divided" if run.work.on_host else "divided; in host memory, not in the total"
        rows.append(["copy for checkpoints (checkpoint.asynchronous)", "", _size(run.staging_bytes), where])
    rows.append(["activations (estimate)", "", _size(run.activation_bytes), "a micro-batch"])
    rows.append(["loss (estimate)", "", _size(run.loss_bytes), "a micro-batch"])
    again = recomputed_bytes(run.work)
    if again:
        rows.append(["one block, recomputed (estimate)", "", _size(again), "a micro-batch"])
    top = " + the larger of loss and recomputation" if again else ""
    rows.append(["total", "", _size(run.total_bytes), f"state + activations{top}" if top else ""])
    yield from _columns(rows)
    yield ""
    device = "the CPU" if run.work.on_host else "a GPU"
    kept, beside = _terms(kept_terms(run.work)), _terms(outside_terms(run.work))
    yield f"Activations, an estimate for {device}: bytes a token that autograd keeps (counted as in arXiv 2205.05198)"
    yield f"  in each of {run.work.model.layers} blocks, recompute {run.work.recompute}: {kept}"
    yield f"  beside them: {beside}"
    yield "Not counted: temporaries of single operations and collectives, what CUDA and NCCL take for themselves,"
    yield "and unused pieces of torch's cache."


def _part(shape: ParameterShape) -> str:
    """Which part of the whole, by its first and last row or column."""
    place, text = shape.place, "all"
    for dimension, (start, here, whole) in enumerate(zip(place.offsets, place.shape, place.global_shape, strict=True)):
        if here != whole:
            kind = "columns" if dimension else ("rows" if len(place.shape) > 1 else "elements")
            text = f"{kind} {start:,} to {start + here - 1:,}" if here else f"no {kind}"
    padding = shape.local[0] - place.shape[0]
    return f"{text}, {padding:,} rows of padding" if padding else text


def _kept(shape: ParameterShape, run: DryRun) -> str:
    size = prod(shape.local)
    return "whole" if stays_whole(size, run.parallel) else f"{-(-size // run.data_size):,} elements"


def _columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _shape(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def _terms(terms: Terms) -> str:
    return ", ".join(f"{name} {value:,.0f}" for name, value in terms.items())


def _list(ranks: list[int]) -> str:
    """Ranks in a row, or with a constant step, in short."""
    if len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]} to {ranks[-1]}"
    if len(ranks) > _LONGEST_LIST:
        return f"{', '.join(map(str, ranks[:3]))}, ... {ranks[-1]} ({len(ranks)} ranks)"
    return ", ".join(map(str, ranks))


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
