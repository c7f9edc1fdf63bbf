"""Seeds and devices."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from harness.config import HarnessError
from harness.parallel import ParallelLayout, ParallelSection, derive_seed, memory_bytes, peak_flops


def test_seeds_differ_by_every_part_and_not_by_process() -> None:
    parts = [(1, "weights", "a"), (2, "weights", "a"), (1, "step", "a"), (1, "weights", "b"), (1, "weightsa", "")]
    seeds = [derive_seed(*each) for each in parts]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    program = f"from harness.parallel import derive_seed; print([derive_seed(*each) for each in {parts}])"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(seeds)


def test_a_step_draws_the_same_again() -> None:
    with ParallelLayout(ParallelSection(device="cpu")) as layout:
        draws = []
        for step in (1, 2, 1):
            layout.seed_everything(5, "step", step)
            draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])


def test_processes_that_do_not_divide_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(HarnessError, match=r"^parallel.tensor: a job of size 4 does not divide into groups of 3"):
        ParallelLayout(ParallelSection(device="cpu", tensor=3))
    with pytest.raises(ValueError, match="sequence_parallel divides among tensor-parallel ranks"):
        ParallelSection(device="cpu", sequence_parallel=True)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with (
        pytest.raises(HarnessError, match=r"^4 processes need MASTER_ADDR and MASTER_PORT"),
        ParallelLayout(ParallelSection(device="cpu", tensor=2)),
    ):
        pass
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(HarnessError, match="RANK 4 with WORLD_SIZE 4"):
        ParallelLayout(ParallelSection(device="cpu"))


def test_memory_is_this_process_own_and_a_maximum() -> None:
    """Not inherited from a parent with a larger one, and not lowered by what is freed."""
    held = torch.ones(100 * 2**20 // 4)
    program = (
        "import torch; from harness.parallel import memory_bytes; cpu = torch.device('cpu'); a = memory_bytes(cpu); "
        "x = torch.ones(50 * 2**20); b = memory_bytes(cpu); del x; print(a, b, memory_bytes(cpu))"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    before, most, after = map(int, printed.split())
    assert 190 * 2**20 < most - before < 230 * 2**20
    assert after > most - 2**20, "the kernel counts pages in batches"
    assert held.sum() > 0
    assert memory_bytes(torch.device("cpu")) > 100 * 2**20


def test_the_measured_peak_is_a_rate_of_this_machine() -> None:
    peak = peak_flops(torch.device("cpu"), torch.float32)
    assert 1e8 < peak.flops_per_second < 1e15
    assert "measured" in peak.source
