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
SHARED_BYTES = {80: 166_912, 90: 232_448}
STACK_BYTES = {"plain": 0, "all, tau 1.5": 1024}
Rows = list[dict[str, Any]]


def without_compiler() -> str | None:
    """Why nothing can be compiled here."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        return "Triton is not installed"
    ptxas = Path(found.origin).parent / "backends/nvidia/bin/ptxas"
    return None if ptxas.exists() or "TRITON_PTXAS_PATH" in os.environ else "Triton is installed without its ptxas"


pytestmark = pytest.mark.skipif(without_compiler() is not None, reason=without_compiler() or "")


def environment(folder: Path, **values: str) -> dict[str, str]:
    """Without the interpreter, in which this process may run kernels, and with a cache of its own."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, "TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONWARNINGS": "ignore", **values}


def compile_kernels(folder: Path, *options: str) -> tuple[int, Rows, str]:
    """Exit status of the tool, its rows, and what it printed."""
    out = folder / "rows.json"
    command = [sys.executable, str(ROOT / "tools/compile_kernels.py"), "--out", str(out), *options]
    run = subprocess.run(
        command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=600, check=False
    )
    assert out.exists(), run.stderr
    return run.returncode, json.loads(out.read_text())["rows"], run.stdout


@pytest.fixture(scope="module")
def defaults(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Rows, str]:
    return compile_kernels(tmp_path_factory.mktemp("defaults"), "--quick", "--arch", "90", "80")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Rows, str]:
    """More stages than there is memory for, more accumulators than registers, and tiles too short for wgmma."""
    tilings = ("128x128x64:8:9:tma", "128x256x32:4:2:tma", "32x64x64:4:3:tma")
    options = ("--arch", "90", "--cases", "plain", "--kernels", "facts", "--tiling", *tilings)
    return compile_kernels(tmp_path_factory.mktemp("planted"), *options)


def test_the_tool_finds_the_defaults_within_its_rules(defaults: tuple[int, Rows, str]) -> None:
    status, rows, printed = defaults
    assert [row for row in rows if row["broken"]] == []
    assert status == 0, printed


def test_the_defaults_are_within_the_hardware(defaults: tuple[int, Rows, str]) -> None:
    _, rows, _ = defaults
    compiled = {(row["sm"], row["kernel"], row["case"]) for row in rows}
    assert compiled >= {(90, kernel, case) for kernel in ("facts", "gradient") for case in STACK_BYTES}
    assert compiled >= {(80, kernel, "plain") for kernel in ("facts", "gradient")}
    assert {row["kernel"] for row in rows} >= {"sparse_product: hidden", "sparse_product: weight"}
    for row in rows:
        assert 0 < row["shared_bytes"] <= SHARED_BYTES[row["sm"]], row
        assert 0 < row["registers"] <= 255, row
        assert row["stack_bytes"] <= STACK_BYTES[row["case"]], row
        assert row["matrix"] > 0, row
        assert (row["tma"] > 0) == ("TMA" in row["tiling"]), row
        assert row["resident"] >= row["programs"], row


def test_a_pipeline_holds_what_its_stages_take(defaults: tuple[int, Rows, str]) -> None:
    """That what is reported as shared memory is: tiles of hidden and weight, once a stage, and a few barriers."""
    _, rows, _ = defaults
    checked = [row for row in rows if row["sm"] == 90 and "TMA" in row["tiling"]]
    assert checked
    for row in checked:
        sizes, _, stages, _ = row["tiling"].split(", ")
        tokens, columns, width = map(int, sizes.split("x"))
        tiles = int(stages.split()[0]) * 2 * (tokens + columns) * width
        assert tiles <= row["shared_bytes"] <= tiles + 1024, row


def test_the_rules_bite(planted: tuple[int, Rows, str]) -> None:
    status, rows, printed = planted
    stages, accumulators, short = rows
    assert status == 1
    assert any("bytes of shared memory, a block may have 232,448" in rule for rule in stages["broken"]), stages
    assert any("bytes of stack, 64 are the budget" in rule for rule in accumulators["broken"]), accumulators
    assert accumulators["stack_bytes"] > 64
    assert short["broken"] == ["no wgmma.mma_async instructions"]
    assert short["matrix"] == 0
    assert all(rule in printed for row in rows for rule in row["broken"])


def test_it_needs_the_files_beside_it_alone_and_knows_all_their_kernels(tmp_path: Path) -> None:
    """In a copy with one kernel more: what is installed here has none such."""
    device = "kernels/linear_cross_entropy/fused/device.py"
    for folder in ("harness", "tools"):
        (tmp_path / folder).mkdir()
    for name in ("harness/__init__.py", "tools/compile_kernels.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / device).open("a") as file:
        file.write("\n\n@triton.jit\ndef another_kernel(x):\n    tl.store(x, 0)\n")
    run = subprocess.run(
        [sys.executable, "tools/compile_kernels.py"],
        cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert run.returncode == 1
    assert run.stderr == "compile_kernels: does not know how another_kernel of device.py is started\n"


def test_the_interpreter_is_refused(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / "tools/compile_kernels.py")],
        env=environment(tmp_path, TRITON_INTERPRET="1"), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    assert "unset it" in run.stderr
