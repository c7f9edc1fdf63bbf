"""One folder of prepared data, and the series that the other launches are compared with."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.jobs import LOCAL, START_SECONDS, STEPS, Quickstart, Series


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Quickstart]:
    """Ends every process that was started with its environment."""
    job = Quickstart(tmp_path_factory.mktemp("quickstart"))
    yield job
    job.kill()


@pytest.fixture(scope="session")
def one_process(quickstart: Quickstart) -> Series:
    """The truth: no launcher, no process group to speak of. Prepares the data that the others find."""
    command = [sys.executable, "-m", "harness", "train", *quickstart.arguments("one-process")]
    quickstart.run(command, START_SECONDS)
    series = quickstart.series("one-process")
    assert list(series) == list(range(1, STEPS + 1))
    assert series[STEPS][0] < 0.9 * series[1][0]  # it learns, so that equal series are no accident
    return series


@pytest.fixture(scope="session")
def one_host(quickstart: Quickstart, one_process: Series) -> Series:
    """Four processes on this machine, by launch/local.sh."""
    assert Path(quickstart.folder / "data").is_dir()
    command = [str(LOCAL), *quickstart.arguments("one-host")]
    quickstart.run(command, START_SECONDS, NPROC_PER_NODE="4")
    return quickstart.series("one-host")
