"""The vocabulary shared among real processes: one launch per world size, each topic a test of its report.

vocab_parallel_ranks.py says what a rank compares with what, vocab_parallel_topics.py which cases there are.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from tests.kernels.vocab_parallel_ranks import run_rank
from tests.kernels.vocab_parallel_topics import TOPICS

LAUNCH_SECONDS = 180
LAUNCHED: dict[int, tuple[int, list[dict]]] = {}


@pytest.fixture(scope="module", params=[2, 3, 4], ids=lambda world: f"world_{world}")
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[dict]]:
    """The seed, and what each rank of a world says is wrong by topic.

    A rank that raises ends the launch, with its traceback; one that waits for others in vain raises. Kept here, as
    pytest-xdist may set a fixture up twice.
    """
    world: int = request.param
    if world not in LAUNCHED:
        LAUNCHED[world] = launch(world, tmp_path_factory)
    return LAUNCHED[world]


def launch(world: int, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[dict]]:
    folder = tmp_path_factory.mktemp(f"world{world}")
    seed = torch.seed() % 2**31
    # One process imports torch, and all ranks are forked from it before it has run anything.
    mp.get_context("forkserver").set_forkserver_preload(["torch", "harness.kernels"])
    launched = mp.start_processes(
        run_rank, (world, str(folder), seed), nprocs=world, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + LAUNCH_SECONDS
    try:
        while not launched.join(timeout=1):
            if time.monotonic() > deadline:
                pytest.fail(f"{world} ranks, seed {seed}: not done after {LAUNCH_SECONDS} s")
    finally:
        for process in launched.processes:
            process.kill()
            process.join()
    return seed, [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.parametrize("topic", TOPICS)
def test_shared_vocabulary(reports: tuple[int, list[dict]], topic: str) -> None:
    seed, by_rank = reports
    if len(by_rank) > 2 and topic.startswith("kernels_"):
        pytest.skip("the interpreter is slow: kernels on two ranks")
    wrong = [line for report in by_rank for line in report[topic]]
    assert not wrong, f"seed {seed}, {len(wrong)} failures:\n" + "\n".join(wrong[:10])
