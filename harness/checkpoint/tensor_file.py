"""A safetensors file written in one pass: each byte is handed to the disk once, and hashed meanwhile.

The library's own writer copies all tensors first, and the file would have to be read again for its digest. The format
(https://huggingface.co/docs/safetensors): the header's length as 8 bytes, little-endian; the header, JSON, padded with
spaces; then the tensors without gaps.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from .dtypes import SAFETENSORS_NAMES, dtype_name
from .manifest import StoredFile

_PIECE_BYTES = 8 << 20


def write_tensor_file(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    on_written: Callable[[int], None] = lambda size: None,
    fetch: Callable[[str], torch.Tensor] | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
) -> StoredFile:
    """Write a new file, flushed to the disk; its size and digest. `on_written` is told of every piece, in bytes.

    Beside the tensors themselves one of them is held as a copy, if it is not contiguous or not in host memory. With
    `fetch` the tensors only tell shapes and dtypes (they may be on the meta device): each is fetched by its name when
    its turn comes, and let go once it is written. Raises OSError.
    """
    # Widest elements first, as the library orders them: so each tensor is aligned to its own elements.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    place = 0
    for name, tensor in ordered:
        header[name] = {
            "dtype": SAFETENSORS_NAMES[dtype_name(tensor)],
            "shape": list(tensor.shape),
            "data_offsets": [place, place + tensor.nbytes],
        }
        place += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    hashing: list[Future[None]] = []
    with path.open("xb") as file, ThreadPoolExecutor(1, thread_name_prefix="checkpoint-digest") as beside:

        def write(data: memoryview) -> None:
            for start in range(0, len(data), _PIECE_BYTES):
                piece = data[start : start + _PIECE_BYTES]
                hashing.append(beside.submit(digest.update, piece))
                file.write(piece)
                on_written(len(piece))

        write(memoryview(len(text).to_bytes(8, "little") + text))
        for name, tensor in ordered:
            write(bytes_of(tensor if fetch is None else fetch(name)))
            if fetch is not None or not _shares_memory(tensor):
                hashing[-1].result()  # so that copies don't pile up where the disk is faster
        file.flush()
        os.fsync(file.fileno())
        for each in hashing:
            each.result()
    return StoredFile(bytes=8 + len(text) + place, sha256=digest.hexdigest())


def _shares_memory(tensor: torch.Tensor) -> bool:
    """Whether bytes_of makes no copy."""
    return tensor.device.type == "cpu" and tensor.is_contiguous()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A tensor's elements in order; no copy of one that is contiguous and in host memory."""
    elements = tensor.detach().to("cpu").contiguous()
    flat = elements.as_strided((elements.numel(),), (1,))  # a single element counts as contiguous at any stride
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
