"""Boxes of tensors out of safetensors files, wherever the boxes that were written begin and end."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from harness.disk import sha256_of
from harness.parallel import Fragment

from .boxes import Box
from .disk import plain_file_problem
from .dtypes import SAFETENSORS_NAMES, dtype_name
from .errors import CheckpointError
from .manifest import Manifest, StoredFile, StoredFragment
from .tensor_file import read_tensor, tensor_starts


@dataclass(frozen=True)
class Copy:
    """One stored box, or a part of it, into one view of live memory."""

    source: StoredFragment
    dtype: str
    part: tuple[slice, ...]
    """Of the stored box."""
    target: torch.Tensor


def plan_copies(
    manifest: Manifest, into: Sequence[Fragment], where: str, *, allow_unused: bool
) -> dict[str, list[Copy]]:
    """What to copy, by file. Touches no tensor.

    A manifest's tensors are tiled by their fragments (read_manifest checks it), so whatever lies inside a tensor's
    shape is covered. Raises CheckpointError for names, shapes and dtypes that don't agree; `where` begins its line.
    """
    _check_names(manifest, into, where, allow_unused)
    copies = defaultdict(list)
    for fragment in into:
        stored = manifest.tensors[fragment.key]
        dtype, shape = dtype_name(fragment.tensor), tuple(fragment.global_shape)
        if (stored.dtype, stored.shape) != (dtype, shape):
            raise CheckpointError(
                f"{where}: tensor {fragment.key} is {stored.dtype} {stored.shape} there, and {dtype} {shape} here: "
                "use the model and precision that it was saved with"
            )
        box = Box(tuple(fragment.offsets), tuple(fragment.tensor.shape))
        for source in stored.fragments:
            common = source.box.intersect(box)
            if common:
                target = fragment.tensor.detach()[common.slices_in(box)]
                copies[source.file].append(Copy(source, dtype, common.slices_in(source.box), target))
    return dict(copies)


def copy_planned(folder: Path, copies: dict[str, list[Copy]]) -> None:
    """Carry a plan out. Every file is opened and its header compared with the plan before the first copy."""
    with ExitStack() as stack:
        opened = {name: _open(stack, folder / name) for name in sorted(copies)}
        for name, file in opened.items():
            for copy in copies[name]:
                _check_header(file, copy.source, copy.dtype, folder / name)
        for name, file in opened.items():
            try:
                _copy_from(folder / name, file, copies[name])
            except OSError as error:
                raise CheckpointError(f"{folder / name}: cannot be read: {error}") from None


def _copy_from(path: Path, file: Any, copies: Sequence[Copy]) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        starts = tensor_starts(descriptor)
        for copy in copies:
            place = _place_in_one_piece(copy)
            if place is not None:
                read_tensor(descriptor, starts[copy.source.key] + place * copy.target.element_size(), copy.target)
            else:  # get_slice reads no more than the slice, but a scalar has no slices
                stored = file.get_slice(copy.source.key)[copy.part] if copy.part else file.get_tensor(copy.source.key)
                copy.target.copy_(stored)
    finally:
        os.close(descriptor)


def _place_in_one_piece(copy: Copy) -> int | None:
    """The element of the stored box at which the part begins; None where the part has gaps there or in memory."""
    if copy.target.device.type != "cpu" or not copy.target.is_contiguous():
        return None
    sizes, whole = [part.stop - part.start for part in copy.part], copy.source.shape
    cut = next((dimension for dimension, size in enumerate(sizes) if size > 1), len(sizes))
    if tuple(sizes[cut + 1 :]) != whole[cut + 1 :]:
        return None
    return sum(part.start * prod(whole[dimension + 1 :]) for dimension, part in enumerate(copy.part))


def content_problem(folder: Path, name: str, file: StoredFile) -> str | None:
    """Why the bytes of a file are not those that were written; None where they are. Reads every byte."""
    problem = plain_file_problem(folder / name, file.bytes)
    if problem is None:
        try:
            if sha256_of(folder / name) != file.sha256:
                problem = "digest differs from the manifest: the file is damaged"
        except OSError as error:
            problem = f"cannot be read ({error.strerror}): the file is damaged"
    return problem


def _open(stack: ExitStack, path: Path) -> Any:
    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: is not a safetensors file: {error}") from None


def _check_header(file: Any, source: StoredFragment, dtype: str, path: Path) -> None:
    try:
        header = file.get_slice(source.key)
    except SafetensorError:
        raise CheckpointError(f"{path}: has no tensor {source.key}, which the manifest places there") from None
    found, expected = (header.get_dtype(), tuple(header.get_shape())), (SAFETENSORS_NAMES[dtype], source.shape)
    if found != expected:
        raise CheckpointError(
            f"{path}: {source.key} is {found[0]} {found[1]}, and {expected[0]} {expected[1]} in the manifest"
        )


def _check_names(manifest: Manifest, into: Sequence[Fragment], where: str, allow_unused: bool) -> None:
    requested = {fragment.key: fragment.kind for fragment in into}
    missing = sorted(requested.keys() - manifest.tensors.keys())
    if missing:
        raise CheckpointError(
            f"{where}: {_listed(missing)} not in it: use the model and optimizer that it was saved with"
        )
    kinds = set(requested.values())
    unused = sorted(key for key in manifest.tensors.keys() - requested.keys() if key.partition("/")[0] in kinds)
    if unused and not allow_unused:
        raise CheckpointError(
            f"{where}: {_listed(unused)} in it and unknown here: use the model that it was saved with"
        )


def _listed(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
    return f"tensor {shown} is" if len(names) == 1 else f"{len(names)} tensors ({shown}) are"
