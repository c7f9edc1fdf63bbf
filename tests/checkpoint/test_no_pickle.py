"""Nothing is ever unpickled: with every way into pickle barred, a run is resumed and its checkpoints are looked at."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

from harness.config import dump_yaml
from harness.train import train
from tests.small_run import small_settings

ROOT = Path(__file__).parents[2]
WRITES_PICKLES = ROOT / "harness/convert/megatron_writer.py"  # torch.save: the format that it writes is made of them

PROGRAM = '''
import _pickle, io, pickle, sys

class Barred(BaseException):
    """Not an Exception: nobody may swallow it."""

def barred(*arguments, **options):
    raise Barred("something is unpickled")

class Unpickler:
    def __init__(self, *arguments, **options):
        barred()

    def load(self):  # looked at by dill, which torch imports where it is installed
        barred()

harmless = pickle.dumps({"a": 1})
for module in (pickle, _pickle):
    module.load, module.loads, module.Unpickler = barred, barred, Unpickler
pickle._load, pickle._loads, pickle._Unpickler = barred, barred, Unpickler

import numpy, torch
torch.load = torch.serialization.load = torch.jit.load = barred
buffer = io.BytesIO()
numpy.save(buffer, numpy.array([None]), allow_pickle=True)
for attempt in (
    lambda: pickle.loads(harmless),
    lambda: pickle.load(io.BytesIO(harmless)),
    lambda: _pickle.Unpickler(io.BytesIO(harmless)).load(),
    lambda: torch.load("anything"),
    lambda: numpy.load(io.BytesIO(buffer.getvalue()), allow_pickle=True),
):
    try:
        attempt()
    except Barred:
        continue
    raise SystemExit("pickle is not barred")

from harness.cli import main
config, folder = sys.argv[1:]
assert main(["train", config, "train.steps=6", "train.resume=must", "run.log_every_steps=1000"]) == 0
for action in ("list", "show", "latest", "path", "verify"):
    assert main(["checkpoint", action, folder]) == 0
assert main(["checkpoint", "show", folder, "--json"]) == 0
assert main(["checkpoint", "prune", folder, "checkpoint.keep_last=1"]) == 0
assert main(["evaluate", folder]) == 0
print("without pickle")
'''


def test_a_resume_and_the_verbs_unpickle_nothing(tmp_path: Path) -> None:
    settings = small_settings(
        tmp_path, train={"steps": 4}, checkpoint={"every_steps": 2}, validation={"every_steps": 2}
    )
    config = tmp_path / "small.yaml"
    config.write_text(dump_yaml(settings, comments=False))
    folder = train(settings).folder
    command = [sys.executable, "-c", PROGRAM, str(config), str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("without pickle\n")
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-00000006"]


def test_no_source_names_pickle() -> None:
    """Nor what pickles by itself."""
    sources = [*(ROOT / "harness").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    assert len(sources) > 60
    forbidden = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not forbidden & {alias.name.partition(".")[0] for alias in node.names}, path
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in forbidden, path
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert getattr(node.value, "value", True) is False, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) != ("torch", "load"), path
                assert (node.value.id, node.attr) != ("torch", "save") or path == WRITES_PICKLES, path
