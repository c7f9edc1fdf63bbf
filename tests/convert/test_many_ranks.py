"""Training on from a folder that `transformers` wrote, on any layout; and checkpoints of many ranks exported."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from harness import runs
from harness.config import plain
from harness.convert import convert, open_source
from harness.settings import Settings
from harness.train import train
from tests.convert.library import library_model, save_library_model
from tests.convert.refusals import refusal
from tests.parallel.layout_table import EVERYTHING_DIVIDED, launch
from tests.small_run import small_settings
from tests.test_independent_loop import independent_loop

VOCABULARY = 261  # more than the tokenizer's 257, and a multiple of nothing
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_positions": 40,
    "n_head": 4,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
LLAMA = {"vocab_size": VOCABULARY, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64}
OURS_GPT2 = {
    "family": "gpt2", "layers": 2, "hidden_size": 48, "heads": 4, "vocab_size": VOCABULARY, "max_positions": 40,
}  # fmt: skip
OURS_LLAMA = {
    "family": "llama", "layers": 2, "hidden_size": 64, "heads": 8, "kv_heads": 4, "mlp_size": 100, "norm_epsilon": 1e-6,
    "vocab_size": VOCABULARY, "max_positions": 128,
}  # fmt: skip
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gpt2": (GPT2, OURS_GPT2),
    "gpt2-untied": ({**GPT2, "n_inner": 192, "tie_word_embeddings": False}, {**OURS_GPT2, "tied_head": False}),
    "llama-gqa": (LLAMA, OURS_LLAMA),
    "llama-gqa-tied-wide-heads": (LLAMA, {**OURS_LLAMA, "head_size": 24, "tied_head": True}),
    "qwen2": (LLAMA, {**OURS_LLAMA, "qkv_bias": True}),
}


def settings_of(folder: Path, name: str, steps: int, run: str, **parallel: Any) -> Settings:
    return small_settings(
        folder,
        run={"name": run, "folder": str(folder / "runs")},
        model=CASES[name][1],
        data={"mask_after_end_of_text": True},
        train={"steps": steps, "global_batch_size": 8, "micro_batch_size": 2, "init_from": str(folder / name)},
        schedule={"kind": "cosine", "warmup_steps": 5},
        optimizer={"learning_rate": 1e-3, "clip_norm": 3.0},
        checkpoint={"every_steps": None, "keep_last": 5},
        parallel={"device": "cpu", "zero": EVERYTHING_DIVIDED, **parallel},
    )


@pytest.mark.parametrize("name", CASES)
def test_training_goes_on_as_in_an_independent_loop(tmp_path: Path, name: str) -> None:
    save_library_model(tmp_path / name, name, **CASES[name][0])
    settings = settings_of(tmp_path, name, 12, "mine")
    result = train(settings)
    series = independent_loop(settings, AutoModelForCausalLM.from_pretrained(tmp_path / name))
    metrics = runs.read(result.folder).metrics
    assert series[-1][0] < 0.9 * series[0][0], "the model learns"
    for record, (loss, norm, _) in zip(metrics, series, strict=True):
        assert record["loss"] == pytest.approx(loss, rel=2e-5), record["step"]
        assert record["grad_norm"] == pytest.approx(norm, rel=2e-4), record["step"]


def test_bf16_begins_with_the_weights_too(tmp_path: Path) -> None:
    """Its working weights are made of the masters that were read."""
    name = "llama-gqa"
    model = library_model(name, **CASES[name][0])
    with torch.no_grad():
        model.lm_head.weight *= 6  # so that the loss is far from that of new weights
    model.save_pretrained(tmp_path / name)
    losses = {}
    for precision in ("fp32", "bf16"):
        settings = settings_of(tmp_path, name, 5, precision)
        changes = settings.train.model_copy(update={"precision": precision})
        result = train(settings.model_copy(update={"train": changes}))
        losses[precision] = runs.read(result.folder).column("loss")[0]
    assert losses["fp32"] > 8
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    name = "llama-gqa"
    save_library_model(tmp_path / name, name, **CASES[name][0])
    settings = settings_of(tmp_path, name, 5, "mine")
    wrong = settings.model_copy(
        update={"model": settings.model.model_copy(update={"kv_heads": 8, "vocab_size": 300, "norm_epsilon": 1e-5})}
    )
    said = refusal(lambda: train(wrong))
    for part in ("model.kv_heads: 4 there, 8 here", "model.vocab_size: 261 there, 300 here", "model.norm_epsilon"):
        assert part in said
    assert "layers" not in said


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="stages 1 to 3 need the extra `zero`")
def test_every_rank_reads_its_part_and_exports_are_of_no_layout(tmp_path: Path) -> None:
    layouts = {
        "llama-gqa": {"tensor": 4, "zero_stage": 3},
        "gpt2": {"tensor": 2, "zero_stage": 3, "sequence_parallel": True},
        "qwen2": {"tensor": 1, "zero_stage": 1},
    }
    jobs = []
    for name, layout in layouts.items():
        save_library_model(tmp_path / name, name, **CASES[name][0])
        train(settings_of(tmp_path, name, 6, f"{name}-one"))
        jobs.append({"settings": plain(settings_of(tmp_path, name, 6, f"{name}-many", **layout))})
    launch(4, jobs, tmp_path, worker=Path(__file__).with_name("rank_worker.py"))
    for name in layouts:
        one, many = (runs.read(tmp_path / "runs" / f"{name}-{which}") for which in ("one", "many"))
        assert many.column("loss") == pytest.approx(one.column("loss"), rel=1e-5), name
        assert many.column("grad_norm") == pytest.approx(one.column("grad_norm"), rel=1e-4), name

        convert(tmp_path / name, tmp_path / f"{name}-run")
        convert(tmp_path / f"{name}-run", tmp_path / f"{name}-from-one")
        convert(many.path, tmp_path / f"{name}-from-many", step=0)
        files = sorted((tmp_path / f"{name}-from-one").glob("*.safetensors*"))
        assert files
        for file in files:
            assert file.read_bytes() == (tmp_path / f"{name}-from-many" / file.name).read_bytes(), file.name
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-from-many").state_dict()
        assert all(torch.equal(value, loaded[key]) for key, value in theirs.items())

        whole = sum(file.stat().st_size for file in (tmp_path / name).glob("*.safetensors"))
        read = [int((many.path / f"read-{rank}").read_text()) for rank in range(4)]
        # Of the gpt2 family q, k and v lie side by side: what a rank reads of a row may reach over others' columns.
        assert max(read) < 0.5 * whole, (name, read, whole)


def test_a_run_that_was_converted_trains_on(tmp_path: Path) -> None:
    name = "gpt2"
    save_library_model(tmp_path / name, name, **CASES[name][0])
    convert(tmp_path / name, tmp_path / "converted")
    series = []
    for start in (name, "converted"):
        settings = settings_of(tmp_path, name, 5, start)
        settings = settings.model_copy(
            update={"train": settings.train.model_copy(update={"init_from": str(tmp_path / start)})}
        )
        series.append(list(runs.read(train(settings).folder).column("loss")))
    assert series[0] == series[1]
    assert open_source(tmp_path / "runs" / name).section == settings.resolved(257).model
