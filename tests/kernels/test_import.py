"""`kernels`, found from the repository root under its bare name, must not become a second copy of the package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_the_bare_name_holds_nothing() -> None:
    result = run("import kernels, sys; print('torch' in sys.modules, kernels.__file__)")
    assert result.stdout.startswith("False"), result.stderr
    assert Path(result.stdout.split()[1]).parent == ROOT / "kernels"


def test_nothing_can_be_imported_through_the_bare_name() -> None:
    for statement in ("from kernels import linear_cross_entropy", "import kernels.linear_cross_entropy.interface"):
        result = run(statement)
        assert result.returncode != 0
    assert "harness.kernels" in run("import kernels; kernels.linear_cross_entropy").stderr


def test_both_names_in_one_process_load_one_copy() -> None:
    code = (
        "import kernels, harness.kernels, sys\n"
        "print([name for name in sys.modules if name.endswith('linear_cross_entropy.interface')])"
    )
    assert run(code).stdout.strip() == "['harness.kernels.linear_cross_entropy.interface']"


def test_importing_does_not_load_the_compiler() -> None:
    assert run("import sys, harness.kernels; print('torch._dynamo' in sys.modules)").stdout.strip() == "False"
