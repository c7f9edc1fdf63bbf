"""The manifest: what a checkpoint folder holds, tensor by tensor and file by file, and the digest of each.

Its own digest stands beside it in `manifest.sha256`, in the format of the `sha256sum` tool: it is over the very bytes
of manifest.json, so no canonical form of JSON has to be agreed on, and `sha256sum -c manifest.sha256` checks it
anywhere. The folder is committed by one rename, so the two files can't come apart.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError

from .boxes import Box, cover_problem
from .disk import plain_file_problem, write_synced
from .dtypes import SAFETENSORS_NAMES
from .errors import CheckpointError

FORMAT: Final = "harness-checkpoint"
VERSION: Final = 1
MANIFEST: Final = "manifest.json"
DIGEST: Final = "manifest.sha256"
MAX_DEPTH: Final = 100
"""Of what is kept as JSON: parsers give up at a depth of their own."""

_Size = Annotated[int, Field(ge=0)]
_Shape = tuple[_Size, ...]
_FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors$")]
"""A plain name: no slash and no leading dot, so it can't lead out of its folder."""


def _known_dtype(name: str) -> str:
    if name not in SAFETENSORS_NAMES:
        raise ValueError(f"is none of {', '.join(SAFETENSORS_NAMES)}")
    return name


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class StoredFragment(_Record):
    """One box of a tensor and where its bytes lie: under `key` in the safetensors file `file`."""

    offsets: _Shape
    shape: _Shape
    file: _FileName
    key: str

    @property
    def box(self) -> Box:
        return Box(self.offsets, self.shape)


class StoredTensor(_Record):
    """A global tensor: its shape, its dtype ("float32", "bfloat16", ...), and the boxes that tile it."""

    shape: _Shape
    dtype: Annotated[str, AfterValidator(_known_dtype)]
    fragments: tuple[StoredFragment, ...]


class StoredFile(_Record):
    """One file of tensors: size in bytes and SHA-256 in hexadecimal."""

    bytes: _Size
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Part(_Record):
    """What one writer wrote: a piece of a manifest."""

    tensors: dict[str, StoredTensor]
    """By "kind/name"."""
    files: dict[_FileName, StoredFile]


class Manifest(Part):
    """A whole checkpoint."""

    format: str = FORMAT
    version: int = VERSION
    step: _Size
    state: dict[str, JsonValue]
    """Everything that is not a tensor."""

    def files_of(self, kinds: Collection[str]) -> dict[str, StoredFile]:
        """The files that hold anything of tensors of these kinds."""
        names = {
            fragment.file
            for key, tensor in self.tensors.items()
            if key.partition("/")[0] in kinds
            for fragment in tensor.fragments
        }
        return {name: file for name, file in self.files.items() if name in names}


def merge(parts: Iterable[Part], step: int, state: dict[str, Any]) -> Manifest:
    """The parts of all writers as one manifest; CheckpointError where they don't make whole tensors."""
    tensors: dict[str, StoredTensor] = {}
    files: dict[str, StoredFile] = {}
    for part in parts:
        files |= part.files
        for key, tensor in part.tensors.items():
            known = tensors.get(key, tensor)
            if (known.shape, known.dtype) != (tensor.shape, tensor.dtype):
                raise CheckpointError(
                    f"tensor {key}: one writer has {known.dtype} {known.shape}, another {tensor.dtype} {tensor.shape}"
                )
            earlier = known.fragments if key in tensors else ()
            tensors[key] = tensor.model_copy(update={"fragments": earlier + tensor.fragments})
    manifest = Manifest(tensors=tensors, files=files, step=step, state=state)
    problem = _problem_inside(manifest)
    if problem:
        raise CheckpointError(problem)
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """manifest.json and manifest.sha256 into `folder`, flushed to disk."""
    content = _as_text(manifest).encode()
    write_synced(folder / MANIFEST, content)
    write_synced(folder / DIGEST, f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}\n".encode())


