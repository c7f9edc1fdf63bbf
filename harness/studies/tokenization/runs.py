"""Texts, and one run on one of them."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.config import HarnessError, plain, validate
from harness.data import DataSection, Prepared, prepare_for_training
from harness.disk import write_whole
from harness.parallel import derive_seed
from harness.runs import read
from harness.settings import Settings
from harness.train import train

from ..files import claimed, locked, write_json
from .config import TokenizationStudySection


@dataclass(frozen=True)
class Cell:
    """One run."""

    source: str
    tokenizer: str
    model: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.source}-{self.tokenizer}-{self.model}-seed{self.seed}"

    def result(self, config: TokenizationStudySection) -> dict[str, Any] | None:
        """None where it is not done yet."""
        file = config.path / "results" / f"{self.name}.json"
        return json.loads(file.read_text()) if file.exists() else None


def cells(config: TokenizationStudySection) -> list[Cell]:
    """Seed after seed, so that wherever it stops all have as many."""
    return [
        Cell(source, tokenizer, model, seed)
        for seed in range(config.seeds)
        for source in config.sources
        for tokenizer in config.tokenizers
        for model in config.models
    ]


def run_cells(config: TokenizationStudySection, parent: int | None = None) -> int:
    """Do runs that nobody has; how many were done. With `parent`, ends when that process is gone."""
    done = 0
    for cell in cells(config):
        if parent is not None and os.getppid() != parent:
            return done
        with claimed(config.path / "locks" / cell.name) as mine:
            if mine and cell.result(config) is None:
                run_cell(config, cell)
                done += 1
    return done


def data_of(config: TokenizationStudySection, source: str, tokenizer: str) -> DataSection:
    """Documents are independent of each other, so any may be the validation text."""
    texts = _text_folder(config, source)
    documents = -(-config.symbols // config.document_symbols)
    values = {
        "folder": str(config.path / "prepared" / f"{source}-{tokenizer}"),
        "corpora": [{"name": "markov", "source": [str(texts / "*.txt")]}],
        "tokenizer": plain(config.tokenizers[tokenizer]),
        "sequence_length": config.sequence_length,
        "validation_share": config.validation_documents / (documents + config.validation_documents),
        "test_share": 0.0,
        "workers": 1,
    }
    return validate(DataSection, values, f"the text of {source}")


def prepare(config: TokenizationStudySection, source: str, tokenizer: str) -> Prepared:
    """The text of a source, made if it is not there, and tokenized."""
    folder = _text_folder(config, source)
    with locked(config.path / "texts" / f"{source}.lock"):
        if not (folder / "whole").exists():
            folder.mkdir(parents=True, exist_ok=True)
            count = -(-config.symbols // config.document_symbols) + config.validation_documents
            generator = np.random.default_rng(derive_seed("text", config.seed, source))
            made = config.sources[source].source().text(count, config.document_symbols, generator)
            for place, text in enumerate(made):
                write_whole(folder / f"{place:06}.txt", text.encode())
            (folder / "whole").touch()
    with locked(config.path / "prepared" / f"{source}-{tokenizer}.lock"):
        return prepare_for_training(data_of(config, source, tokenizer))


def run_cell(config: TokenizationStudySection, cell: Cell) -> dict[str, Any]:
    """Its run folder is deleted in the end: what counts is in the result."""
    started, used = time.perf_counter(), time.process_time()
    prepared = prepare(config, cell.source, cell.tokenizer)
    folder = config.path / "cells" / cell.name
    done = train(_settings(config, cell, folder))
    if done.stopped_by is not None:
        raise HarnessError(f"{cell.name}: stopped by {done.stopped_by}; the same command goes on")
    curve = [
        [record["step"], record["validation_bits_per_byte"] * float(np.log(2))]
        for record in read(folder).metrics
        if "validation_bits_per_byte" in record
    ]
    source = config.sources[cell.source].source()
    result = {
        **asdict(cell),
        "loss": curve[-1][1],
        "curve": curve,
        "entropy_rate": source.entropy_rate(),
        "unigram_loss": source.unigram_loss(),
        **token_statistics(prepared),
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - used,
    }
    write_json(config.path / "results" / f"{cell.name}.json", result)
    shutil.rmtree(folder)
    return result


def token_statistics(prepared: Prepared) -> dict[str, float]:
    """Of the training text: symbols a token, distinct tokens, and what the best model without a context loses a symbol,
    the entropy of a token over symbols a token (arXiv 2404.08335, section 3)."""
    split = prepared.split("markov", "train")
    assert split.bytes is not None  # a symbol is a byte
    counts = np.bincount(split.flat, minlength=prepared.tokenizer.vocab_size).astype(np.float64)
    counts[prepared.tokenizer.eod] = 0
    share = counts[counts > 0] / counts.sum()
    a_token = split.bytes / counts.sum()
    return {
        "symbols_a_token": float(a_token),
        "distinct_tokens": int((counts > 0).sum()),
        "token_unigram_loss": float(-(share * np.log(share)).sum() / a_token),
    }


def _text_folder(config: TokenizationStudySection, source: str) -> Path:
    return config.path / "texts" / source


def _settings(config: TokenizationStudySection, cell: Cell, folder: Path) -> Settings:
    values = {
        "run": {"name": folder.name, "folder": str(folder.parent), "tensorboard": False, "log_every_steps": 100},
        "parallel": {"device": "cpu", "threads": 1},
        "data": plain(data_of(config, cell.source, cell.tokenizer)),
        "model": config.models[cell.model],
        "optimizer": plain(config.optimizer),
        "schedule": plain(config.schedule),
        "train": {
            "steps": config.steps,
            "global_batch_size": config.sequences,
            "seed": derive_seed("tokenization", config.seed, cell.seed) % 2**31,
        },
        "validation": {"every_steps": max(config.steps // config.validations, 1), "samples": config.windows},
        "checkpoint": {"every_steps": max(config.steps // 4, 1), "keep_last": 1},
    }
    return validate(Settings, values, f"the run {cell.name}")
