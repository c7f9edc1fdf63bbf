"""`harness convert`: a model from one format into another, tensor by tensor."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness import __version__
from harness.checkpoint import CannotWriteError
from harness.config import HarnessError
from harness.model import ModelSection, count_parameters

from .formats import FORMATS, Format, open_source
from .proof import Method, Proof, prove
from .records import RECORD, write_json
from .source import ModelSource, refuse_frozen
from .staging import check_free, staged

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SPARE_BYTES = 64 << 20
"""For what is not weights: tokenizer, manifests."""


@dataclass(frozen=True)
class Conversion:
    """What was done. `record` is what stands in the target's conversion.json."""

    target: Path
    record: dict[str, Any]
    proof: Proof | None
    """None where it was not asked for."""

    def lines(self) -> list[str]:
        """The conversion as it is printed."""
        source, weights = self.record["source"], self.record["weights"]
        size = sum(file["bytes"] for file in self.record["files"].values())
        head = (
            f"{source['path']} ({source['format']}) to {self.target} ({self.record['target']['format']}): "
            f"{weights['parameters']:,} parameters in {weights['dtype']}, {size / 1e6:,.1f} MB"
        )
        proof = self.proof.lines() if self.proof is not None else [f"not proven: {self.record['proof']}"]
        told = source.get("model_section")
        return [head, *proof, *([] if told is None else [f"the source's model section: {told}"])]


def convert(
    source: Path | ModelSource,
    target: Path,
    *,
    to: str | None = None,
    step: int | None = None,
    dtype: str | None = None,
    proof: Method | None = "auto",
    section: ModelSection | None = None,
) -> Conversion:
    """Write the model of `source` into the new folder `target`, prove it, and only then give the folder its name.

    source: a folder, or a source that is open already, without `step` and `section` then.
    to: "harness", "huggingface", ...; None: "huggingface" for a run of ours, "harness" for anything else.
    step: which checkpoint of a run; None: the newest. dtype: of the target's weights, "float32", "bfloat16" or
    "float16"; None: float32, which every source fits into. proof: None for none, which the target then says. section:
    what the source's model is, where the source does not say it (Megatron-core's).
    Raises HarnessError, naming file, key or tensor, before anything is written or with nothing left behind.
    """
    check_free(target)
    if isinstance(source, ModelSource) and (step is not None or section is not None):
        raise ValueError("step and section choose what a folder is opened as; this source is open already")
    opened = source if isinstance(source, ModelSource) else open_source(source, step=step, section=section)
    refuse_frozen(opened)
    chosen = _choose(to, opened)
    if proof == "transformers" and "Hugging Face" not in (opened.format, chosen.name):
        raise HarnessError("--proof transformers: neither side is a Hugging Face folder; leave it out")
    kept = torch.float32 if dtype is None else DTYPES[dtype]
    problems = opened.verify()
    if problems:
        raise HarnessError("\n".join(problems))
    tokenizer, parameters = opened.tokenizer, count_parameters(opened.section).total
    with staged(target) as folder:
        _check_room(folder, target, parameters * kept.itemsize)
        try:
            files = chosen.write(folder, opened, kept)
        except (OSError, CannotWriteError) as error:
            cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
            reason = cause.strerror if isinstance(cause, OSError) else None
            raise HarnessError(f"{target}: cannot be written: {reason or cause}; nothing is left of it") from None
        proven = None if proof is None else prove(opened, open_source(folder), proof)
        record = {
            "harness": __version__,
            "source": opened.details,
            "target": {"format": chosen.name},
            "weights": {"parameters": parameters, "dtype": str(kept).removeprefix("torch.")},
            "tokenizer": None if tokenizer is None else tokenizer.fingerprint,
            "files": {name: file.model_dump() for name, file in files.items()},
            "proof": "none was asked for (--no-proof)" if proven is None else proven.as_json(),
        }
        write_json(folder / RECORD, record)
    return Conversion(target, record, proven)


def _choose(to: str | None, source: ModelSource) -> Format:
    key = to if to is not None else ("huggingface" if source.format == "harness" else "harness")
    found = {each.key: each for each in FORMATS}
    if key not in found:
        raise HarnessError(f"--to {key}: is none of {', '.join(found)}")
    return found[key]


def _check_room(folder: Path, target: Path, weights: int) -> None:
    free, needed = shutil.disk_usage(folder).free, weights + _SPARE_BYTES
    if free < needed:
        raise HarnessError(
            f"{target}: {needed / 1e6:,.1f} MB are needed there and {free / 1e6:,.1f} MB are free; make room, or "
            f"choose another disk"
        )
