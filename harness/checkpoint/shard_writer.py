"""Boxes of tensors into safetensors files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from harness.parallel import Fragment

from .boxes import Box
from .dtypes import SAFETENSORS_NAMES, dtype_name
from .errors import CheckpointError
from .manifest import Part, StoredFile, StoredFragment, StoredTensor
from .tensor_file import write_tensor_file

Fetch = Callable[[Fragment], torch.Tensor]


def write_fragments(
    folder: Path,
    fragments: Iterable[Fragment],
    file_name: Callable[[int], str],
    max_file_bytes: int,
    on_written: Callable[[int], None] = lambda size: None,
    fetch: Fetch | None = None,
) -> Part:
    """Write `fragments`, in their order, into files of at most `max_file_bytes` (or one fragment), and describe them.

    `fetch` gives the elements of a fragment whose tensor has none (see CheckpointStore.save). Every file is flushed to
    the disk and hashed. Raises CheckpointError for fragments that contradict each other, and OSError.
    """
    writer = _ShardWriter(folder, file_name, max_file_bytes, on_written, fetch)
    for fragment in fragments:
        writer.add(fragment)
    writer.flush()
    return writer.part()


class _ShardWriter:
    """Collects fragments until a file is full, and remembers where each one went."""

    def __init__(
        self,
        folder: Path,
        file_name: Callable[[int], str],
        max_file_bytes: int,
        on_written: Callable[[int], None],
        fetch: Fetch | None,
    ) -> None:
        self._folder = folder
        self._file_name = file_name
        self._max_file_bytes = max_file_bytes
        self._on_written = on_written
        self._fetch = fetch
        self._headers: dict[str, StoredTensor] = {}
        self._boxes: dict[str, dict[str, StoredFragment]] = {}
        self._files: dict[str, StoredFile] = {}
        self._pending: dict[str, Fragment] = {}
        self._pending_bytes = 0

    def add(self, fragment: Fragment) -> None:
        tensor, key = fragment.tensor.detach(), fragment.key
        header = StoredTensor(shape=tuple(fragment.global_shape), dtype=_storable_dtype(fragment), fragments=())
        known = self._headers.setdefault(key, header)
        if known != header:
            raise CheckpointError(
                f"tensor {key}: one fragment is of {known.dtype} {known.shape}, "
                f"another of {header.dtype} {header.shape}"
            )
        boxes = self._boxes.setdefault(key, {})
        if not tensor.numel():
            return
        box = Box(tuple(fragment.offsets), tuple(tensor.shape))
        key_in_file = _key_in_file(key, box, known.shape)
        if key_in_file in boxes:
            raise CheckpointError(f"tensor {key}: the part at {box.offsets} is given twice")
        # A tensor may be named like another's part, "w@0": then they lie in two files.
        if self._pending_bytes + tensor.nbytes > self._max_file_bytes or key_in_file in self._pending:
            self.flush()
        file = self._file_name(len(self._files))
        boxes[key_in_file] = StoredFragment(offsets=box.offsets, shape=box.shape, file=file, key=key_in_file)
        self._pending[key_in_file] = fragment
        self._pending_bytes += tensor.nbytes

    def flush(self) -> None:
        """What is pending, as one file."""
        if not self._pending:
            return
        name = self._file_name(len(self._files))
        pending, fetch = self._pending, self._fetch
        self._files[name] = write_tensor_file(
            self._folder / name,
            {key: fragment.tensor for key, fragment in pending.items()},
            self._on_written,
            None if fetch is None else lambda key: fetch(pending[key]),
        )
        self._pending, self._pending_bytes = {}, 0

    def part(self) -> Part:
        tensors = {
            key: header.model_copy(update={"fragments": tuple(self._boxes[key].values())})
            for key, header in self._headers.items()
        }
        return Part(tensors=tensors, files=self._files)


def _key_in_file(key: str, box: Box, global_shape: tuple[int, ...]) -> str:
    """A whole tensor is stored under its own key, for any safetensors reader to find; a part says where it starts."""
    return key if box.shape == global_shape else f"{key}@{','.join(map(str, box.offsets))}"


def _storable_dtype(fragment: Fragment) -> str:
    name = dtype_name(fragment.tensor)
    if name not in SAFETENSORS_NAMES:
        raise CheckpointError(
            f"tensor {fragment.key}: dtype {name} cannot be stored; use one of {', '.join(SAFETENSORS_NAMES)}"
        )
    return name
