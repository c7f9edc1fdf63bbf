"""A trained model back from where it lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from harness.config import HarnessError
from harness.convert import ModelSource, RunSource, open_source
from harness.data import Tokenizer
from harness.model import Decoder, build_decoder
from harness.parallel import Fragment


@dataclass(frozen=True)
class Restored:
    """A model in evaluation mode, fp32, with the tokenizer it was trained with; norms that its training had frozen are
    frozen."""

    model: Decoder
    tokenizer: Tokenizer
    folder: Path
    """The run's, or the folder of another format."""
    step: int | None
    """None where the folder is no run's."""


def restore(
    target: Path, *, step: int | None = None, device: torch.device | str = "cpu", switchable_norms: bool = False
) -> Restored:
    """The model of a run folder (newest checkpoint, or `step`), of a checkpoint folder inside one, or of a folder in
    another format that harness.convert reads.

    Reads the master weights only. Of a norm removal the norms are in the states of that step; switchable_norms: so that
    they can be set for any other model too. Raises HarnessError where there is no such model, it is damaged, or has no
    tokenizer.
    """
    source = open_source(target, step=step)
    problems = source.verify()
    if problems:
        raise HarnessError("\n".join(problems))
    tokenizer = source.tokenizer
    if tokenizer is None:
        raise HarnessError(f"{target}: has no tokenizer; put its tokenizer.json or tokenizer.model there")
    if source.section.vocab_size is not None and tokenizer.vocab_size > source.section.vocab_size:
        raise HarnessError(
            f"{target}: its tokenizer has {tokenizer.vocab_size} tokens, and its model {source.section.vocab_size}"
        )
    model = read_model(source, device=device, switchable_norms=switchable_norms)
    if isinstance(source, RunSource):
        return Restored(model.eval(), tokenizer, source.run_folder, source.step)
    return Restored(model.eval(), tokenizer, target, None)


def read_model(
    source: ModelSource,
    *,
    device: torch.device | str = "cpu",
    switchable_norms: bool = False,
) -> Decoder:
    """The fp32 model of a source that was verified; its norms in their states, see `restore`."""
    switchable = switchable_norms or bool(source.norm_states)
    model = build_decoder(source.section, seed=0, device=device, switchable_norms=switchable)
    placements = model.placements()
    source.read(
        [
            Fragment.whole(name, "master", weight.detach()[: placements[name].shape[0]])
            for name, weight in model.named_parameters()
        ]
    )
    if model.norm_states is not None:
        model.norm_states.set(source.norm_states)
    return model
