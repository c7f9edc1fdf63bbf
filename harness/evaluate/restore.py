"""A trained model back from its run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from harness.checkpoint import CheckpointStore
from harness.config import HarnessError, validate
from harness.data import Tokenizer, load_tokenizer
from harness.model import Decoder, ModelSection, build_decoder
from harness.parallel import Fragment


@dataclass(frozen=True)
class Restored:
    """A model in evaluation mode, fp32, with the tokenizer it was trained with."""

    model: Decoder
    tokenizer: Tokenizer
    run_folder: Path
    step: int


def restore(target: Path, *, step: int | None = None, device: torch.device | str = "cpu") -> Restored:
    """The model of a run folder (newest checkpoint, or `step`) or of a checkpoint folder inside one.

    Reads the master weights only. Raises HarnessError where there is no such run or checkpoint, or it is damaged.
    """
    run_folder = target
    if target.parent.name == "checkpoints":
        run_folder = target.parent.parent
        if step is None:
            name = target.name.removeprefix("step-")
            if not name.isdigit():
                raise HarnessError(f"{target}: not a checkpoint; expected a folder such as step-00000200")
            step = int(name)
    store = CheckpointStore(run_folder / "checkpoints")
    if step is None:
        step = max(store.steps(), default=None)  # if it is damaged, that is said, and not another one taken for it
        if step is None:
            raise HarnessError(
                f"{run_folder}: no run with a good checkpoint; give runs/NAME or runs/NAME/checkpoints/step-…"
            )
    state = store.read_state(step)
    section = validate(ModelSection, state["settings"]["model"], f"{store.folder}, step {step}: model")
    tokenizer = load_tokenizer(run_folder / "tokenizer")
    if tokenizer.fingerprint != state["tokenizer"]:
        raise HarnessError(f"{run_folder / 'tokenizer'}: not the tokenizer that the checkpoint was trained with")
    model = build_decoder(section, seed=0, device=device)
    placements = model.placements()
    fragments = [
        Fragment.whole(name, "master", weight.detach()[: placements[name].shape[0]])
        for name, weight in model.named_parameters()
    ]
    store.load(step, into=fragments)
    return Restored(model.eval(), tokenizer, run_folder, step)
