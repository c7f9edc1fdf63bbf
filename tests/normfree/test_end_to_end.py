"""From new weights to a proven model without norms: pretrain, remove, fold, export, prove, on real text (the Python
library's own sources), with an outlier injected at first positions, since a model so small grows none by itself."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from harness import runs
from harness.cli import main
from harness.normfree import prove
from harness.remove_norms import remove_norms
from harness.settings import Settings
from harness.train import train
from tests.small_run import small_settings

MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2", "layers": 2, "hidden_size": 48, "heads": 4, "max_positions": 64},
    "llama": {"family": "llama", "layers": 2, "hidden_size": 48, "heads": 4, "kv_heads": 2, "max_positions": 64},
}


def settings_for(folder: Path, family: str, **sections: dict[str, Any]) -> Settings:
    stdlib = Path(sysconfig.get_path("stdlib"))
    names = ("argparse", "ast", "inspect", "pathlib", "pydoc", "subprocess", "tarfile", "typing", "zipfile", "turtle")
    defaults: dict[str, dict[str, Any]] = {
        "data": {
            "corpora": [
                {"name": "stdlib", "source": [str(stdlib / f"{name}.py") for name in names], "suffixes": [".py"]}
            ],
            "tokenizer": {"kind": "bytes"},
            "sequence_length": 64,
            "validation_share": 0.2,
            "test_share": 0.0,
        },
        "model": MODELS[family],
        "validation": {"every_steps": None, "samples": 32, "batch_size": 16},
    }
    merged = {name: {**defaults.get(name, {}), **sections.get(name, {})} for name in {**defaults, **sections}}
    return small_settings(folder, **merged)


INJECTION = {"weight": 1.0, "sigma": 32.0, "ordinary_sigma": 2.0, "from_layer": 1}


def pretrain(folder: Path, family: str) -> Path:
    settings = settings_for(
        folder,
        family,
        run={"name": "source"},
        train={"steps": 300, "global_batch_size": 16, "micro_batch_size": 16},
        optimizer={"learning_rate": 3e-3},
        schedule={"kind": "wsd", "warmup_steps": 20, "final_fraction": 0.0},
        norm_removal={"enabled": True, "control": "aux", "injection": INJECTION},
    )
    return train(settings).folder


def removal_of(folder: Path, source: Path, family: str, **removal: Any) -> Settings:
    return settings_for(
        folder,
        family,
        run={"name": removal.pop("name")},
        train={
            "steps": removal.pop("steps", 120),
            "global_batch_size": 16,
            "micro_batch_size": 16,
            "init_from": str(source),
        },
        optimizer={"learning_rate": 1e-3},
        schedule={"kind": "cosine", "warmup_steps": 5, "final_fraction": 0.1},
        checkpoint={"every_steps": 40, "keep_last": 2},
        norm_removal={"enabled": True, "auxiliary": {"weight": 0.1, "relative": True}, **removal},
    )


@pytest.mark.parametrize("family", MODELS)
def test_from_pretraining_to_a_proven_model_without_norms(tmp_path: Path, family: str) -> None:
    source = pretrain(tmp_path, family)
    ratio = [record["final_sigma_ratio"] for record in runs.read(source).metrics][-20:]
    assert sum(ratio) / 20 > 5, "sigma at first positions is at least five times the rest"
    adaptive = {"start": 8, "gap": 2, "tolerance": 0.1, "patience": 8}
    settings = removal_of(
        tmp_path, source, family, name="removal", schedule="adaptive", adaptive=adaptive, ramp_steps=3
    )
    assert remove_norms(settings) == 0
    run = settings.run.path
    events = runs.read(run).events
    gone = [event["site"] for event in events if event["event"] == "norm_removed"]
    assert {*gone} == {f"layers.{layer}.{kind}" for layer in (0, 1) for kind in ("mlp", "qk", "v")} | {"final"}

    proof = json.loads((run / "norm_free" / "proof.json").read_text())
    assert proof["holds"], proof["failures"]
    assert proof["superposition"] <= 1e-5
    assert proof["superposition_with_norms"] > 0.5
    assert proof["loaded"]["largest"] <= 1e-4
    assert proof["loaded"]["same_top"] == proof["loaded"]["tokens"] > 1000
    assert proof["attribution"] < 1e-4 < 0.02 < proof["attribution_with_norms"]
    assert max(site["ratio"] for site in proof["sites_before"].values()) >= 5
    assert all(site["frozen"] > 0 for site in proof["sites"].values())
    assert proof["norm_operations"] == []
    assert (
        proof["quality"]["norm-free"]["validation"]["mean"] < proof["quality"]["original"]["validation"]["mean"] + 0.5
    )
    if family == "gpt2":
        reset_epsilon(run, settings)
    # The command line reads what came out as it reads any model.
    assert main(["evaluate", str(run / "norm_free"), "--data", str(run / "config.yaml")]) == 0


def reset_epsilon(run: Path, settings: Settings) -> None:
    """A loader that takes its own epsilon makes logits of 1e7 or so: the proof says it."""
    config = run / "huggingface" / "config.json"
    values = json.loads(config.read_text())
    assert values["layer_norm_epsilon"] == 2.0**60
    config.write_text(json.dumps(values | {"layer_norm_epsilon": 1e-5}))
    proof = prove(run, folded=run / "norm_free", huggingface=run / "huggingface", data=settings.data, windows=4)
    assert not proof.holds
    assert any(line.startswith("loaded in transformers against frozen: error") for line in proof.failures)
    assert proof.freezing_cost is None
    assert not proof.gaps_are_results
    assert "THE PROOF FAILS:" in proof.lines()
