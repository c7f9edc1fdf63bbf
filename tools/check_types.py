"""Run the type checker over the public surface.

kernels/ is imported as harness.kernels, which a type checker cannot know: it is shown a folder in which links lay the
packages out as an installation would.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Exit status of mypy over harness and harness.kernels."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "harness"
        package.mkdir()
        for item in (ROOT / "harness").iterdir():
            if item.name != "__pycache__":
                (package / item.name).symlink_to(item)
        (package / "kernels").symlink_to(ROOT / "kernels")
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", "harness"]
        environment = {**os.environ, "MYPY_CACHE_DIR": str(ROOT / ".mypy_cache"), "PYTHONSAFEPATH": "1"}
        return subprocess.run(command, cwd=folder, env={**environment, "MYPYPATH": folder}, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
