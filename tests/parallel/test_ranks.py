"""The parts that many ranks share, on real processes: rank_checks.py has the checks, one launch a world size."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.parallel.rank_checks import CHECKS

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="stages 1 to 3 need the extra `zero`")


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_ranks(world_size: int) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("rank_checks.py")), *CHECKS],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-6000:]}"
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("passed")] == list(CHECKS)
