"""A checkpoint's loss on held-out text, and every token's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from harness.callbacks import Score, score
from harness.config import HarnessError
from harness.data import DataSection, EvaluationWindows, prepare_for_training
from harness.kernels import LossOutput
from harness.parallel import ParallelLayout, ParallelSection

from .config import EvaluateSection
from .restore import restore


def evaluate(target: Path, section: EvaluateSection, data: DataSection, parallel: ParallelSection) -> dict[str, Any]:
    """Loss and entropy (nats a token), bits per byte, accuracy and counts, in all and by corpus.

    The data are those of `data`, which must have been tokenized with the run's tokenizer.
    """
    if section.per_token is not None and not Path(section.per_token).resolve().parent.is_dir():
        raise HarnessError(f"evaluate.per_token: {section.per_token} lies in no folder that exists; make it first")
    with ParallelLayout(parallel.on_one_process()) as layout:
        restored = restore(target, step=section.step, device=layout.device)
        prepared = prepare_for_training(data)
        if prepared.tokenizer.fingerprint != restored.tokenizer.fingerprint:
            raise HarnessError(f"{prepared.folder}: tokenized with another tokenizer than {restored.folder} has")
        windows = EvaluationWindows(prepared, data, section.split, section.batch_size, limit_samples=section.samples)
        parts: dict[str, list[np.ndarray]] = {}

        def collect(corpus: str, targets: Tensor, output: LossOutput, valid: Tensor) -> None:
            columns = {"tokens": targets, "losses": output.loss, "entropies": output.entropy, "correct": output.correct}
            for name, values in columns.items():
                assert values is not None
                parts.setdefault(f"{corpus}/{name}", []).append(values[valid].cpu().numpy())

        wanted = section.per_token is not None
        table = restored.tokenizer.token_bytes()
        scores = score(restored.model, windows, table, layout.device, collect if wanted else None)
        if section.per_token is not None:
            arrays: dict[str, Any] = {name: np.concatenate(pieces) for name, pieces in parts.items()}
            np.savez_compressed(section.per_token, **arrays)
    total = sum(scores.values(), Score())
    return {
        "run": str(restored.folder),
        "step": restored.step,
        "split": section.split,
        **_columns(total),
        "corpora": {corpus: _columns(result) for corpus, result in scores.items()},
    }


def _columns(result: Score) -> dict[str, float]:
    return {
        "loss": result.loss,
        "bits_per_byte": result.bits_per_byte,
        "accuracy": result.accuracy,
        "entropy": result.mean_entropy,
        "tokens": result.tokens,
        "bytes": result.bytes,
    }
