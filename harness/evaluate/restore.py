"""A trained model back from where it lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from harness.config import HarnessError
from harness.convert import RunSource, open_source
from harness.data import Tokenizer
from harness.model import Decoder, build_decoder
from harness.parallel import Fragment


@dataclass(frozen=True)
class Restored:
    """A model in evaluation mode, fp32, with the tokenizer it was trained with."""

    model: Decoder
    tokenizer: Tokenizer
    folder: Path
    """The run's, or the folder of another format."""
    step: int | None
    """None where the folder is no run's."""


def restore(target: Path, *, step: int | None = None, device: torch.device | str = "cpu") -> Restored:
    """The model of a run folder (newest checkpoint, or `step`), of a checkpoint folder inside one, or of a folder in
    another format that harness.convert reads.

    Reads the master weights only. Raises HarnessError where there is no such model, it is damaged, or has no tokenizer.
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
    model = build_decoder(source.section, seed=0, device=device)
    placements = model.placements()
    source.read(
        [
            Fragment.whole(name, "master", weight.detach()[: placements[name].shape[0]])
            for name, weight in model.named_parameters()
        ]
    )
    if isinstance(source, RunSource):
        return Restored(model.eval(), tokenizer, source.run_folder, source.step)
    return Restored(model.eval(), tokenizer, target, None)
