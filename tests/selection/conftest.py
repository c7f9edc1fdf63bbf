"""The native kernel as the sources have it: compiled here where the installation's is older or was never built."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.machinery import ExtensionFileLoader
from pathlib import Path

import pytest

import harness.selection as room
from harness.selection import current_implementation
from tests.selection.starting import write_site

NATIVE = Path(room.__file__).parent / "native"
NAME = "harness.selection.deflate_sizes"


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """harness.selection.deflate_sizes can be imported, and is current."""
    built = importlib.util.find_spec(NAME)
    newest = max(file.stat().st_mtime for file in NATIVE.iterdir())
    if built is not None and built.origin and Path(built.origin).stat().st_mtime >= newest:
        yield
        return
    compiler, headers = shutil.which("cc"), Path(sysconfig.get_paths()["include"])
    if compiler is None or not (headers / "Python.h").exists():
        pytest.skip("the native kernel is not built, and there is no C compiler or no Python.h to build it with")
    library = tmp_path_factory.mktemp("kernel") / "deflate_sizes.so"
    options = ["-O2", "-std=c11", "-Wall", "-Wextra", "-shared", "-fPIC", f"-I{headers}"]
    subprocess.run([compiler, *options, str(NATIVE / "deflate_sizes.c"), "-o", str(library)], check=True)
    spec = importlib.util.spec_from_loader(NAME, ExtensionFileLoader(NAME, str(library)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, NAME, module)
        patch.setattr(room, "deflate_sizes", module, raising=False)
        current_implementation.cache_clear()
        yield
    current_implementation.cache_clear()


@pytest.fixture
def _every_file_is_a_shard(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Here and in processes that are started; else small files are one together."""
    monkeypatch.setattr("harness.selection.pool.SHARD_BYTES", 0)
    monkeypatch.setenv("PYTHONPATH", str(write_site(tmp_path_factory.mktemp("site"))), prepend=":")


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed process has written is there all the same; only a machine that fails would lose it."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
