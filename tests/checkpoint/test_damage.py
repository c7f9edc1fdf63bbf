"""Every file of a checkpoint damaged in every way: always noticed, always named, and an older step is found."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.checkpoint import CheckpointError, CheckpointStore
from tests.checkpoint.states import blank_like, random_tensors, whole_fragments

FILES = ["manifest.json", "manifest.sha256", "tensors-00000.safetensors", "tensors-00001.safetensors"]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, random.randrange(path.stat().st_size))


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def replace_by_the_earlier_step(path: Path) -> None:
    path.write_bytes((path.parent.parent / "step-00000100" / path.name).read_bytes())


def swap_with_another(path: Path) -> None:
    other = path.parent / FILES[(FILES.index(path.name) + 1) % len(FILES)]
    aside = path.with_name("aside")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)


def replace_by_a_link(path: Path) -> None:
    elsewhere = path.parent.parent / "elsewhere.safetensors"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


DAMAGES = [flip_a_bit, truncate, append, Path.unlink, replace_by_the_earlier_step, swap_with_another, replace_by_a_link]


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "checkpoints", max_file_bytes=700)
    for step in (100, 200):
        store.save(step, whole_fragments(random_tensors(step)), {"step": step})
    assert sorted(path.name for path in (store.folder / "step-00000200").iterdir())[:4] == FILES
    return store


LINES: dict[Callable[[Path], None], str] = {
    flip_a_bit: "digest differs from the manifest",
    truncate: "bytes and the manifest says",
    append: "bytes and the manifest says",
    Path.unlink: "cannot be read (No such file or directory)",
    replace_by_a_link: "is not a plain file",
}
# What a link to a manifest says is judged by its digest.
CASES = [
    (name, damage) for name in FILES for damage in DAMAGES if "manifest" not in name or damage != replace_by_a_link
]


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_damage_is_noticed_and_named(
    store: CheckpointStore, name: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    path = store.folder / "step-00000200" / name
    damage(path)
    into = blank_like(random_tensors(200))
    before = {key: tensor.clone() for key, tensor in into.items()}
    with pytest.raises(CheckpointError) as caught:
        store.load(200, whole_fragments(into))
    line = str(caught.value)
    assert "\n" not in line
    assert "step-00000200" in line
    assert line.endswith("; use an earlier step: 100")
    if damage is not swap_with_another and not name.startswith("manifest"):
        assert str(path) in line
    if damage in LINES and not name.startswith("manifest"):
        assert LINES[damage] in line
        seen_by_size = damage is not flip_a_bit
        assert store.latest_good() == (100 if seen_by_size else 200)
    assert all(torch.equal(into[key], before[key]) for key in into)
    problems = store.verify(200)
    assert problems
    assert all("step-00000200" in problem for problem in problems)
    assert store.latest_good(verify=True) == 100
    assert "checkpoint of step 200 is passed over" in caplog.text
    store.load(100, whole_fragments(into))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A manifest changed by someone who also knows how to make its digest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    content = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(content)
    (folder / "manifest.sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  manifest.json\n")


def set_at(*path: Any) -> Callable[[dict[str, Any]], None]:
    *places, last, value = path

    def change(manifest: dict[str, Any]) -> None:
        place: Any = manifest
        for part in places:
            place = place[part]
        place[last] = value

    return change


def rename_file(name: str) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        text = json.dumps(manifest).replace("tensors-00000.safetensors", name)
        manifest.clear()
        manifest.update(json.loads(text))

    return change


FRAGMENT = ("tensors", "master/norm.weight", "fragments", 0)
FORGERIES = [
    (rename_file("../step-00000100/tensors-00000.safetensors"), "String should match pattern"),
    (rename_file("/etc/passwd"), "String should match pattern"),
    (rename_file(".."), "String should match pattern"),
    (set_at(*FRAGMENT, "file", "tensors-00009.safetensors"), "its file tensors-00009.safetensors is not listed"),
    (set_at(*FRAGMENT, "offsets", [1]), "the part (7,) at (1,) does not lie inside the shape (7,)"),
    (set_at(*FRAGMENT, "offsets", [-1]), "greater than or equal to 0"),
    (set_at(*FRAGMENT, "shape", [6]), "only 6 of its 7 elements are there"),
    (set_at("tensors", "master/norm.weight", "shape", [2**40]), "only 7 of its 1099511627776 elements are there"),
    (set_at("tensors", "master/norm.weight", "dtype", "object"), "is none of float64, float32"),
    (set_at("tensors", "nokind", {"shape": [0], "dtype": "float32", "fragments": []}), "is not named kind/name"),
    (set_at("version", 2), "has format version 2, and this harness reads 1"),
    (set_at("format", "other"), "is not the manifest of a checkpoint"),
    (set_at("step", 300), "is of step 300, but its folder says 200"),
    (set_at("extra", 1), "extra: Extra inputs are not permitted"),
    (set_at("state", []), "state: Input should be an object"),
]


@pytest.mark.parametrize(("change", "line"), FORGERIES)
def test_a_forged_manifest_leads_nowhere(
    store: CheckpointStore, change: Callable[[dict[str, Any]], None], line: str
) -> None:
    rewrite(store.folder / "step-00000200", change)
    with pytest.raises(CheckpointError) as caught:
        store.load(200, whole_fragments(blank_like(random_tensors(200))))
    assert line in str(caught.value)
    assert "step-00000200/manifest.json: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert store.latest_good() == 100


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (set_at(*FRAGMENT, "key", "master/other"), "has no tensor master/other, which the manifest places there"),
        (set_at(*FRAGMENT, "key", "exp_avg_sq/norm.weight"), "exp_avg_sq/norm.weight"),
        (set_at("tensors", "master/norm.weight", "dtype", "int32"), "is F32 (7,), and I32 (7,) in the manifest"),
    ],
)
def test_headers_are_compared_with_the_manifest(
    store: CheckpointStore, change: Callable[[dict[str, Any]], None], line: str
) -> None:
    rewrite(store.folder / "step-00000200", change)
    into = blank_like(random_tensors(200))
    if "I32" in line:
        into["master/norm.weight"] = torch.full((7,), 77, dtype=torch.int32)
    before = {key: tensor.clone() for key, tensor in into.items()}
    with pytest.raises(CheckpointError, match=r"step-00000200/tensors-0000\d.safetensors: ") as caught:
        store.load(200, whole_fragments(into))
    assert line in str(caught.value)
    assert all(torch.equal(into[key], before[key]) for key in into)


def test_a_manifest_that_is_not_json(store: CheckpointStore) -> None:
    folder = store.folder / "step-00000200"
    for content in (b"", b"[" * 100_000, b"[1]", b"\xff\xfe"):
        (folder / "manifest.json").write_bytes(content)
        (folder / "manifest.sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  manifest.json\n")
        assert len(store.verify(200)) == 1
        assert store.latest_good() == 100


def test_without_verification_sizes_and_headers_still_count(store: CheckpointStore) -> None:
    path = store.folder / "step-00000200" / "tensors-00000.safetensors"
    content = path.read_bytes()
    path.write_bytes(b"\xff" * len(content))
    assert store.latest_good() == 200
    assert store.latest_good(verify=True) == 100
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        store.load(200, whole_fragments(blank_like(random_tensors(200))), verify=False)
