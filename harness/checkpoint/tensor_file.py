"""A safetensors file written in one pass: each byte is handed to the disk once, and hashed meanwhile. And read, in
one piece, into memory that is there already.

The library's own writer copies all tensors first, and the file would have to be read again for its digest. Its reader
maps the file: every page is a fault, and a disk that fails in the midst of it kills the process. The format
(https://huggingface.co/docs/safetensors): the header's length as 8 bytes, little-endian; the header, JSON, padded with
spaces; then the tensors without gaps. Whether a header is a good one is left to the library.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from .dtypes import SAFETENSORS_NAMES, dtype_name
from .manifest import StoredFile

_PIECE_BYTES = 8 << 20
_READ_BYTES = 1 << 30  # a single read gives no more than 2 GB


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
    hashing: list[Future[None]] = []
    with path.open("xb") as file, ThreadPoolExecutor(1, thread_name_prefix="checkpoint-digest") as beside:

        def write(data: memoryview) -> None:
            for start in range(0, len(data), _PIECE_BYTES):
                piece = data[start : start + _PIECE_BYTES]
                hashing.append(beside.submit(digest.update, piece))
                file.write(piece)
                on_written(len(piece))

        write(memoryview(len(text).to_bytes(8, "little") + text))
        for _, tensor in ordered:
            write(_bytes_of(tensor))
            if not _shares_memory(tensor):
                hashing[-1].result()  # so that copies don't pile up where the disk is faster
        file.flush()
        os.fsync(file.fileno())
        for each in hashing:
            each.result()
    return StoredFile(bytes=8 + len(text) + place, sha256=digest.hexdigest())


def tensor_starts(descriptor: int) -> dict[str, int]:
    """Where the bytes of each tensor begin in an open file, whose header was found good. Raises OSError."""
    length = bytearray(8)
    read_exactly(descriptor, memoryview(length), 0)
    header = bytearray(int.from_bytes(length, "little"))
    read_exactly(descriptor, memoryview(header), 8)
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    return {name: 8 + len(header) + entry["data_offsets"][0] for name, entry in entries.items()}


def read_tensor(descriptor: int, start: int, into: torch.Tensor) -> None:
    """Fill a contiguous tensor in host memory with the bytes from `start` on. Raises OSError."""
    read_exactly(descriptor, _bytes_of(into), start)


def read_exactly(descriptor: int, into: memoryview, start: int) -> None:
    """Raises OSError, also where the file ends too early."""
    done = 0
    while done < len(into):
        count = os.preadv(descriptor, [into[done : done + _READ_BYTES]], start + done)
        if count == 0:
            raise OSError(f"the file ends before byte {start + len(into)}")
        done += count


def _shares_memory(tensor: torch.Tensor) -> bool:
    """Whether _bytes_of makes no copy."""
    return tensor.device.type == "cpu" and tensor.is_contiguous()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """A tensor's elements in order; no copy of one that is contiguous and in host memory."""
    elements = tensor.detach().to("cpu").contiguous()
    flat = elements.as_strided((elements.numel(),), (1,))  # a single element counts as contiguous at any stride
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
