"""A safetensors file written in one pass: each byte is handed to the disk once, and hashed meanwhile.

The library's own writer copies all tensors first, and the file would have to be read again for its digest. The format
(https://huggingface.co/docs/safetensors): the header's length as 8 bytes, little-endian; the header, JSON, padded with
spaces; then the tensors without gaps. Reading is left to the library.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .dtypes import SAFETENSORS_NAMES, dtype_name
from .manifest import StoredFile

_PIECE_BYTES = 8 << 20
_HASH_BESIDE_BYTES = 1 << 20  # below this, handing over to the other thread costs more than hashing


def write_tensor_file(
    path: Path, tensors: Mapping[str, torch.Tensor], on_written: Callable[[int], None] = lambda size: None
) -> StoredFile:
    """Write a new file, flushed to the disk; its size and digest. `on_written` is told of every piece, in bytes.

    Beside the tensors themselves one of them is held as a copy, if it is not contiguous or not in host memory. Raises
    OSError.
    """
    # Widest elements first, as the library orders them: so each tensor is aligned to its own elements.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, place = {}, 0
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
    with path.open("xb") as file, ThreadPoolExecutor(1, thread_name_prefix="checkpoint-digest") as beside:

        def write(data: memoryview) -> None:
            for start in range(0, len(data), _PIECE_BYTES):
                piece = data[start : start + _PIECE_BYTES]
                hashing = beside.submit(digest.update, piece) if len(piece) >= _HASH_BESIDE_BYTES else None
                file.write(piece)
                if hashing is None:
                    digest.update(piece)
                else:
                    hashing.result()
                on_written(len(piece))

        write(memoryview(len(text).to_bytes(8, "little") + text))
        for _, tensor in ordered:
            write(_bytes_of(tensor))
        file.flush()
        os.fsync(file.fileno())
    return StoredFile(bytes=8 + len(text) + place, sha256=digest.hexdigest())


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """A tensor's elements in order; no copy of one that is contiguous and in host memory."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
