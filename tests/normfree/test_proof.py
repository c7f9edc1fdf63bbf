"""What a proof says of what was measured, and the verb's refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.config import ConfigError, HarnessError
from harness.normfree import NormFreeProof
from harness.normfree.exactness import Gap
from harness.normfree.quality import Quality
from harness.remove_norms import prepared_settings, remove_norms
from harness.train import train
from tests.normfree.small_removal import small_removal

SOME = Quality(2.0, 1.9, 8.0, 9.0, 2.1, 0.01, 1000)
GOOD = NormFreeProof(
    folded_fp64=Gap(1e-14, 1e-15, 64, 64),
    folded_fp32=Gap(1e-5, 5e-7, 64, 64),
    frozen_fp32=Gap(1e-5, 5e-7, 64, 64),
    loaded=Gap(1e-5, 5e-7, 64, 64),
    superposition=1e-6,
    superposition_with_norms=3.0,
    attribution=1e-7,
    attribution_with_norms=0.5,
    norm_operations=[],
    norm_operations_before=["aten.rsqrt.default"],
    sites={"final": {"frozen": 2.0, "ordinary": 2.0, "others": 2.2, "ratio": 1.1}},
    sites_before={"final": {"frozen": None, "ordinary": 2.0, "others": 20.0, "ratio": 10.0}},
    quality={name: {"validation": SOME, "rare bytes": SOME} for name in ("original", "plain", "norm-free")},
    missing_bytes=0,
    freezing_cost=0.8,
    gaps={"plain": {"nats": 0.02, "standard_error": 0.001}},
)


def test_a_good_proof_holds_and_says_all() -> None:
    assert GOOD.holds
    assert GOOD.gaps_are_results
    text = "\n".join(GOOD.lines())
    for said in (
        "with norms: 3.00",
        "none (frozen: aten.rsqrt.default)",
        "norm-free less plain: +0.0200 ± 0.0010",
        "holds",
    ):
        assert said in text
    assert "no result" not in text
    assert json.loads(json.dumps(GOOD.as_json(), allow_nan=False))["quality"]["plain"]["validation"]["p999"] == 8.0


@pytest.mark.parametrize(
    ("changes", "failure"),
    [
        ({"folded_fp64": Gap(1.0, 1e-11, 64, 64)}, "folded against frozen, float64: error 1e-11, more than 1e-12"),
        ({"folded_fp32": Gap(1.0, 1e-4, 64, 64)}, "folded as saved against frozen: error 0.0001"),
        ({"folded_fp32": Gap(1.0, 1e-7, 63, 64)}, "folded: 1 of 64 likeliest tokens are others"),
        ({"loaded": Gap(1e7, 1e6, 2, 64)}, "loaded in transformers against frozen: error 1e+06"),
        ({"superposition": 0.3}, "superposition: error 0.3"),
        ({"superposition": float("nan")}, "superposition: error nan"),
        ({"attribution": 0.1}, "direct logit attribution: error 0.1"),
        ({"norm_operations": ["aten.rsqrt.default"]}, "the exported graph has aten.rsqrt.default"),
        ({"norm_operations_before": []}, "the search for norm operations finds none in the frozen model either"),
    ],
)
def test_a_bad_one_says_what_does_not_hold(changes: dict[str, Any], failure: str) -> None:
    proof = replace(GOOD, **changes)
    assert not proof.holds
    assert any(line.startswith(failure) for line in proof.failures), proof.failures
    assert "THE PROOF FAILS:" in proof.lines()


def test_what_was_not_measured_is_said_and_fails_nothing() -> None:
    proof = replace(GOOD, loaded="not measured: transformers is not installed")
    assert proof.holds
    assert any("not measured: transformers is not installed" in line for line in proof.lines())


@pytest.mark.parametrize(("cost", "why"), [(0.19, "that is less than 0.2"), (None, "no original to freeze")])
def test_a_gap_is_no_result_where_little_was_to_remove(cost: float | None, why: str) -> None:
    proof = replace(GOOD, freezing_cost=cost)
    assert proof.holds
    assert not proof.gaps_are_results
    assert f"these gaps are no result: {why}, so little may have been there to remove" in proof.lines()


def test_refusals_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.init_from: null, so there is no model to take norms from"):
        remove_norms(small_removal(tmp_path))
    source = train(small_removal(tmp_path, norm_removal={"enabled": False}, run={"name": "source"})).folder
    begins = {"steps": 14, "global_batch_size": 8, "init_from": str(source)}
    control = {"control": "plain", "match": str(tmp_path / "absent")}
    with pytest.raises(ConfigError, match=r"match: .*absent has no good checkpoint"):
        prepared_settings(small_removal(tmp_path, norm_removal=control, train=begins))
    removal = small_removal(tmp_path, run={"name": "removal"}, train=begins)
    early = removal.model_copy(update={"train": removal.train.model_copy(update={"steps": 12})})
    run = train(early).folder
    matched = {"control": "plain", "match": str(run)}
    assert prepared_settings(small_removal(tmp_path, norm_removal=matched, train=begins)).train.steps == 12
    odd = {**begins, "global_batch_size": 10, "micro_batch_size": 5}
    with pytest.raises(ConfigError, match=r"consumed 96 samples, no multiple of train\.global_batch_size 10"):
        prepared_settings(small_removal(tmp_path, norm_removal=matched, train=odd))
    # A model that still has norms is not begun with, nor exported, as if it had none.
    begun = {**begins, "init_from": str(run)}
    assert removal.norm_removal.enabled
    train(removal)
    with pytest.raises(HarnessError, match="fold"):
        train(small_removal(tmp_path, norm_removal={"enabled": False}, run={"name": "after"}, train=begun))