def read_manifest(folder: Path, step: int, *, check_files: bool = True) -> Manifest:
    """The manifest of `folder`, checked: digest, format, step, tiling of every tensor, presence and size of every file.

    The tensors' own bytes are not read; without `check_files` their files are not looked at. Raises CheckpointError
    with one line that names the file.
    """
    path = folder / MANIFEST
    content, digest_line = (_read_plain(folder / name) for name in (MANIFEST, DIGEST))
    if digest_line != f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}\n".encode():
        raise CheckpointError(f"{path}: digest differs from {DIGEST}: one of the two files is damaged")
    _check_version(path, content)
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f"{printable(str(part))}." for part in first["loc"]).rstrip(".")
        said = f"{where}: {first['msg']}, got {str(first['input'])[:80]!r}" if where else first["msg"]
        raise CheckpointError(f"{path}: {said}") from None
    if manifest.step != step:
        raise CheckpointError(f"{path}: is of step {manifest.step}, but its folder says {step}: the folder was renamed")
    problem = _problem_inside(manifest)
    if problem:
        raise CheckpointError(f"{path}: {problem}")
    try:
        check_json(manifest.state, "state")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    for name, file in manifest.files.items() if check_files else ():
        problem = plain_file_problem(folder / name, file.bytes)
        if problem:
            raise CheckpointError(f"{folder / name}: {problem}")
    return manifest


def check_json(value: Any, path: str, depth: int = 0) -> None:
    """CheckpointError unless JSON gives `value` back as it is: no tuples, no keys but text, no NaN, nothing pickled."""
    if depth > MAX_DEPTH:
        raise CheckpointError(f"{path[:80]}...: is nested more than {MAX_DEPTH} deep: keep it flatter")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{path}: the key {key!r} is not text: JSON would give back another key")
            _check_text(key, path)
            check_json(item, f"{path}.{printable(key)}", depth + 1)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            check_json(item, f"{path}.{number}", depth + 1)
    elif type(value) is str:
        _check_text(value, path)
    elif type(value) is float:
        if not math.isfinite(value):
            raise CheckpointError(f"{path}: {value} is not a JSON number: use null, or keep it in a tensor")
    elif value is not None and type(value) not in (int, bool):
        raise CheckpointError(
            f"{path}: {type(value).__name__} would not come back from JSON as it is: "
            "use a dictionary, list, text, number, true/false or null, or keep it in a tensor"
        )


def _check_text(text: str, path: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{path}: {text[:80]!a} is not text in Unicode: a reader would refuse it") from None


def printable(text: str) -> str:
    """`text` itself, or in quotes with escapes where it would break the line that it stands in."""
    return text if text.isprintable() else ascii(text)


def _read_plain(path: Path) -> bytes:
    problem = plain_file_problem(path)
    if problem:
        raise CheckpointError(f"{path}: {problem}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}): the checkpoint is damaged") from None


def _problem_inside(manifest: Manifest) -> str | None:
    """Why the manifest cannot be right in itself; None where it can."""
    for key, tensor in manifest.tensors.items():
        kind, slash, name = key.partition("/")
        if not (kind and slash and name and key.isprintable()):
            return f"tensor {key!a} is not named kind/name, in printable text"
        problem = cover_problem(tensor.shape, [fragment.box for fragment in tensor.fragments])
        if problem:
            return f"tensor {key}: {problem}"
        for fragment in tensor.fragments:
            if fragment.file not in manifest.files:
                return f"tensor {key}: its file {fragment.file} is not listed under files"
            if not fragment.key.isprintable():
                return f"tensor {key}: its key {fragment.key!a} is not printable text"
    return None


def _check_version(path: Path, content: bytes) -> None:
    """Before anything else of a manifest is judged: a later version may have other fields."""
    try:
        head = json.loads(content)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: is not JSON") from None
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise CheckpointError(f'{path}: is not the manifest of a checkpoint: it lacks "format": "{FORMAT}"')
    if head.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: has format version {head.get('version')!r}, and this harness reads {VERSION}: "
            "read it with the harness that wrote it, or a later one"
        )


def _as_text(manifest: Manifest) -> str:
    """JSON with one line a tensor and a file: readable, and short where there are many fragments."""
    values = manifest.model_dump(mode="python")
    lines = []
    for field in ("format", "version", "step", "state", "files", "tensors"):
        value = values[field]
        if field in ("files", "tensors") and value:
            entries = [f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items()]
            lines.append(f" {json.dumps(field)}: {{\n" + ",\n".join(entries) + "\n }")
        else:
            lines.append(f" {json.dumps(field)}: {json.dumps(value, allow_nan=False)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
