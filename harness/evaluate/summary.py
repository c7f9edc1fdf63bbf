"""What a run says when it is done."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from harness.callbacks import Callback, Score, TrainerView, Validation, evaluating
from harness.data import text_bytes

from .baselines import gzip_bits_per_byte, order2_bits_per_byte
from .config import GenerateSection, SummarySection
from .generate import complete

logger = logging.getLogger("harness.summary")

BASELINE_BYTES = 64 << 20
"""Training text that the order-2 model counts, at most: 65,536 contexts are well known long before that."""


class Summary(Callback):
    """After the last step: validation, baselines, a completion, and the commands that come next; also as
    summary.json."""

    name = "summary"

    def __init__(self, section: SummarySection, validation: Validation) -> None:
        self.section, self.validation = section, validation

    def after_training(self, trainer: TrainerView) -> None:
        summary: dict[str, Any] = {"step": trainer.step}
        if self.validation.last:
            total = sum(self.validation.last.values(), Score())
            summary |= {
                "validation_loss": total.loss,
                "validation_bits_per_byte": total.bits_per_byte,
                "validation_bytes": total.bytes,
            }
        first = trainer.layout.rank == 0
        if self.section.baselines and self.validation.last and first:
            summary |= self._baselines(trainer)
        if self.section.prompt is not None:
            options = GenerateSection(prompt=self.section.prompt, max_tokens=self.section.tokens, temperature=0.5)
            with evaluating(trainer.model):
                generator = torch.Generator().manual_seed(options.seed)
                # On all ranks: where weights are divided, a forward pass takes them all.
                summary["completion"] = complete(
                    trainer.model, trainer.prepared.tokenizer, options, generator, trainer.layout.first_number
                )
        if not first:
            return
        path = trainer.run.path / "summary.json"
        path.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for line in self._lines(summary, trainer):
            logger.info(line)

    def _baselines(self, trainer: TrainerView) -> dict[str, float]:
        """On the whole validation text, which is also what a validation without a limit reads."""
        corpora = list(self.validation.last)
        held_out = [text for corpus in corpora for text in text_bytes(trainer.prepared, corpus, "validation")]
        training = [
            text
            for corpus in corpora
            for text in text_bytes(trainer.prepared, corpus, "train", BASELINE_BYTES // len(corpora))
        ]
        return {
            "order2_bits_per_byte": order2_bits_per_byte(training, held_out),
            "order2_training_bytes": sum(map(len, training)),
            "gzip_bits_per_byte": gzip_bits_per_byte(held_out),
        }

    def _lines(self, summary: dict[str, Any], trainer: TrainerView) -> list[str]:
        folder, harness = trainer.run.path, find_program("harness")
        opening = (self.section.prompt or "The").splitlines()[0]
        lines = ["", f"done: {trainer.step} steps"]
        if "validation_loss" in summary:
            lines += [
                f"  validation loss      {summary['validation_loss']:.4f} nats a token",
                f"  bits per byte        {summary['validation_bits_per_byte']:.3f}   "
                f"(held-out text, {summary['validation_bytes']:,} bytes)",
            ]
        if "order2_bits_per_byte" in summary:
            lines += [
                f"    order-2 byte model {summary['order2_bits_per_byte']:.3f}   "
                f"(counted on {summary['order2_training_bytes']:,} bytes of training text)",
                f"    gzip -9            {summary['gzip_bits_per_byte']:.3f}",
            ]
        if "completion" in summary:
            lines.append("  a completion (temperature 0.5); the prompt ends at the bar:")
            text = f"{self.section.prompt}|{summary['completion']}"
            lines += [f"    {line}" for line in text.splitlines()]
        view = folder / "tensorboard"
        many = trainer.layout.world_size > 1
        start = "the same launcher, with" if many else f"{harness} train"
        return [
            *lines,
            "next:",
            *([f"  {find_program('tensorboard')} --logdir {quoted(view)}"] if view.exists() else []),
            f"  {harness} generate {quoted(folder)} {shlex.quote('generate.prompt=' + opening)}",
            f"  {harness} evaluate {quoted(folder)}",
            f"  {start} {quoted(folder)} train.steps={2 * trainer.step}   # resumes, and goes on",
        ]


def find_program(name: str) -> str:
    """How a shell here starts a program of this environment: its name if it is on the path, else where it lies."""
    if shutil.which(name) is not None:
        return name
    beside = Path(sys.executable).with_name(name)
    if not beside.exists():
        return name
    inside = beside.is_relative_to(Path.cwd())
    return quoted(beside.relative_to(Path.cwd()) if inside else beside)


def quoted(path: Path) -> str:
    """A path as a shell takes it."""
    return shlex.quote(str(path))
