"""How a run begins: its folder, the same settings on all ranks, the data, and the checkpoint to go on from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from harness.checkpoint import CheckpointStore
from harness.config import HarnessError, plain
from harness.convert import ModelSource, RunSource, is_run, locate_run, open_source, refuse_frozen
from harness.data import Prepared, Tokenizer, open_prepared, prepare_for_training
from harness.model import ModelSection
from harness.parallel import Channel, Engine, ParallelLayout
from harness.runs import RunFolder
from harness.settings import Settings

logger = logging.getLogger("harness.train")

MAY_CHANGE = {"model.dropout", "model.init_std", "model.position_init_std", "model.scale_residual_init"}
"""Keys of the model that a resume may change: they do not touch what the trained weights compute."""


def open_run(settings: Settings, layout: ParallelLayout) -> RunFolder:
    """The run's folder, which rank 0 writes; the others write their log. Rank 0 makes it before anyone looks."""

    def make(rank: int) -> RunFolder:
        return RunFolder(settings.run.path, tensorboard=settings.run.tensorboard, rank=rank)

    run: RunFolder | None = None

    def first() -> None:
        nonlocal run
        run = make(0)

    layout.first_decides(first)
    return run if run is not None else make(layout.rank)


def compare_settings(settings: Settings, layout: ParallelLayout) -> None:
    """Raises HarnessError where a rank was started with other settings than rank 0: its collectives would not meet."""
    mine = plain(settings)
    differences = _changes(layout.first_decides(lambda: mine), mine)
    if differences:
        said = "; ".join(f"{key}: there {first}, here {here}" for key, (first, here) in differences.items())
        raise HarnessError(f"other settings than rank 0's ({said}); start every machine with the same configuration")


def prepare(settings: Settings, layout: ParallelLayout) -> Prepared:
    """The tokenized corpora: rank 0 makes what is missing while the others wait."""
    prepared: Prepared | None = None

    def first() -> None:
        nonlocal prepared
        prepared = prepare_for_training(settings.data)

    layout.first_decides(first)
    return prepared if prepared is not None else open_prepared(settings.data)


def starting_step(
    settings: Settings, run: RunFolder, store: CheckpointStore, layout: ParallelLayout, channel: Channel
) -> int | None:
    """The step to resume from, or None to begin; refuses what `train.resume` refuses, before anything is touched.

    Every byte of the checkpoint is verified, each rank reading its share of the files.
    """

    def refuse() -> None:
        if run.checkpoints.exists() and not run.checkpoints.is_dir():
            raise HarnessError(
                f"{run.checkpoints}: is a file, and checkpoints go into a folder of that name; move it away"
            )
        if settings.train.resume == "never" and (run.existing() is not None or store.steps()):
            raise HarnessError(
                f"{run.path}: holds a run already; choose another run.name, delete it, or set train.resume=auto"
            )

    layout.first_decides(refuse)
    newest = None
    if settings.train.resume != "never":
        newest = newest_verified(store, layout, channel, strict=settings.checkpoint.strict)
    if newest is None and store.steps():
        logger.warning("%s: no good checkpoint is left; the run begins anew at step 1", store.folder)
    if newest is None and settings.train.resume == "must":
        raise HarnessError(f"{store.folder}: no good checkpoint to resume from, and train.resume is must")
    return newest


def newest_verified(
    store: CheckpointStore, layout: ParallelLayout, channel: Channel, *, before: int | None = None, strict: bool = False
) -> int | None:
    """The newest step (older than `before`) of which every byte is as it was written; None where there is none.

    Damaged ones are named in the log, or raised with `strict`.
    """
    while True:
        step = layout.first_decides(partial(store.latest_good, before=before, strict=strict))
        if step is None:
            return None
        problems = channel.all_lines(store.verify(step, share=(layout.rank, layout.world_size)))
        if not problems:
            return int(step)
        layout.first_decides(partial(store.pass_over, step, problems, strict=strict))
        before = step


