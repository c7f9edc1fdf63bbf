"""What environment.json says, against the tools that know it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from harness.runs import RunFolder
from harness.runs.environment import PACKAGES, describe_environment, recorded_variables


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "--quiet")
    (folder / "code.py").write_text("x = 1\n")
    (folder / "latin.txt").write_bytes(b"caf\xe9\n")
    (folder / "binary").write_bytes(b"\0\1\2")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "one")
    return folder


def test_versions_host_and_command(tmp_path: Path) -> None:
    environment, diff = describe_environment(tmp_path)
    assert json.loads(json.dumps(environment)) == environment
    assert environment["versions"]["torch"] == importlib.metadata.version("torch")
    assert set(environment["versions"]) == set(PACKAGES)
    assert environment["python"] == platform.python_version()
    assert environment["cpu"]["cores"] == os.cpu_count()
    assert environment["cpu"]["model"]
    assert environment["memory_bytes"] > 2**28
    assert sys.orig_argv[0] in environment["command"]
    assert isinstance(environment["devices"], list)
    assert environment["git"] is None
    # Not a checkout here; but harness itself may run from one, and then that is what is told.
    assert (environment["harness_git"] is None or not environment["harness_git"]["dirty"]) <= (diff is None)


def test_nothing_heavy_is_imported_for_it(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib, harness.runs; harness.runs.environment.describe_environment(pathlib.Path('.')); "
        "print([m for m in ('megatron', 'deepspeed', 'transformers', 'tensorboard', 'triton') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert result.stdout == "[]\n"


def test_git_commit_and_applicable_diff(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = git(checkout, "rev-parse", "HEAD").strip()
    environment, diff = describe_environment(checkout)
    assert environment["git"] == {"commit": commit, "dirty": False, "untracked": []}
    assert diff is None
    (checkout / "code.py").write_text("x = 2\n")
    (checkout / "latin.txt").write_bytes(b"caf\xe9 noir\n")
    (checkout / "binary").write_bytes(b"\0\1\2\3")
    (checkout / "new.py").write_text("y = 1\n")
    monkeypatch.chdir(checkout)
    run_path = tmp_path / "run"
    with RunFolder(run_path) as run:
        run.begin("a: 1")
    written = json.loads((run_path / "environment.json").read_text())
    assert written["git"] == {"commit": commit, "dirty": True, "untracked": ["new.py"]}
    again = tmp_path / "again"
    git(tmp_path, "clone", "--quiet", str(checkout), str(again))
    git(again, "apply", str(run_path / "environment.diff"))
    assert (again / "code.py").read_text() == "x = 2\n"
    assert (again / "latin.txt").read_bytes() == b"caf\xe9 noir\n"
    assert (again / "binary").read_bytes() == b"\0\1\2\3"
    # A later start on a clean tree leaves no stale difference behind, but keeps the first one's.
    git(checkout, "checkout", "--quiet", ".")
    with RunFolder(run_path) as run:
        run.begin("a: 1")
    assert not (run_path / "environment.diff").exists()
    assert "x = 2" in (run_path / "starts" / "0000" / "environment.diff").read_text(errors="replace")


def test_variables_that_matter_without_secrets() -> None:
    variables = {
        "CUDA_VISIBLE_DEVICES": "0,1",
        "OMP_NUM_THREADS": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_JWT": "secret",
        "HARNESS_API_KEY": "secret",
        "NCCL_DEBUG": "INFO",
        "RANK": "0",
        "HOME": "/root",
        "HF_TOKEN": "secret",
    }
    assert recorded_variables(variables) == {
        "CUDA_VISIBLE_DEVICES": "0,1",
        "NCCL_DEBUG": "INFO",
        "OMP_NUM_THREADS": "2",
        "RANK": "0",
        "SLURM_JOB_ID": "7",
    }
