"""What people and programs are told about the checkpoints of a store; nothing but `prune_steps` changes them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from math import prod
from typing import Any

from .errors import CheckpointError
from .manifest import Manifest, printable, read_manifest
from .retention import Pruner, Retention, score_in
from .store import CheckpointStore


def list_steps(store: CheckpointStore, *, as_json: bool = False) -> str:
    """A line a step, the oldest first: when it was committed, its size, what saved it, and whether it is whole.

    Manifests are read and files' sizes compared; their bytes are `verify_steps`'s. As JSON an array of objects, sizes
    in bytes, "problem" null where a step is whole.
    """
    rows = [_summary(store, step) for step in store.steps()]
    if as_json:
        return json.dumps(rows, indent=1)
    if not rows:
        return f"{store.folder}: no checkpoints"
    head = ("step", "committed (UTC)", "size", "files", "validation loss", "layout", "")
    body = [
        (
            str(row["step"]),
            row["committed"][:19].replace("T", " "),
            _size(row["bytes"]),
            _text(row["files"]),
            "-" if row["validation_loss"] is None else f"{row['validation_loss']:.4f}",
            _text(row["layout"]),
            row["problem"] or "whole",
        )
        for row in rows
    ]
    return "\n".join(_columns([head, *body], right=(0, 2, 3, 4)))


def show_step(store: CheckpointStore, step: int | None, *, as_json: bool = False) -> str:
    """What a step (None: the newest that is whole) holds. Raises CheckpointError where there is none, or a damaged one.

    For people the state is shown without the settings, which config.yaml has, and long values are cut; as JSON it is
    complete.
    """
    if step is None:
        step = store.latest_good()
    if step is None:
        raise CheckpointError(f"{store.folder}: no good checkpoint")
    manifest = store.manifest(step)
    summary = _summary(store, step)
    parameters = sum(prod(tensor.shape) for key, tensor in manifest.tensors.items() if key.startswith("master/"))
    tensors = {
        key: {"shape": list(tensor.shape), "dtype": tensor.dtype, "boxes": len(tensor.fragments)}
        for key, tensor in manifest.tensors.items()
    }
    if as_json:
        identity = {"folder": str(store.folder_of(step)), "format": manifest.format, "version": manifest.version}
        files = {name: file.model_dump() for name, file in manifest.files.items()}
        rest = {"parameters": parameters, "state": manifest.state, "files": files, "tensors": tensors}
        return json.dumps(identity | summary | rest, indent=1)
    state = [f"  {printable(key)}: {_short(value)}" for key, value in manifest.state.items() if key != "settings"]
    loss = summary["validation_loss"]
    facts = [
        ("format", f"{manifest.format} {manifest.version}"),
        ("step", str(step)),
        ("committed", f"{summary['committed'][:19].replace('T', ' ')} UTC"),
        ("layout", _text(summary["layout"])),
        ("validation loss", "-" if loss is None else f"{loss:.4f}"),
        ("size", f"{_size(summary['bytes'])} in {_count(len(manifest.files), 'file')}"),
        ("tensors", f"{len(tensors)}, {parameters:,} parameters among them"),
    ]
    rows = [
        (key, " x ".join(map(str, tensor.shape)) or "scalar", tensor.dtype, str(len(tensor.fragments)))
        for key, tensor in manifest.tensors.items()
    ]
    lines = [str(store.folder_of(step)), *(f"  {name:<16}{value}" for name, value in facts), ""]
    lines += ["state, without the settings:", *state, ""]
    lines += _columns([("tensor", "shape", "dtype", "boxes"), *rows], right=(3,))
    return "\n".join(lines)


def verify_steps(store: CheckpointStore, step: int | None = None) -> Iterator[tuple[str, bool]]:
    """Read every byte of one step, or of all, the oldest first; for each a line, and whether the step is whole.

    The files that are damaged follow the line, each with a line of its own. Raises CheckpointError where there is no
    such step, or none at all.
    """
    steps = store.steps() if step is None else [step]
    if not steps:
        raise CheckpointError(f"{store.folder}: no checkpoints")
    for number in steps:
        store.folder_of(number)  # says so where there is none
        problems = store.verify(number)
        if problems:
            yield "\n".join([f"step {number}: damaged", *(f"  {problem}" for problem in problems)]), False
        else:
            files = store.manifest(number).files
            size = _size(sum(file.bytes for file in files.values()))
            yield f"step {number}: whole: {_count(len(files), 'file')}, {size}", True


def prune_steps(store: CheckpointStore, retention: Retention, *, dry_run: bool = False) -> tuple[str, bool]:
    """Delete what `retention` does not keep and what ended saves left behind; the lines that say so, and whether all
    could be done. With `dry_run` only say what would be deleted. Only where nothing is being saved."""
    cleared = _leftovers(store) if dry_run else store.clean()
    pruner = Pruner(store, retention)
    reasons = retention.reasons(pruner.scores())
    damaged = pruner.damaged
    deleted = [] if dry_run else pruner.delete(step for step, why in reasons.items() if not why)
    lines, done = [], True
    for step in sorted([*reasons, *damaged]):
        if step in damaged:
            lines.append(f"step {step}: damaged, left alone: {damaged[step]}")
        elif reasons[step]:
            lines.append(f"step {step}: kept: {', '.join(reasons[step])}")
        elif dry_run or step in deleted:
            lines.append(f"step {step}: {'would be deleted' if dry_run else 'deleted'}")
        else:
            lines.append(f"step {step}: could not be deleted")
            done = False
    said = "would be cleared away" if dry_run else "cleared away"
    lines += [f"{name}: {said}: left by a save or deletion that was ended" for name in cleared]
    return "\n".join(lines) or f"{store.folder}: no checkpoints", done


def _leftovers(store: CheckpointStore) -> list[str]:
    names = [entry.name for entry in store.folder.iterdir()] if store.folder.is_dir() else []
    return sorted(name for name in names if name.startswith((".tmp-", ".replaced-")))


def _summary(store: CheckpointStore, step: int) -> dict[str, Any]:
    """Of a damaged step there is what its folder still says."""
    manifest: Manifest | None = None
    problem = None
    try:
        manifest = read_manifest(store.folder_of(step), step)
    except CheckpointError as error:
        problem = str(error)
    layout = manifest.state.get("layout") if manifest else None
    return {
        "step": step,
        "committed": _committed(store, step, manifest.state if manifest else {}),
        "bytes": sum(file.bytes for file in manifest.files.values()) if manifest else None,
        "files": len(manifest.files) if manifest else None,
        "validation_loss": score_in(manifest.state) if manifest else None,
        "layout": layout if isinstance(layout, str) and layout.isprintable() else None,
        "problem": problem,
    }


def _committed(store: CheckpointStore, step: int, state: dict[str, Any]) -> str:
    """When a step was saved, as its state says, else as its folder does; ISO 8601, UTC."""
    try:
        moment = datetime.fromisoformat(state["saved_at"])
        moment = moment.replace(tzinfo=moment.tzinfo or UTC)
    except (KeyError, TypeError, ValueError):
        try:
            moment = datetime.fromtimestamp(store.folder_of(step).stat().st_mtime, UTC)
        except (CheckpointError, OSError):
            return "-"
    return moment.astimezone(UTC).isoformat(timespec="seconds")


def _columns(rows: Sequence[Sequence[str]], right: Sequence[int]) -> Iterator[str]:
    """Rows as lines of aligned columns, those numbered in `right` to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _text(value: object) -> str:
    return "-" if value is None else str(value)


def _short(value: object, most: int = 100) -> str:
    """A value as JSON, on one line of a terminal."""
    text = json.dumps(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _size(size: int | None) -> str:
    """Decimal units, as disks are sold and `df -H` counts."""
    if size is None:
        return "-"
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{size} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
