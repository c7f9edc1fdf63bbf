"""What every Python does first that is started while a folder of ours is on its path: each file is a shard there."""

from __future__ import annotations

from pathlib import Path

SITE = """
import glob, os, sys, time
from importlib.machinery import PathFinder, SourceFileLoader

class Loader(SourceFileLoader):
    def exec_module(self, module):
        super().exec_module(module)
        module.SHARD_BYTES = 0
        change(module.Pool)

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target) if name == "harness.selection.pool" else None
        if spec is not None:
            spec.loader = Loader(name, spec.origin)
        return spec

sys.meta_path.insert(0, Finder)
"""
NOTHING = "def change(pool): pass\n"


def write_site(folder: Path, change: str = NOTHING) -> Path:
    """The folder, for PYTHONPATH; `change` defines a function of that name that is given the class Pool."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(change + SITE)
    return folder
