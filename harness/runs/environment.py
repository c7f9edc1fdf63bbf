"""What a run ran on: versions, code, host, devices, variables."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PACKAGES = (
    "harness",
    "torch",
    "numpy",
    "megatron-core",
    "deepspeed",
    "triton",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "safetensors",
    "tensorboard",
    "pydantic",
    "pyyaml",
    "rich",
    "pyarrow",
    "zstandard",
)
VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "PYTHONHASHSEED")
VARIABLE_PREFIXES = (
    *(
        "CUDA_",
        "NVIDIA_",
        "OMP_",
        "MKL_",
        "KMP_",
        "NCCL_",
        "GLOO_",
        "SLURM_",
        "TORCH",
        "PYTORCH_",
        "TRITON_",
        "CUBLAS_",
    ),
    *("DS_", "HARNESS_"),
)
SECRETS = ("TOKEN", "KEY", "SECRET", "PASSW", "JWT", "CREDENTIAL")
"""A variable with such a part in its name is not recorded."""


def describe_environment(directory: Path) -> tuple[dict[str, Any], bytes | None]:
    """Everything that environment.json holds, and what differs from the git commit, if any.

    The commit is that of `directory` (a user's own project, perhaps) and that of harness, where it runs from a
    checkout; the difference is that of the first, or of the second where `directory` is no checkout.
    """
    import torch

    git, diff = _describe_git(directory)
    harness_git, harness_diff = _describe_git(Path(__file__).parent)
    environment = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(sys.orig_argv),
        "directory": str(directory.resolve()),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "torch_build": {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip},
        "git": git,
        "harness_git": harness_git,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpu": {
            "model": _cpu_model(),
            "cores": os.cpu_count(),
            "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        },
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "devices": _describe_devices(),
        "variables": recorded_variables(dict(os.environ)),
    }
    return environment, diff if git is not None else harness_diff


def recorded_variables(variables: dict[str, str]) -> dict[str, str]:
    """Those environment variables that change how a run behaves; never one whose name suggests a secret."""
    return {
        name: value
        for name, value in sorted(variables.items())
        if (name in VARIABLES or name.startswith(VARIABLE_PREFIXES)) and not any(part in name for part in SECRETS)
    }


def _version(package: str) -> str | None:
    """From the metadata of the installation: nothing is imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _describe_git(directory: Path) -> tuple[dict[str, Any] | None, bytes | None]:
    """The commit, and what differs from it; None and None where `directory` is no checkout or git is not there."""
    commit = _git(directory, "rev-parse", "HEAD")
    if commit is None:
        return None, None
    status = _git(directory, "status", "--porcelain") or b""
    untracked = [line[3:].decode(errors="replace") for line in status.splitlines() if line.startswith(b"??")]
    diff = _git(directory, "diff", "--no-color", "--no-ext-diff", "--binary", "HEAD")
    return {"commit": commit.decode().strip(), "dirty": bool(status.strip()), "untracked": untracked}, diff or None


def _git(directory: Path, *arguments: str) -> bytes | None:
    try:
        result = subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            cwd=directory,
            capture_output=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _describe_devices() -> list[dict[str, Any]]:
    """The accelerators that torch sees, of whatever make; none on a CPU."""
    import torch

    if not torch.accelerator.is_available():
        return []
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    module = torch.get_device_module(accelerator)
    devices = []
    for number in range(torch.accelerator.device_count()):
        properties = module.get_device_properties(number)
        capability = [getattr(properties, "major", None), getattr(properties, "minor", None)]
        devices.append(
            {
                "device": f"{accelerator.type}:{number}",
                "name": getattr(properties, "name", None),
                "memory_bytes": getattr(properties, "total_memory", None),
                "capability": ".".join(map(str, capability)) if None not in capability else None,
            }
        )
    return devices
