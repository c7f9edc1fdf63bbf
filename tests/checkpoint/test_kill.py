"""SIGKILL at every point of a save, and at random times: what is there afterwards is whole, old or new."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = '''
"""Saves are killed in forked children; this process has started no threads, so that forking it is safe."""
import os, pathlib, random, shutil, signal, sys, time
import torch
from harness.checkpoint import CheckpointStore, shard_writer
from harness.parallel import Fragment

torch.set_num_threads(1)
folder = pathlib.Path(sys.argv[1])

def tensors(value, rows=3):
    return [Fragment.whole(f"w{n}", "master", torch.full((rows, 5), float(value + n))) for n in range(3)]

def fresh():
    shutil.rmtree(folder, ignore_errors=True)
    CheckpointStore(folder, max_file_bytes=100).save(100, tensors(1), {"value": 1})

def value_of(step):
    """The value a step was saved with, after reading every byte of it."""
    store = CheckpointStore(folder)
    assert store.verify(step) == []
    into = [Fragment.whole(f"w{n}", "master", torch.zeros_like(f.tensor)) for n, f in enumerate(tensors(0, rows))]
    value = store.load(step, into)["value"]
    for fragment, expected in zip(into, tensors(value, rows)):
        assert torch.equal(fragment.tensor, expected.tensor), (step, value)
    return value

def killing(function, point, counter, after):
    def wrapped(*arguments, **options):
        counter[0] += 1
        number = counter[0]  # calls may lie inside of each other
        if number == point and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **options)
        if number == point and after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapped

def save_in_child(step, point, after):
    """Whether the child was killed: at its `point`-th call that changes the disk."""
    child = os.fork()
    if child == 0:
        counter = [0]
        calls = [(os, name) for name in ("fsync", "rename", "mkdir", "unlink", "rmdir")]
        for module, name in [*calls, (shard_writer, "write_tensor_file")]:
            setattr(module, name, killing(getattr(module, name), point, counter, after))
        CheckpointStore(folder, max_file_bytes=100).save(step, tensors(2), {"value": 2})
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL

rows = 3
seen = {}
for step in (200, 100):  # a new step, and one that exists
    for after in (False, True):
        point = 0
        while True:
            point += 1
            fresh()
            killed = save_in_child(step, point, after)
            store = CheckpointStore(folder)
            found = {s: value_of(s) for s in store.steps()}
            assert found in (({100: 1}, {100: 1, 200: 2}) if step == 200 else ({100: 1}, {100: 2})), found
            assert store.latest_good(verify=True) == max(found)
            assert killed or found == ({100: 1, 200: 2} if step == 200 else {100: 2})
            seen.setdefault((step, after), []).append(found)
            store.save(300, tensors(3), {"value": 3})
            assert {s: value_of(s) for s in store.steps()} == {**found, 300: 3}
            assert sorted(p.name for p in folder.iterdir()) == [f"step-{s:08d}" for s in sorted([*found, 300])]
            if not killed:
                break
for outcomes in seen.values():
    assert len(outcomes) > 10 and outcomes[0] == {100: 1} and outcomes[-1] != {100: 1}, outcomes

rows = 100_000
for trial in range(12):
    shutil.rmtree(folder, ignore_errors=True)
    CheckpointStore(folder).save(100, tensors(1, rows), {"value": 1})
    child = os.fork()
    if child == 0:
        CheckpointStore(folder).save(100 + 100 * (trial % 2), tensors(2, rows), {"value": 2})
        os._exit(0)
    time.sleep(random.uniform(0, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for step in CheckpointStore(folder).steps():
        value_of(step)
    assert CheckpointStore(folder).latest_good() in (100, 200)
print("whole", sum(map(len, seen.values())))
'''


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_every_point_nothing_half_written_looks_whole(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "checkpoints")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("whole")
