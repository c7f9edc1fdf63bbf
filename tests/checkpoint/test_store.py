"""Save and load of whole tensors: bits, names, refusals, no pickle."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from harness.checkpoint import CannotWriteError, CheckpointError, CheckpointStore
from harness.config import HarnessError
from harness.parallel import Fragment
from tests.checkpoint.states import assert_same_bits, blank_like, random_tensors, whole_fragments

STATE = {
    "data": {"consumed_samples": 2**70, "skipped": [[3, 5]]},
    "loss": 0.1,
    "name": "ünï",
    "none": None,
    "flag": True,
}


def load_all(store: CheckpointStore, step: int, like: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Any]:
    into = blank_like(like)
    return into, store.load(step, whole_fragments(into))


@pytest.mark.parametrize("max_file_bytes", [1, 300, 2 << 30])
def test_round_trip_is_bit_exact_without_pickle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_file_bytes: int
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load"), (torch, "save")):
        monkeypatch.setattr(module, name, refuse)
    for name in ("dump", "dumps", "Pickler"):
        monkeypatch.setattr(pickle, name, refuse)
    tensors = random_tensors(1)
    store = CheckpointStore(tmp_path / "new" / "checkpoints", max_file_bytes=max_file_bytes)
    folder = store.save(200, whole_fragments(tensors), STATE)
    loaded, state = load_all(store, 200, tensors)
    assert_same_bits(loaded, tensors)
    assert state == STATE == store.read_state(200)
    assert store.verify(200) == []
    assert folder == tmp_path / "new" / "checkpoints" / "step-00000200"
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    filled = sum(tensor.numel() > 0 for tensor in tensors.values())
    assert len(files) == filled if max_file_bytes == 1 else len(files) > 1 if max_file_bytes == 300 else len(files) == 1
    assert files[0] == "tensors-00000.safetensors"
    assert [path.name for path in store.folder.iterdir()] == ["step-00000200"]


def test_files_are_what_other_tools_read(tmp_path: Path) -> None:
    tensors = random_tensors(2)
    folder = CheckpointStore(tmp_path).save(5, whole_fragments(tensors), STATE)
    stored = load_file(folder / "tensors-00000.safetensors")
    assert_same_bits(stored, {key: tensor for key, tensor in tensors.items() if tensor.numel()})
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"], manifest["step"]) == ("harness-checkpoint", 1, 5)
    assert manifest["state"] == STATE
    for name, file in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert file == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    entry = manifest["tensors"]["master/norm.weight"]
    assert entry["shape"] == [7]
    assert entry["dtype"] == "float32"
    assert entry["fragments"][0]["offsets"] == [0]
    subprocess.run(["sha256sum", "--check", "--status", "manifest.sha256"], cwd=folder, check=True)
    assert (folder / "tensors-00000.safetensors").stat().st_mode == (folder / "manifest.json").stat().st_mode


def test_views_strides_and_shared_memory(tmp_path: Path) -> None:
    base = torch.randn(6, 10)
    flat = torch.randn(50)
    tensors = {
        "master/transposed": base.t(),
        "master/strided": base[::2, 1::3],
        "master/start": flat[:20],
        "master/overlapping": flat[10:30].view(4, 5),
        "master/again": flat[:20],
        "master/expanded": torch.randn(3, 1).expand(3, 4),
        "master/parameter": torch.nn.Parameter(torch.randn(3)),
    }
    store = CheckpointStore(tmp_path)
    store.save(1, whole_fragments(tensors), {})
    loaded = {key: torch.zeros(tensor.shape) for key, tensor in tensors.items()}
    backing = torch.full((12, 20), 9.0)
    loaded["master/transposed"] = backing[::2, ::2].t()
    loaded["master/parameter"] = torch.nn.Parameter(torch.zeros(3))
    store.load(1, whole_fragments(loaded))
    for key, tensor in tensors.items():
        torch.testing.assert_close(loaded[key].detach(), tensor.detach(), rtol=0, atol=0)
    backing[::2, ::2] = 9.0
    assert bool((backing == 9.0).all()), "loading into a strided view wrote outside it"
    assert loaded["master/parameter"].requires_grad


def test_steps_latest_and_delete(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    assert store.steps() == []
    assert store.latest_good() is None
    for step in (30, 7, 123456789):
        store.save(step, whole_fragments(random_tensors(step % 100)), {"step": step})
    (tmp_path / "checkpoints" / "step-nonsense").mkdir()
    (tmp_path / "checkpoints" / "step-00000099").write_text("a file")
    assert store.steps() == [7, 30, 123456789]
    assert store.latest_good() == 123456789
    assert store.latest_good(before=30) == 7
    assert store.latest_good(before=7) is None
    store.delete(123456789)
    assert store.steps() == [7, 30]
    assert not list(store.folder.glob(".*"))
    (store.folder / "step-00000030" / "manifest.json").unlink()
    assert store.latest_good() == 7
    assert "step-00000030/manifest.json: cannot be read" in caplog.text
    with pytest.raises(CheckpointError, match="has no step 8; steps there: 7, 30"):
        store.delete(8)


def test_a_step_saved_again_is_replaced(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(10, whole_fragments(random_tensors(1)), {"attempt": 1})
    store.save(10, whole_fragments(random_tensors(2)), {"attempt": 2})
    loaded, state = load_all(store, 10, random_tensors(2))
    assert state == {"attempt": 2}
    assert_same_bits(loaded, random_tensors(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_load_refuses_before_touching_memory(tmp_path: Path) -> None:
    tensors = random_tensors(3)
    store = CheckpointStore(tmp_path)
    store.save(10, whole_fragments(tensors), {})

    def refused(fragments: list[Fragment], line: str, **options: Any) -> None:
        before = [fragment.tensor.clone() for fragment in fragments]
        with pytest.raises(HarnessError) as caught:
            store.load(10, fragments, **options)
        assert line in str(caught.value)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)
        for fragment, old in zip(fragments, before, strict=True):
            torch.testing.assert_close(fragment.tensor, old, rtol=0, atol=0, equal_nan=True)

    def changed(key: str, tensor: torch.Tensor | None) -> list[Fragment]:
        into = blank_like(tensors)
        into.pop(key, None)
        return whole_fragments(into | ({key: tensor} if tensor is not None else {}))

    refused(
        changed("master/norm.weight", torch.zeros(8)),
        "tensor master/norm.weight is float32 (7,) there, and float32 (8,)",
    )
    refused(changed("master/norm.weight", torch.zeros(7, 1)), "float32 (7,) there, and float32 (7, 1) here")
    refused(changed("master/norm.weight", torch.zeros(7).bfloat16()), "float32 (7,) there, and bfloat16 (7,) here")
    refused(changed("master/nrom.weight", torch.zeros(7)), "tensor master/nrom.weight is not in it")
    refused(changed("master/norm.weight", None), "tensor master/norm.weight is in it and unknown here")
    many = [Fragment.whole(f"layers.{number}", "master", torch.zeros(2)) for number in range(9)]
    refused(
        many,
        "9 tensors (master/layers.0, master/layers.1, master/layers.2, master/layers.3, master/layers.4 and 4 more)",
    )
    allowed = changed("master/norm.weight", None)
    store.load(10, allowed, allow_unused=True)
    assert_same_bits(
        {fragment.key: fragment.tensor for fragment in allowed},
        {key: tensor for key, tensor in tensors.items() if key != "master/norm.weight"},
    )
    # Tensors of kinds that nobody asks for are nobody's business; a fragment without elements names its tensor.
    masters = [fragment for fragment in whole_fragments(blank_like(tensors)) if fragment.kind == "master"]
    store.load(10, masters)
    masters = [fragment for fragment in masters if fragment.name != "norm.weight"]
    store.load(10, [*masters, Fragment("norm.weight", "master", (7,), (3,), torch.zeros(0))])
    with pytest.raises(CheckpointError, match="has no step 11; steps there: 10; use an earlier step: 10"):
        store.load(11, [])


def test_save_refuses_what_could_not_be_loaded(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, whole_fragments(random_tensors(1)), {"kept": True})
    half = Fragment("w", "master", (4, 2), (0, 0), torch.zeros(2, 2))
    rest = Fragment("w", "master", (4, 2), (1, 0), torch.zeros(3, 2))
    refusals = [
        ([half], {}, "tensor master/w: only 4 of its 8 elements are there"),
        ([half, rest], {}, "overlap"),
        ([half, half], {}, "given twice"),
        ([half, Fragment("w", "master", (4, 3), (2, 0), torch.zeros(2, 3))], {}, "(4, 2), another of float32 (4, 3)"),
        ([half, Fragment("w", "master", (4, 2), (2, 0), torch.zeros(2, 2).half())], {}, "another of float16 (4, 2)"),
        (
            [Fragment.whole("z", "master", torch.zeros(3, dtype=torch.complex64))],
            {},
            "dtype complex64 cannot be stored",
        ),
        ([], {"a": {"b": [1, (2, 3)]}}, "state.a.b.1: tuple would not come back"),
        ([], {"a": {3: 4}}, "state.a: the key 3 is not text"),
        ([], {"best": float("nan")}, "state.best: nan is not a JSON number"),
        ([], {"t": torch.zeros(1)}, "state.t: Tensor would not come back"),
    ]
    for fragments, state, line in refusals:
        for step in (1, 2):
            with pytest.raises(CheckpointError) as caught:
                store.save(step, fragments, state)
            assert line in str(caught.value)
            assert f"step-{step:08d}: not saved: " in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
        assert store.read_state(1) == {"kept": True}


def test_a_failing_disk_costs_nothing_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, whole_fragments(random_tensors(1)), {})
    full = OSError(28, "No space left on device")

    def fail(*_: Any) -> None:
        raise full

    with monkeypatch.context() as patch:
        patch.setattr("harness.checkpoint.shard_writer.write_tensor_file", fail)
        with pytest.raises(CannotWriteError, match=r"step-00000002: cannot be written: .*No space left on device"):
            store.save(2, whole_fragments(random_tensors(2)), {})
    assert store.latest_good(verify=True) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    store.save(2, whole_fragments(random_tensors(2)), {})
    assert store.latest_good(verify=True) == 2


def test_links_and_files_in_the_way_are_cleared_and_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("kept")
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(1, whole_fragments(random_tensors(1)), {})
    (store.folder / "step-00000002").symlink_to(outside)
    (store.folder / ".tmp-step-00000007").symlink_to(outside)
    (store.folder / ".tmp-file").write_text("left behind")
    store.delete(2)
    store.save(3, whole_fragments(random_tensors(3)), {})
    assert (outside / "precious").read_text() == "kept"
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-00000001", "step-00000003"]


def test_a_tensor_named_like_the_part_of_another(tmp_path: Path) -> None:
    tensor = torch.arange(4.0)
    parts = [Fragment("w", "master", (4,), (start,), tensor[start : start + 2]) for start in (0, 2)]
    store = CheckpointStore(tmp_path)
    store.save(1, [*parts, Fragment.whole("w@0", "master", torch.full((2,), 5.0))], {})
    loaded = {"master/w": torch.zeros(4), "master/w@0": torch.zeros(2)}
    store.load(1, whole_fragments(loaded))
    assert loaded["master/w"].tolist() == [0, 1, 2, 3]
    assert loaded["master/w@0"].tolist() == [5, 5]


def test_fragments_refuse_boxes_outside_their_tensor() -> None:
    with pytest.raises(ValueError, match=r"fragment master/w: a box of shape \(2,\) at \(3,\) does not lie inside"):
        Fragment("w", "master", (4,), (3,), torch.zeros(2))
    with pytest.raises(ValueError, match="does not lie inside"):
        Fragment("w", "master", (4, 4), (0,), torch.zeros(2))
    with pytest.raises(ValueError, match="kind has no slash"):
        Fragment("w", "a/b", (), (), torch.tensor(1.0))


def test_import_is_light() -> None:
    heavy = "('megatron', 'deepspeed', 'tensorboard')"
    program = f"import sys, harness.checkpoint; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout == "[]\n"
