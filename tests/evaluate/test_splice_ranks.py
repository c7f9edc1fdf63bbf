"""A splice on four ranks is that of one: three ways to divide them, with and without sequence parallelism."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.config import plain
from harness.data import prepare
from harness.parallel import ParallelLayout, ParallelSection
from tests.evaluate.splice_worker import ARMS, measure, model_of
from tests.small_run import small_settings

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="tensor parallelism needs megatron-core")

LAYOUTS = [(2, False), (2, True), (1, False), (4, True)]
CASES: list[dict[str, Any]] = [
    {
        "name": f"{family}-tp{tensor}-{'sp' if split else 'whole'}",
        "family": family,
        "tensor": tensor,
        "sequence_parallel": split,
    }
    for family in ("gpt2", "llama")
    for tensor, split in LAYOUTS
]


def test_four_ranks_find_what_one_finds(tmp_path: Path) -> None:
    data = small_settings(tmp_path, data={"sequence_length": 24, "mask_after_end_of_text": True}).data
    prepared = prepare(data)
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"data": plain(data), "cases": CASES, "folder": str(tmp_path)}))
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4",
         str(Path(__file__).with_name("splice_worker.py")), str(job)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        cwd=root, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-6000:]}"
    alone = {}
    with ParallelLayout(ParallelSection(device="cpu")) as layout:
        for family in ("gpt2", "llama"):
            alone[family] = measure(layout, model_of(family, prepared.tokenizer.vocab_size), data, prepared)
    for case in CASES:
        name = case["name"]
        every = json.loads((tmp_path / f"{name}.json").read_text())
        one, one_means = alone[case["family"]]
        expected, found = one.as_json(), every[0]["result"]
        assert all(each["result"] == found for each in every), f"{name}: ranks differ"
        for key in ("tokens", "windows", "skip_first", "skip_last"):
            assert found[key] == expected[key], (name, key)
        assert found["arms"]["identity"]["delta"] == found["arms"]["identity"]["standard_error"] == 0.0
        assert list(found["arms"]) == list(expected["arms"])
        assert len(found["arms"]) == 3 * len(ARMS) + 1
        for arm, wanted in expected["arms"].items():
            assert arm == "identity" or abs(wanted["delta"]) > 1e-3, "what changes nothing proves nothing"
            for key in ("loss", "delta", "standard_error", "token_standard_error"):
                assert found["arms"][arm][key] == pytest.approx(wanted[key], rel=1e-4, abs=3e-6), (name, arm, key)
            for kind, share in wanted["recovered"].items():
                expected_share = None if share is None else pytest.approx(share, rel=1e-3, abs=1e-4)
                assert found["arms"][arm]["recovered"][kind] == expected_share, (name, arm)
        for site, mean in one_means.items():
            parts = [torch.tensor(each["means"][site], dtype=torch.float64) for each in every[: case["tensor"]]]
            whole = torch.cat(parts) if site[-1] in "qkv" else parts[0]
            torch.testing.assert_close(
                whole, mean, rtol=1e-6, atol=1e-6, msg=lambda text, n=name, s=site: f"{n} {s}: {text}"
            )
