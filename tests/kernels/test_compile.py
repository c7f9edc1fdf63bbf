"""The Triton kernels compile for GPUs that are not here, and the tool that says so sees what it should."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def compile_kernels(folder: Path, *options: str) -> tuple[int, list[dict[str, Any]], str]:
    """Exit status of the tool, its rows, and what it printed; in a copy of the files that it may need, and with nothing
    of this process's: not the interpreter, which the tests of this folder may run in, and not its cache."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTHONPATH"))}
    out = folder / "rows.json"
    command = [sys.executable, str(ROOT / "tools/compile_kernels.py"), "--out", str(out), *options]
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    if "ptxas" in run.stderr and "not find" in run.stderr:
        pytest.skip(f"Triton has no ptxas here: {run.stderr.strip().splitlines()[-1]}")
    assert out.exists(), run.stderr
    return run.returncode, json.loads(out.read_text())["rows"], run.stdout


@pytest.fixture(scope="module")
def defaults(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[dict[str, Any]], str]:
    return compile_kernels(tmp_path_factory.mktemp("defaults"), "--quick", "--arch", "90", "80")
