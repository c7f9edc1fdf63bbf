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
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from harness.disk import sync
from harness.parallel import Fragment

from .disk import make_folders, remove, write_synced
from .errors import CannotWriteError, CheckpointError
from .manifest import Manifest, Part, StoredFile, check_json, merge, read_manifest, write_manifest
from .shard_reader import content_problem, copy_planned, plan_copies
from .shard_writer import Fetch, write_fragments

logger = logging.getLogger(__name__)

DEFAULT_MAX_FILE_BYTES = 512 << 20  # several files, so that threads and ranks have something to share when they hash
HASHING_THREADS = 4
_STEP_FOLDER = re.compile(r"(?:\.replaced-)?step-(\d{8,})")
_MANIFEST_SHARE = 0.01  # of the tensors' bytes, and no less than this:
_MANIFEST_BYTES = 1 << 20

AddUp = Callable[[Sequence[int]], list[int]]
"""Sums each number over all writers; returns on all of them once all have called it."""


class CheckpointStore:
    """Saves, finds, verifies and loads checkpoints in `folder`.

    Several `writers` (ranks), numbered from 0, may save one checkpoint together: each gives the fragments that it owns,
    and they agree on each phase through `add_up`. Writer 0 makes the folders and commits.
    Reading needs no writer: every method but save, delete and clean only looks.
    """

    def __init__(
        self,
        folder: Path | str,
        writer: int = 0,
        writers: int = 1,
        *,
        add_up: AddUp | None = None,
        max_file_bytes: int = DEFAULT_MAX_FILE_BYTES,
    ) -> None:
        if not 0 <= writer < writers or (writers > 1 and add_up is None):
            raise ValueError(f"writer {writer} of {writers}: number them from 0, and give several a way to agree")
        self.folder = Path(folder)
        self._writer = writer
        self._writers = writers
        self._add_up: AddUp = add_up or list
        self._max_file_bytes = max_file_bytes

    # Saving

    def save(
        self,
        step: int,
        fragments: Iterable[Fragment],
        state: dict[str, Any],
        on_written: Callable[[int], None] = lambda size: None,
        *,
        fetch: Fetch | None = None,
    ) -> Path:
        """Write a checkpoint and return its folder, committed; until then nothing of it can be taken for one.

        The fragments of all writers tile each tensor exactly; their memory must not change before save returns. `state`
        is plain JSON, writer 0's is stored. A step that exists already is replaced, once the new one is whole on disk.
        `on_written` is told of the bytes that this writer has written. With `fetch` the fragments' tensors may be on
        the meta device: each one's elements are fetched when they are written, and no two are held.

        Raises CheckpointError on every writer where one of them failed, CannotWriteError where it was for the disk;
        what existed before then still does.
        """
        final = self.folder / _folder_name(step)
        temporary = self.folder / f".tmp-{final.name}"
        part = Part(tensors={}, files={})
        mine: list[Fragment] = []
        all_bytes = 0

        def check() -> None:
            mine.extend(fragments)
            if self._writer == 0:
                check_json(state, "state")

        def prepare() -> None:
            if self._writer == 0:
                self._prepare(temporary, all_bytes)

        def write() -> None:
            nonlocal part
            part = write_fragments(temporary, mine, self._file_name, self._max_file_bytes, on_written, fetch)
            if self._writer:
                write_synced(temporary / _part_name(self._writer), part.model_dump_json().encode())

        def commit() -> None:
            if self._writer == 0:
                parts = [part, *(_take_part(temporary, writer) for writer in range(1, self._writers))]
                write_manifest(temporary, merge(parts, step, state))
                self._commit(temporary, final)

        failure: Exception | None = None
        for phase in (check, prepare, write, commit):
            try:
                phase()
            except Exception as error:
                failure = error  # raised below: the others must hear of it first, and not wait for ever
            of_the_disk = isinstance(failure, (OSError, CannotWriteError))
            own_bytes = sum(fragment.tensor.nbytes for fragment in mine) if phase is check else 0
            failed, failed_at_the_disk, announced = self._add_up([failure is not None, of_the_disk, own_bytes])
            all_bytes += announced
            if failed:
                break
        else:
            return final
        if self._writer == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        kind = CannotWriteError if failed == failed_at_the_disk else CheckpointError
        if isinstance(failure, OSError):
            raise kind(f"{final}: cannot be written: {failure}; earlier steps are untouched") from failure
        if isinstance(failure, CheckpointError):
            raise kind(f"{final}: not saved: {failure}") from None
        raise failure or kind(f"{final}: not saved: another writer failed, and its own message says why")

    def delete(self, step: int) -> None:
        """Remove a step. It is renamed first, so that a half-deleted one is never found."""
        self.folder_of(step)  # says so where there is none
        while step in self.steps():
            folder = self.folder_of(step)
            doomed = self.folder / f".tmp-deleted-{folder.name}"
            remove(doomed)
            folder.rename(doomed)
            sync(self.folder)
            remove(doomed)

    def clean(self) -> list[str]:
        """Clear away what a kill left behind; the names of the folders. Only where nothing is being saved."""
        cleared = []
        for entry in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            if entry.name.startswith(".replaced-"):
                original = self.folder / entry.name.removeprefix(".replaced-")
                if original.exists():
                    remove(entry)
                else:
                    entry.rename(original)
            elif entry.name.startswith(".tmp-"):
                remove(entry)
            else:
                continue
            cleared.append(entry.name)
        return cleared

    # Finding and reading

    def steps(self) -> list[int]:
        """The steps that have a folder, ascending; latest_good, verify and load say whether they are whole."""
        if not self.folder.is_dir():
            return []
        matches = [_STEP_FOLDER.fullmatch(entry.name) for entry in self.folder.iterdir() if entry.is_dir()]
        return sorted({int(match[1]) for match in matches if match})

    def folder_of(self, step: int) -> Path:
        """Where a step lies: in its own folder, or set aside by a save of the same step that was killed.

        Raises CheckpointError where there is none.
        """
        for folder in (self.folder / _folder_name(step), self.folder / f".replaced-{_folder_name(step)}"):
            if folder.is_dir():
                return folder
        there = ", ".join(map(str, self.steps())) or "none"
        raise CheckpointError(f"{self.folder}: has no step {step}; steps there: {there}")

    def latest_good(self, *, before: int | None = None, verify: bool = False, strict: bool = False) -> int | None:
        """The newest step (older than `before`) that is whole; None where there is none.

        Whole: a valid manifest, and every file there with its size; with `verify` every byte is read too. What is wrong
        with a newer one is logged as a warning, or with `strict` raised. Found by looking at the folders: no pointer
        file could lie.
        """
        for step in reversed(self.steps()):
            if before is not None and step >= before:
                continue
            problems = self.verify(step) if verify else self._manifest_problems(step)
            if not problems:
                return step
            self.pass_over(step, problems, strict=strict)
        return None

    def pass_over(self, step: int, problems: Sequence[str], *, strict: bool) -> None:
        """Say that a step is damaged, and that an earlier one is used; with `strict` CheckpointError."""
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        if strict:
            raise CheckpointError(
                f"{problems[0]}{more}; checkpoint.strict lets no earlier step take its place: restore or move away "
                f"{self.folder_of(step)}"
            )
        logger.warning("checkpoint of step %d is passed over: %s%s", step, problems[0], more)

    def manifest(self, step: int) -> Manifest:
        """The manifest of a step, checked (see read_manifest). Raises CheckpointError."""
        try:
            return read_manifest(self.folder_of(step), step)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{self.advice(step)}") from None

    def read_state(self, step: int) -> dict[str, Any]:
        """The state that was saved with a step. Raises CheckpointError."""
        return self.manifest(step).state

    def verify(self, step: int, share: tuple[int, int] = (0, 1), *, kinds: Collection[str] | None = None) -> list[str]:
        """What is wrong with a step, one line a file; every byte of every file is read. Empty: the step is whole.

        `share` (number, of how many) leaves out the files that other ranks read, `kinds` those that hold no tensor of
        these kinds ("master").
        """
        try:  # every damaged file is named, so the first that is missing is not the end
            manifest = read_manifest(self.folder_of(step), step, check_files=False)
        except CheckpointError as error:
            return [str(error)]
        files = manifest.files if kinds is None else manifest.files_of(kinds)
        return self._damaged(self.folder_of(step), _deal_out(files, *share))

    def load(
        self, step: int, into: Iterable[Fragment], *, verify: bool = True, allow_unused: bool = False
    ) -> dict[str, Any]:
        """Copy a step into the views `into`, whatever boxes it was saved in, and return its state.

        Names, global shapes and dtypes must agree; a stored tensor of a requested kind that no fragment names is an
        error unless `allow_unused` (a fragment without elements names it too). With `verify` the files that are needed
        are hashed first. Raises CheckpointError, in every case before any memory is touched.
        """
        manifest = self.manifest(step)
        folder = self.folder_of(step)
        copies = plan_copies(manifest, list(into), str(folder), allow_unused=allow_unused)
        needed = {name: manifest.files[name] for name in sorted(copies)}
        for problem in self._damaged(folder, needed) if verify else ():
            raise CheckpointError(f"{problem}{self.advice(step)}")
        copy_planned(folder, copies)
        return manifest.state

    def read(self, manifest: Manifest, into: Iterable[Fragment]) -> None:
        """`load` for one who reads a little at a time: of a manifest from here, nothing is verified, the rest left."""
        folder = self.folder_of(manifest.step)
        copy_planned(folder, plan_copies(manifest, list(into), str(folder), allow_unused=True))

    def _damaged(self, folder: Path, files: dict[str, StoredFile]) -> list[str]:
        with ThreadPoolExecutor(HASHING_THREADS) as pool:
            problems = list(pool.map(lambda name: content_problem(folder, name, files[name]), files))
        return [f"{folder / name}: {problem}" for name, problem in zip(files, problems, strict=True) if problem]

    def _manifest_problems(self, step: int) -> list[str]:
        try:
            read_manifest(self.folder_of(step), step)
        except CheckpointError as error:
            return [str(error)]
        return []

    def advice(self, step: int) -> str:
        """What to do about a damaged step, to end its line with."""
        earlier = (other for other in reversed(self.steps()) if other < step and not self._manifest_problems(other))
        found = next(earlier, None)
        return f"; use an earlier step: {found}" if found is not None else "; there is no earlier step"

    def _file_name(self, number: int) -> str:
        return (
            f"tensors-{number:05d}.safetensors"
            if self._writers == 1
            else f"tensors-{self._writer:05d}-{number:05d}.safetensors"
        )

    def _prepare(self, temporary: Path, tensor_bytes: int) -> None:
        """An empty folder on a disk with room for the tensors of all writers."""
        make_folders(self.folder)
        self.clean()
        needed = tensor_bytes + max(int(_MANIFEST_SHARE * tensor_bytes), _MANIFEST_BYTES)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise CannotWriteError(
                f"{needed / 1e6:.1f} MB are needed and {free / 1e6:.1f} MB are free; make room, or keep fewer "
                f"checkpoints; earlier steps are untouched"
            )
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


def _deal_out(files: dict[str, StoredFile], number: int, shares: int) -> dict[str, StoredFile]:
    """The files of one of so many shares of about equally many bytes."""
    sizes = [0] * shares
    mine = {}
    for name, file in sorted(files.items(), key=lambda item: (-item[1].bytes, item[0])):
        share = sizes.index(min(sizes))
        sizes[share] += file.bytes
        if share == number:
            mine[name] = file
    return mine
