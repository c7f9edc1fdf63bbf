"""`harness remove-norms`: fine-tune the norms away, fold what is left of them into the weights, and prove it."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import torch

from harness.checkpoint import CheckpointStore
from harness.config import ConfigError, HarnessError
from harness.convert import convert
from harness.normfree import NormFreeProof, open_folded, prove
from harness.parallel import Identity, ParallelLayout
from harness.settings import Settings
from harness.stop import EXIT_RESUME
from harness.train import train

logger = logging.getLogger("harness.remove_norms")

FOLDED, HUGGINGFACE, PROOF = "norm_free", "huggingface", "proof.json"
"""In the run's folder: the model without norms as a run of ours, and as a Hugging Face folder; the proof, in both
senses beside the first."""


def remove_norms(settings: Settings) -> int:
    """Train what `settings` describe, with norms that go; then fold, export and prove. The same call goes on where a
    signal or a crash ended the last one. The exit status: 1 where the proof fails.

    On several ranks all train, and the first one does the rest. Raises HarnessError for bad input, and where sites are
    still there after the last step.
    """
    settings = prepared_settings(settings)
    result = train(settings)
    if result.stopped_by is not None:
        return EXIT_RESUME
    identity = Identity.from_environment()
    if settings.norm_removal.control != "none" or settings.train.dry_run or identity.rank > 0:
        return 0
    with ParallelLayout(settings.parallel.on_one_process(), Identity(0, 1, identity.local_rank)) as layout:
        why_not = fold_run(result.folder, result.step)
        proof = prove_run(result.folder, settings, result.step, device=layout.device, why_not=why_not)
    for line in proof.lines():
        logger.info(line)
    return 0 if proof.holds else 1


def prepared_settings(settings: Settings) -> Settings:
    """With norm removal switched on, and the steps of a control that is to match a run. Raises ConfigError."""
    removal = settings.norm_removal.model_copy(update={"enabled": True})
    settings = settings.model_copy(update={"norm_removal": removal})
    if settings.train.init_from is None and not settings.train.dry_run:
        raise ConfigError(
            "train.init_from: null, so there is no model to take norms from; name a run, a checkpoint or a Hugging "
            "Face folder"
        )
    if removal.match is None:
        return settings
    steps = consumed_steps(Path(removal.match), settings.train.global_batch_size)
    return settings.model_copy(update={"train": settings.train.model_copy(update={"steps": steps})})


def consumed_steps(run: Path, global_batch_size: int) -> int:
    """How many steps read as many samples as a removal run has consumed, what its rollbacks lost included."""
    store = CheckpointStore(run / "checkpoints")
    step = store.latest_good() if store.folder.is_dir() else None
    if step is None:
        raise ConfigError(f"norm_removal.match: {run} has no good checkpoint; give the folder of a removal run")
    state = store.read_state(step)
    total = state["settings"]["train"]["steps"]
    if step < total:
        raise ConfigError(f"norm_removal.match: {run} has done {step} of its {total} steps; let it finish first")
    consumed: int = state["stream"]["consumed_samples"]
    if consumed % global_batch_size:
        raise ConfigError(
            f"norm_removal.match: {run} consumed {consumed} samples, no multiple of train.global_batch_size "
            f"{global_batch_size}; use the run's own"
        )
    return consumed // global_batch_size


def fold_run(run: Path, step: int) -> str | None:
    """Write RUN/norm_free and RUN/huggingface, in place of those of an earlier step. Why there is no second one, where
    this model cannot be one; else None. Raises HarnessError, naming them, where sites are not frozen."""
    source = open_folded(run, step)
    for line in convert(source, _free(run / FOLDED), to="harness").lines():
        logger.info(line)
    try:
        done = convert(source, _free(run / HUGGINGFACE), to="huggingface")
    except HarnessError as error:
        logger.warning("no Hugging Face folder: %s", error)
        return str(error)
    for line in done.lines():
        logger.info(line)
    return None


def prove_run(
    run: Path,
    settings: Settings,
    step: int | None = None,
    *,
    device: torch.device | str = "cpu",
    why_not: str | None = None,
) -> NormFreeProof:
    """The proof of a removal run that was folded; also in RUN/norm_free/proof.json. `why_not`: why there is no Hugging
    Face folder."""
    original = settings.train.init_from
    proof = prove(
        run,
        step=step,
        folded=run / FOLDED,
        huggingface=why_not or run / HUGGINGFACE,
        original=None if original is None else Path(original),
        controls={Path(place).name: Path(place) for place in settings.norm_removal.controls},
        data=settings.data,
        windows=settings.norm_removal.proof_windows,
        device=device,
    )
    text = json.dumps(proof.as_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (run / FOLDED / PROOF).write_text(text, encoding="utf-8")
    return proof


def _free(folder: Path) -> Path:
    """The folder, without what an earlier call made there. Raises HarnessError for what is none of ours."""
    if folder.is_dir() and any(folder.iterdir()):
        record = folder / "conversion.json"
        if not record.is_file():
            raise HarnessError(f"{folder}: is there already, and was not made by harness; move it away")
        shutil.rmtree(folder)
    return folder
