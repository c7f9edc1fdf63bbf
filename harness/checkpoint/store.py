"""The checkpoints of a run: saved whole or not at all, found by looking, verified when read.

<folder>/step-00000200/manifest.json               what is in the others (manifest.py)
                       manifest.sha256             digest of manifest.json
                       tensors-00000.safetensors   boxes of tensors; one writer's files are numbered
       /.tmp-step-00000400/                        being written, or left by a kill; the next save removes it
       /.replaced-step-00000200/                   for a moment, while a step is saved for the second time
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from harness.disk import sync
from harness.parallel import Fragment

from .disk import make_folders, write_synced
from .errors import CheckpointError
from .manifest import Manifest, Part, check_json, merge, read_manifest, write_manifest
from .shard_reader import content_problem, copy_planned, plan_copies
from .shard_writer import write_fragments

logger = logging.getLogger(__name__)

DEFAULT_MAX_FILE_BYTES = 2 << 30
_STEP_FOLDER = re.compile(r"(?:\.replaced-)?step-(\d{8,})")


class CheckpointStore:
    """Saves, finds, verifies and loads checkpoints in `folder`.

    Several `writers` (ranks), numbered from 0, may save one checkpoint together: each gives the fragments that it owns.
    `agree(ok)` must return on all of them once all have called it: True where each came with True (an all-reduce).
    Writer 0 makes the folders and commits.
    Reading needs no writer: every method but save and delete only looks.
    """

    def __init__(
        self,
        folder: Path | str,
        writer: int = 0,
        writers: int = 1,
        *,
        agree: Callable[[bool], bool] | None = None,
        max_file_bytes: int = DEFAULT_MAX_FILE_BYTES,
    ) -> None:
        if not 0 <= writer < writers or (writers > 1 and agree is None):
            raise ValueError(f"writer {writer} of {writers}: number them from 0, and give several a way to agree")
        self.folder = Path(folder)
        self._writer = writer
        self._writers = writers
        self._agree = agree or (lambda ok: ok)
        self._max_file_bytes = max_file_bytes

    # Saving

    def save(self, step: int, fragments: Iterable[Fragment], state: dict[str, Any]) -> Path:
        """Write a checkpoint and return its folder, committed; until then nothing of it can be taken for one.

        The fragments of all writers tile each tensor exactly; their memory must not change before save returns. `state`
        is plain JSON, writer 0's is stored. A step that exists already is replaced, once the new one is whole on disk.
        Raises CheckpointError on every writer where one of them failed; what existed before then still does.
        """
        final = self.folder / _folder_name(step)
        temporary = self.folder / f".tmp-{final.name}"
        part = Part(tensors={}, files={})

        def prepare() -> None:
            check_json(state, "state")
            if self._writer == 0:
                self._prepare(temporary)

        def write() -> None:
            nonlocal part
            part = write_fragments(temporary, fragments, self._file_name, self._max_file_bytes)
            if self._writer:
                write_synced(temporary / _part_name(self._writer), part.model_dump_json().encode())

        def commit() -> None:
            if self._writer == 0:
                parts = [part, *(_take_part(temporary, writer) for writer in range(1, self._writers))]
                write_manifest(temporary, merge(parts, step, state))
                self._commit(temporary, final)

        failure: Exception | None = None
        for phase in (prepare, write, commit):
            try:
                phase()
            except Exception as error:
                failure = error  # raised below: the others must hear of it first, and not wait for ever
            if not self._agree(failure is None):
                break
        else:
            return final
        if self._writer == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(failure, (OSError, SafetensorError)):
            raise CheckpointError(f"{final}: cannot be written: {failure}; earlier steps are untouched") from failure
        if isinstance(failure, CheckpointError):
            raise CheckpointError(f"{final}: not saved: {failure}") from None
        raise failure or CheckpointError(f"{final}: not saved: another writer failed, and its own message says why")

    def delete(self, step: int) -> None:
        """Remove a step. It is renamed first, so that a half-deleted one is never found."""
        self._folder_of(step)  # says so where there is none
        while step in self.steps():
            folder = self._folder_of(step)
            doomed = self.folder / f".tmp-deleted-{folder.name}"
            shutil.rmtree(doomed, ignore_errors=True)
            folder.rename(doomed)
            sync(self.folder)
            shutil.rmtree(doomed)

    # Finding and reading

    def steps(self) -> list[int]:
        """The steps that have a folder, ascending; latest_good, verify and load say whether they are whole."""
        if not self.folder.is_dir():
            return []
        matches = [_STEP_FOLDER.fullmatch(entry.name) for entry in self.folder.iterdir() if entry.is_dir()]
        return sorted({int(match[1]) for match in matches if match})

    def latest_good(self, *, before: int | None = None, verify: bool = False) -> int | None:
        """The newest step (older than `before`) that is whole; None where there is none.

        Whole: a valid manifest, and every file there with its size; with `verify` every byte is read too. What is wrong
        with a newer one is logged as a warning. Found by looking at the folders: no pointer file could lie.
        """
        for step in reversed(self.steps()):
            if before is not None and step >= before:
                continue
            problems = self.verify(step) if verify else self._manifest_problems(step)
            if not problems:
                return step
            logger.warning("checkpoint of step %d is passed over: %s", step, problems[0])
        return None

    def manifest(self, step: int) -> Manifest:
        """The manifest of a step, checked (see read_manifest). Raises CheckpointError."""
        try:
            return read_manifest(self._folder_of(step), step)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{self._advice(step)}") from None

    def read_state(self, step: int) -> dict[str, Any]:
        """The state that was saved with a step. Raises CheckpointError."""
        return self.manifest(step).state

    def verify(self, step: int) -> list[str]:
        """What is wrong with a step, one line a file; every byte of every file is read. Empty: the step is whole."""
        try:
            manifest = read_manifest(self._folder_of(step), step)
        except CheckpointError as error:
            return [str(error)]
        folder = self._folder_of(step)
        problems = [(name, content_problem(folder, name, file)) for name, file in manifest.files.items()]
        return [f"{folder / name}: {problem}" for name, problem in problems if problem]

    def load(
        self, step: int, into: Iterable[Fragment], *, verify: bool = True, allow_unused: bool = False
    ) -> dict[str, Any]:
        """Copy a step into the views `into`, whatever boxes it was saved in, and return its state.

        Names, global shapes and dtypes must agree; a stored tensor of a requested kind that no fragment names is an
        error unless `allow_unused` (a fragment without elements names it too). With `verify` the files that are needed
        are hashed first. Raises CheckpointError, in every case before any memory is touched.
        """
        manifest = self.manifest(step)
        folder = self._folder_of(step)
        copies = plan_copies(manifest, list(into), str(folder), allow_unused=allow_unused)
        for name in sorted(copies) if verify else ():
            problem = content_problem(folder, name, manifest.files[name])
            if problem:
                raise CheckpointError(f"{folder / name}: {problem}{self._advice(step)}")
        copy_planned(folder, copies)
        return manifest.state

    def _folder_of(self, step: int) -> Path:
        """Where a step lies: in its own folder, or set aside by a save of the same step that was killed."""
        for folder in (self.folder / _folder_name(step), self.folder / f".replaced-{_folder_name(step)}"):
            if folder.is_dir():
                return folder
        there = ", ".join(map(str, self.steps())) or "none"
        raise CheckpointError(f"{self.folder}: has no step {step}; steps there: {there}")

    def _manifest_problems(self, step: int) -> list[str]:
        try:
            read_manifest(self._folder_of(step), step)
        except CheckpointError as error:
            return [str(error)]
        return []

    def _advice(self, step: int) -> str:
        earlier = (other for other in reversed(self.steps()) if other < step and not self._manifest_problems(other))
        found = next(earlier, None)
        return f"; use an earlier step: {found}" if found is not None else "; there is no earlier step"

    def _file_name(self, number: int) -> str:
        return (
            f"tensors-{number:05d}.safetensors"
            if self._writers == 1
            else f"tensors-{self._writer:05d}-{number:05d}.safetensors"
        )

    def _prepare(self, temporary: Path) -> None:
        """Clear away what a kill left behind, and make an empty folder."""
        make_folders(self.folder)
        for entry in list(self.folder.iterdir()):
            if entry.name.startswith(".replaced-"):
                original = self.folder / entry.name.removeprefix(".replaced-")
                if original.exists():
                    shutil.rmtree(entry)
                else:
                    entry.rename(original)
            elif entry.name.startswith(".tmp-"):
                shutil.rmtree(entry)
        temporary.mkdir()

    def _commit(self, temporary: Path, final: Path) -> None:
        sync(temporary)
        replaced = self.folder / f".replaced-{final.name}"
        if final.exists():
            final.rename(replaced)
        temporary.rename(final)
        sync(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)


def _folder_name(step: int) -> str:
    if step < 0:
        raise ValueError(f"step {step} is negative")
    return f"step-{step:08d}"


def _part_name(writer: int) -> str:
    return f"part-{writer:05d}.json"


def _take_part(folder: Path, writer: int) -> Part:
    """What a writer says that it wrote; its file has then done its work and goes."""
    path = folder / _part_name(writer)
    try:
        part = Part.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"writer {writer} of the checkpoint did not finish: its own message says why") from None
    path.unlink()
    return part
