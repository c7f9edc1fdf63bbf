"""`harness train` beside a training loop that shares nothing with it but the batches and the initial weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from harness import runs
from harness.data import TokenStream, prepare
from harness.model import build_decoder
from harness.parallel import ParallelLayout
from harness.settings import Settings
from harness.train import train
from tests.model.reference import reference_model
from tests.small_run import small_settings

FAMILIES = {
    "gpt2": {"family": "gpt2", "layers": 2, "hidden_size": 32, "heads": 2},
    "llama": {"family": "llama", "layers": 2, "hidden_size": 32, "heads": 4, "kv_heads": 2},
}


def independent_loop(settings: Settings, model: nn.Module | None = None) -> list[tuple[float, float, float]]:
    """(loss, gradient norm, learning rate) of every step, from transformers' model (the settings' own, or `model`),
    torch's AdamW and full logits."""
    options, peak, steps, warmup = settings.optimizer, settings.optimizer.learning_rate, settings.train.steps, 5
    with ParallelLayout(settings.parallel):
        prepared = prepare(settings.data)
        if model is None:
            section = settings.resolved(prepared.tokenizer.vocab_size).model
            model = reference_model(section, build_decoder(section, seed=settings.train.seed))
        model.train()
        decayed = [weight for weight in model.parameters() if weight.dim() > 1]
        plain = [weight for weight in model.parameters() if weight.dim() == 1]
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            betas=(options.beta1, options.beta2),
            eps=options.epsilon,
        )
        stream = TokenStream(prepared, settings.data, seed=settings.train.seed)
        series = []
        for step in range(1, steps + 1):
            batches = stream.read(settings.train.global_batch_size, settings.train.global_batch_size)
            tokens = torch.cat([batch.tokens for batch in batches])
            targets = torch.cat([batch.targets for batch in batches])
            assert len({int(row) for row in (targets == -100).sum(1)}) > 1 or step > 1, "rows are ragged"
            optimizer.zero_grad()
            logits = model(tokens).logits
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
            rate = peak * step / warmup
            if step > warmup:
                progress = (step - warmup) / (steps - warmup)
                rate = peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            series.append((loss.item(), norm.item(), rate))
        stream.close()
    return series


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("accumulation", [1, 4])
def test_fifty_steps_are_those_of_an_independent_loop(tmp_path: Path, family: str, accumulation: int) -> None:
    settings = small_settings(
        tmp_path,
        model=FAMILIES[family],
        data={"mask_after_end_of_text": True},
        train={"steps": 50, "global_batch_size": 8, "micro_batch_size": 8 // accumulation},
        schedule={"kind": "cosine", "warmup_steps": 5},
        optimizer={"learning_rate": 2e-3, "clip_norm": 1.6},
    )
    result = train(settings)
    metrics = runs.read(result.folder).metrics
    series = independent_loop(settings)
    assert len(metrics) == len(series) == 50
    assert series[-1][0] < 0.8 * series[0][0], "the model learns"
    assert min(norm for _, norm, _ in series) < 1.6 < max(norm for _, norm, _ in series), "clipping is on and off"
    for record, (loss, norm, rate) in zip(metrics, series, strict=True):
        assert record["loss"] == pytest.approx(loss, rel=1e-5), record["step"]
        assert record["grad_norm"] == pytest.approx(norm, rel=1e-5), record["step"]
        assert record["learning_rate"] == pytest.approx(rate, rel=1e-12), record["step"]
