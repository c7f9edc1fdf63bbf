"""`harness select` on a real SLURM: arrays of datatrove's tasks choose what one process chooses."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.launch import cluster as slurm
from tests.launch.jobs import environment
from tests.small_run import WORDS

pytest.importorskip("datatrove")


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm.Cluster]:
    reason = slurm.why_not()
    if reason is not None:
        pytest.skip(reason)
    with slurm.Cluster() as cluster:
        yield cluster


def write_pool(folder: Path) -> Path:
    """Four shards (small neighbours of one format would be one), and a configuration that chooses from them."""
    generator = random.Random()
    for shard in range(4):
        texts = [" ".join(generator.choices(WORDS, k=generator.randint(5, 200))) for _ in range(100)]
        if shard % 2:
            pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / f"{shard}.parquet")
        else:
            (folder / f"{shard}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "target.txt").write_text("\n\n".join(" ".join(generator.choices(WORDS, k=50)) for _ in range(20)))
    values: dict[str, Any] = {
        "pool": {"source": [f"{folder}/[0-3].*"]},
        "targets": [{"name": "words", "source": [str(folder / "target.txt")], "separator": "\n\n"}],
        "budget": {"documents": 40},
        "racing": {"audited_documents": 64},
        "workers": 1,
    }
    file = folder / "select.yaml"
    file.write_text(json.dumps(values))  # JSON is YAML
    return file


def select(file: Path, name: str, env: dict[str, str], *overrides: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "harness", "select", str(file), f"output.folder={file.parent / name}", *overrides]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr


def test_arrays_choose_what_one_process_chooses(cluster: slurm.Cluster, tmp_path: Path) -> None:
    file = write_pool(tmp_path)
    on_cluster = {**environment(), **cluster.configuration}
    status, said = select(file, "alone", on_cluster)
    assert status == 0, said
    engine = (
        "distributed.engine=slurm", "distributed.partition=main", "distributed.tasks=3", "distributed.time=00:05:00",
        "distributed.options={cpus_per_task: 1, mem_per_cpu_gb: 1}",
    )  # fmt: skip
    status, said = select(file, "array", on_cluster, *engine)
    assert status == 0, said
    for place in sorted((tmp_path / "alone" / "chosen").iterdir()):
        assert (tmp_path / "array" / "chosen" / place.name).read_bytes() == place.read_bytes()
    logs = sorted(folder.name for folder in (tmp_path / "array" / "work" / "logs").iterdir())
    assert logs[0] == "final-3"
    assert logs[1] == "measure-3"