def check_resume(state: dict[str, Any], settings: Settings, tokenizer: str, where: str) -> list[str]:
    """A line for every setting that differs from those that a checkpoint was saved with.

    Raises HarnessError, naming them, for changes that its weights cannot follow. `where` begins that line.
    """
    before = state["settings"]
    # A checkpoint may be older than a key of the model: then it stands for that key's default.
    before = {**before, "model": plain(ModelSection.model_validate(before["model"]))}
    changes = _changes(before, plain(settings))
    may_change = MAY_CHANGE | ({"model.max_positions"} if settings.model.positions == "rope" else set())
    lines = {key: f"{key}: was {before}, now {now}" for key, (before, now) in changes.items()}
    refused = [line for key, line in lines.items() if key.startswith("model.") and key not in may_change]
    if state["tokenizer"] != tokenizer:
        refused.append("data.tokenizer: another tokenizer")
    if state["step"] > settings.train.steps:
        refused.append(f"train.steps: {settings.train.steps} is less than the {state['step']} steps that are done")
    if refused:
        raise HarnessError(
            f"{where} cannot be resumed: {'; '.join(refused)}. Set these back, or choose another run.name"
        )
    return [line for key, line in lines.items() if not _same_place(key, *changes[key])]


def load_weights(
    engine: Engine, settings: Settings, tokenizer: Tokenizer, layout: ParallelLayout, channel: Channel
) -> dict[str, Any]:
    """Begin with the weights that `train.init_from` names, each rank reading its own part; where they came from, as
    JSON.

    Raises HarnessError on every rank where there is no such model, it is damaged, or its shape or tokenizer is another.
    """
    where = settings.train.init_from
    assert where is not None
    source = _open_weights(Path(where), layout, channel)
    differences = _changes(source.section.architecture(), settings.model.architecture())
    refused = [f"model.{key}: {theirs} there, {ours} here" for key, (theirs, ours) in differences.items()]
    if not _same_tokenizer(source, tokenizer):
        refused.append("data.tokenizer: another tokenizer")
    if refused:
        raise HarnessError(
            f"train.init_from: {where}: its weights do not fit ({'; '.join(refused)}); `harness "
            f"config {where}` prints the model section that does"
        )
    source.read([fragment for fragment in engine.fragments() if fragment.kind == "master"])
    engine.refresh_weights()
    return {"init_from": str(source.path)}


def _open_weights(folder: Path, layout: ParallelLayout, channel: Channel) -> ModelSource:
    """The model in a folder; of a run every byte is verified, each rank reading its share of the files.

    What one rank finds wrong, all raise: a folder that one of them does not see must not leave the others waiting.
    """

    def agree(problems: Sequence[str]) -> None:
        for problem in channel.all_lines(problems):
            raise HarnessError(f"train.init_from: {problem}")

    agree([] if folder.is_dir() else [f"{folder}: no such folder"])
    step = None
    if is_run(folder) and locate_run(folder)[1] is None:
        checkpoints = locate_run(folder)[0] / "checkpoints"
        step = newest_verified(CheckpointStore(checkpoints), layout, channel)
        agree([] if step is not None else [f"{folder}: no run with a good checkpoint; give runs/NAME or a step in it"])
    source, problem = None, []
    try:
        source = open_source(folder, step=step)
        refuse_frozen(source)
    except HarnessError as error:
        problem = [str(error)]
    agree(problem)
    assert source is not None
    if step is None:
        agree(source.verify((layout.rank, layout.world_size)))
    return source


def _same_tokenizer(source: ModelSource, tokenizer: Tokenizer) -> bool:
    """Of a run, the very same; of another folder, one in which every id stands for the same bytes."""
    if isinstance(source, RunSource):
        return source.tokenizer_fingerprint in (tokenizer.fingerprint, None)
    if source.tokenizer is None:
        logger.warning(
            "%s: has no tokenizer, so data.tokenizer is taken to be the one it was trained with", source.path
        )
        return True
    return source.tokenizer.pieces == tokenizer.pieces


def _changes(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ, each with both."""
    values: dict[str, tuple[Any, Any]] = {}
    for key in [*old, *(key for key in new if key not in old)]:
        before, after, name = old.get(key), new.get(key), prefix + key
        if isinstance(before, dict) and isinstance(after, dict):
            values |= _changes(before, after, name + ".")
        elif before != after:
            values[name] = before, after
    return values


def _same_place(key: str, before: Any, now: Any) -> bool:
    """Whether a folder was only spelled in another way."""
    folders = ("run.folder", "data.folder")
    return (
        key in folders
        and isinstance(before, str)
        and isinstance(now, str)
        and Path(before).resolve() == Path(now).resolve()
    )
