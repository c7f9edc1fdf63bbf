"""The log of a run under SLURM as it is kept: what a reader needs to believe it, without this machine's paths."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import harness
from tests.launch.cluster import Cluster
from tests.launch.jobs import ROOT, Quickstart

KEEP = "HARNESS_KEEP_LOGS"
"""Environment variable: the folder to keep logs in."""


def keep_log(name: str, title: str, parts: Sequence[str], cluster: Cluster, quickstart: Quickstart) -> None:
    """Write `name` into the folder, where one is given: title, versions, nodes, then the parts."""
    if KEEP not in os.environ:
        return
    versions = {
        "slurm": cluster.run("sinfo", "--version").split()[-1],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "harness": harness.__version__,
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }
    head = [
        title,
        "\n".join(f"{name}: {version}" for name, version in versions.items()),
        "$ sinfo --Node --long\n" + cluster.run("sinfo", "--Node", "--long"),
    ]
    text = "\n\n".join(part.strip("\n") for part in (*head, *parts)) + "\n"
    for path, variable in ((str(quickstart.folder), "TMP"), (sys.prefix, "VENV"), (str(ROOT), "HARNESS_ROOT")):
        text = text.replace(path, f"${variable}")
    folder = Path(os.environ[KEEP])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text.replace(platform.node(), "HOST"))
