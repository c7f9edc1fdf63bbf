"""The dry run's bytes against real engines on two ranks, and its estimates against what torch allocates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.config import plain
from harness.plan import DryRun, lay_out
from harness.plan.activations import kept_terms
from harness.settings import Settings
from tests.plan.held import build, forward_bytes, peak
from tests.plan.settings import settings_of

ROOT = Path(__file__).parents[2]
BESIDE = 0.05
"""Share of positions, rotation tables and the like, which the estimate leaves out."""
SMALL = {"bucket_elements": 5_000, "keep_whole_below": 35, "live_elements": 1, "reuse_distance": 0}
STATES = {
    f"stage {stage} {precision}": settings_of(
        parallel={"device": "cpu", "zero_stage": stage, "zero": SMALL},
        train={"steps": 4, "global_batch_size": 8, "micro_batch_size": 1, "precision": precision},
    )
    for stage, precision in product(range(4), ("fp32", "bf16"))
}
WIDE = {"hidden_size": 64, "heads": 8, "kv_heads": 4, "head_size": None, "mlp_size": 160}


def forward_settings(layers: int, recompute: str, parallel: dict[str, Any], **model: Any) -> Settings:
    return settings_of(
        parallel={"device": "cpu", **parallel},
        model={**WIDE, "layers": layers, **{k: v for k, v in model.items() if k not in ("precision", "masking")}},
        train={
            "recompute": recompute,
            "micro_batch_size": 2,
            "precision": model.get("precision", "fp32"),
        },
        data={"sequence_length": 64, "document_masking": model.get("masking", False)},
    )


DIVIDED = {
    f"recompute {recompute}, sequence parallel {split}": [
        forward_settings(layers, recompute, {"tensor": 2, "sequence_parallel": split}) for layers in (1, 3)
    ]
    for recompute, split in product(("none", "selective", "full"), (False, True))
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, int]]]:
    """By rank and job, from one start of two processes."""
    pytest.importorskip("deepspeed", reason="ZeRO stages 1 to 3 need the extra `zero`")
    folder = tmp_path_factory.mktemp("held")
    jobs = [{"name": name, "what": "state", "settings": plain(settings)} for name, settings in STATES.items()]
    for name, pair in DIVIDED.items():
        for settings in pair:
            label = f"{name}, {settings.model.layers} layers"
            jobs.append({"name": label, "what": "forward", "settings": plain(settings)})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(Path(__file__).with_name("held.py")), str(folder / "jobs.json"), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def predicted(settings: Settings, rank: int) -> DryRun:
    section = settings.dry_run.model_copy(update={"processes": 2, "rank": rank})
    return lay_out(settings.model_copy(update={"dry_run": section}))


@pytest.mark.parametrize("name", STATES)
def test_state_is_what_engines_hold(name: str, measured: list[dict[str, dict[str, int]]]) -> None:
    settings = STATES[name]
    stage = settings.parallel.zero_stage
    for rank in (0, 1):
        held = measured[rank][name]
        parts = [part for part in predicted(settings, rank).state if "gathered" not in part.remark]
        for kind in ("weights", "masters", "moments"):
            assert sum(part.bytes for part in parts if part.kind == kind) == held[kind], f"{kind} of rank {rank}"
        # Stage 2 gives its buffers back after each backward pass.
        lasting = sum(part.bytes for part in parts if part.kind != "buffers" or stage != 2)
        # What is left: the batch, the optimizer's counts, DeepSpeed's flags.
        assert lasting <= held["all"] <= lasting + 2000, f"rank {rank}"


@pytest.mark.parametrize("name", DIVIDED)
def test_activations_of_divided_blocks(name: str, measured: list[dict[str, dict[str, int]]]) -> None:
    few, many = DIVIDED[name]
    for rank in (0, 1):
        sizes = [measured[rank][f"{name}, {settings.model.layers} layers"]["forward"] for settings in (few, many)]
        work = predicted(many, rank).work
        assert sum(kept_terms(work).values()) * work.tokens == (sizes[1] - sizes[0]) / 2


@pytest.mark.parametrize(
    "model",
    [
        {"family": "gpt2", "kv_heads": 8},
        {"family": "gpt2", "precision": "bf16", "masking": True},
        {"family": "gpt2", "dropout": 0.1},
        {"family": "gpt2", "qk_norm": True},
        {"family": "llama"},
        {"family": "llama", "precision": "bf16"},
        {"family": "llama", "qk_norm": True, "masking": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_activations_of_whole_blocks(model: dict[str, Any], recompute: str) -> None:
    few, many = (forward_settings(layers, recompute, {}, **model) for layers in (1, 3))
    run, whole = lay_out(many), forward_bytes(many)
    assert sum(kept_terms(run.work).values()) * run.work.tokens == (whole - forward_bytes(few)) / 2
    assert run.activation_bytes == pytest.approx(whole, rel=BESIDE)


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_the_loss_at_its_peak(softcap: float | None) -> None:
    settings = settings_of(
        model={"vocab_size": 5003, "logit_softcap": softcap, "hidden_size": 60, "max_positions": None},
        train={"micro_batch_size": 8},
        data={"sequence_length": 256},
    )
    model, tokens = build(settings), torch.randint(5003, (8, 256))
    hidden = torch.randn(8, 256, 60, requires_grad=True)
    most = peak(lambda: model.head(hidden, tokens))
    assert lay_out(settings).loss_bytes == pytest.approx(most, rel=0.02)
