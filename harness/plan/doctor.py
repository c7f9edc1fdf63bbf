"""What this machine has, and what is missing for what."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib import metadata

import torch

# Package, what needs it, how it is had. Versions are read from the installed metadata; nothing is imported.
_PACKAGES = [
    ("torch", "everything", "pip install torch"),
    ("numpy", "everything", "pip install numpy"),
    ("megatron-core", "reading and writing .bin/.idx corpora", "pip install megatron-core"),
    ("sentencepiece", "sentencepiece tokenizers", "pip install sentencepiece"),
    ("tokenizers", "Hugging Face tokenizer.json files", "pip install tokenizers"),
    ("zstandard", "reading .jsonl.zst", "pip install zstandard"),
    ("tensorboard", "curves (run.tensorboard)", "pip install tensorboard"),
    ("safetensors", "checkpoints", "pip install safetensors"),
    ("pyarrow", "reading .parquet", "pip install 'harness[parquet]'"),
    ("triton", "compiled kernels on GPUs", "pip install 'harness[triton]'"),
    ("deepspeed", "ZeRO stages 1 to 3", "pip install 'harness[zero]'"),
    ("transformers", "tests against the reference models", "pip install 'harness[dev]'"),
]
_PROGRAMS = [
    ("c++", "torch.compile on the CPU"),
    ("git", "recording the commit of a run"),
    ("nvidia-smi", "GPUs"),
    ("sbatch", "SLURM"),
]


def diagnose() -> str:
    """A report for a person: versions, devices, programs; every gap says what it keeps one from doing."""
    lines = [f"python      {sys.version.split()[0]} ({platform.platform()})"]
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        lines.append("            outside the tested range 3.11 to 3.12")
    lines += ["", "packages"]
    for package, purpose, remedy in _PACKAGES:
        try:
            lines.append(f"  {package:<15}{metadata.version(package)}")
        except metadata.PackageNotFoundError:
            lines.append(f"  {package:<15}missing: needed for {purpose}; {remedy}")
    lines += ["", "devices", f"  cpu            {os.cpu_count()} cores, {torch.get_num_threads()} threads, {_memory()}"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            lines.append(
                f"  cuda:{index}         {properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
                f"compute capability {properties.major}.{properties.minor}"
            )
    else:
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no usable GPU"
        lines.append(f"  cuda           none ({why}); training runs on the CPU")
    lines += ["", "programs"]
    for program, purpose in _PROGRAMS:
        lines.append(f"  {program:<15}{shutil.which(program) or f'missing: needed for {purpose}'}")
    return "\n".join(lines)


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB memory"
    except (ValueError, OSError):
        return "memory unknown"
