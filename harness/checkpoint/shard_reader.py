"""Boxes of tensors out of safetensors files, wherever the boxes that were written begin and end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from harness.disk import sha256_of
from harness.parallel import Fragment

from .boxes import Box
from .disk import plain_file_problem
from .dtypes import SAFETENSORS_NAMES, dtype_name
from .errors import CheckpointError
from .manifest import Manifest, StoredFile, StoredFragment
from .tensor_reader import TensorFile


@dataclass(frozen=True)
class Copy:
    """One stored box, or a part of it, into one view of live memory."""

    source: StoredFragment
    dtype: str
    part: Box
    """Of the stored box, in its own coordinates."""
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
                offsets = tuple(part.start for part in common.slices_in(source.box))
                copies[source.file].append(Copy(source, dtype, Box(offsets, common.shape), target))
    return dict(copies)


def copy_planned(folder: Path, copies: dict[str, list[Copy]]) -> None:
    """Carry a plan out. Every file is opened and its header compared with the plan before the first copy."""
    with ExitStack() as stack:
        opened = {name: stack.enter_context(TensorFile(folder / name)) for name in sorted(copies)}
        for name, file in opened.items():
            for copy in copies[name]:
                _check_header(file, copy.source, copy.dtype)
        for name, file in opened.items():
            for copy in copies[name]:
                file.read(copy.source.key, [(copy.part, copy.target)])


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


def _check_header(file: TensorFile, source: StoredFragment, dtype: str) -> None:
    header = file.entries.get(source.key)
    if header is None:
        raise CheckpointError(f"{file.path}: has no tensor {source.key}, which the manifest places there")
    found, expected = (header.format_name, header.shape), (SAFETENSORS_NAMES[dtype], source.shape)
    if found != expected:
        raise CheckpointError(
            f"{file.path}: {source.key} is {found[0]} {found[1]}, and {expected[0]} {expected[1]} in the manifest"
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
