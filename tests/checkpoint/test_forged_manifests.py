"""Manifests with the right digest and the wrong content: refused in one line, before memory is taken or touched."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.checkpoint import CheckpointError, CheckpointStore
from tests.checkpoint.states import assert_same_bits, blank_like, random_tensors, whole_fragments

STEP = "step-00000200"
Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = CheckpointStore(tmp_path_factory.mktemp("pristine") / "checkpoints", max_file_bytes=700)
    for step in (100, 200):
        store.save(step, whole_fragments(random_tensors(step)), {"step": step})
    return store.folder


@pytest.fixture
def store(pristine: Path, tmp_path: Path) -> CheckpointStore:
    shutil.copytree(pristine, tmp_path / "checkpoints")
    return CheckpointStore(tmp_path / "checkpoints")


def write(folder: Path, content: bytes) -> None:
    """As someone does who also knows how to make the digest."""
    (folder / "manifest.json").write_bytes(content)
    (folder / "manifest.sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  manifest.json\n")


def rewrite(folder: Path, change: Change) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    write(folder, json.dumps(manifest).encode())


def set_at(*path: Any) -> Change:
    *places, last, value = path

    def change(manifest: dict[str, Any]) -> None:
        place: Any = manifest
        for part in places:
            place = place[part]
        place[last] = value

    return change


def rename_file(name: str) -> Change:
    """Wherever the manifest speaks of the first file, it says `name`."""

    def change(manifest: dict[str, Any]) -> None:
        quoted = json.dumps(name)
        text = json.dumps(manifest).replace('"tensors-00000.safetensors"', quoted)
        manifest.clear()
        manifest.update(json.loads(text))

    return change


def rename_tensor(name: str) -> Change:
    def change(manifest: dict[str, Any]) -> None:
        manifest["tensors"][name] = manifest["tensors"].pop("master/norm.weight")

    return change


def twice(offset: int) -> Change:
    def change(manifest: dict[str, Any]) -> None:
        boxes = manifest["tensors"]["master/norm.weight"]["fragments"]
        boxes.append({**boxes[0], "offsets": [offset]})

    return change


def all_of(*changes: Change) -> Change:
    def change(manifest: dict[str, Any]) -> None:
        for each in changes:
            each(manifest)

    return change


TENSOR = ("tensors", "master/norm.weight")
FRAGMENT = (*TENSOR, "fragments", 0)


def lift() -> Change:
    """Of shape (7, 1), says the manifest, and all in it agrees."""
    return all_of(
        set_at(*TENSOR, "shape", [7, 1]), set_at(*FRAGMENT, "shape", [7, 1]), set_at(*FRAGMENT, "offsets", [0] * 2)
    )


NAMES = [
    "../step-00000100/tensors-00000.safetensors",
    "/etc/passwd",
    "/etc/passwd.safetensors",
    "..",
    ".",
    "",
    "a/b.safetensors",
    "a\\b.safetensors",
    ".hidden.safetensors",
    "manifest.json",
    "tensors-00000.pt",
    "tensors-00000.safetensors.pkl",
    "tensors-00000.safetensors\n",
    "tensors\0.safetensors",
    "~.safetensors",
    "тензоры.safetensors",
]
FORGERIES: list[tuple[Change, str]] = [
    *((rename_file(name), "String should match pattern") for name in NAMES),
    (set_at(*FRAGMENT, "file", "tensors-00009.safetensors"), "its file tensors-00009.safetensors is not listed"),
    # Boxes
    (set_at(*FRAGMENT, "offsets", [1]), "the part (7,) at (1,) does not lie inside the shape (7,)"),
    (set_at(*FRAGMENT, "offsets", [-1]), "greater than or equal to 0"),
    (set_at(*FRAGMENT, "shape", [-7]), "greater than or equal to 0"),
    (set_at(*FRAGMENT, "shape", [6]), "only 6 of its 7 elements are there"),
    (set_at(*FRAGMENT, "shape", [7, 1]), "does not lie inside the shape (7,)"),
    (set_at(*FRAGMENT, "offsets", []), "does not lie inside the shape (7,)"),
    (set_at(*TENSOR, "fragments", []), "only 0 of its 7 elements are there"),
    (twice(0), "the parts (7,) at (0,) and (7,) at (0,) overlap"),
    (all_of(twice(3), set_at(*TENSOR, "shape", [10])), "the parts (7,) at (0,) and (7,) at (3,) overlap"),
    # Sizes
    (set_at(*TENSOR, "shape", [2**40]), "only 7 of its 1099511627776 elements are there"),
    (set_at(*TENSOR, "shape", [10**30] * 3), "does not lie inside the shape"),
    (set_at("files", "tensors-00000.safetensors", "bytes", 2**60), "tensors-00000.safetensors: has"),
    (set_at("files", "tensors-00000.safetensors", "bytes", -1), "greater than or equal to 0"),
    (set_at("files", "tensors-00000.safetensors", "sha256", "0" * 63), "String should match pattern"),
    # Types
    (set_at(*TENSOR, "dtype", "object"), "is none of float64, float32"),
    (set_at(*TENSOR, "dtype", None), "Input should be a valid string"),
    (set_at(*TENSOR, "shape", [7.0]), "valid integer"),
    (set_at(*TENSOR, "shape", ["7"]), "valid integer"),
    (set_at(*TENSOR, "shape", [True]), "valid integer"),
    (set_at(*TENSOR, "shape", [float("nan")]), "valid integer"),
    (set_at("step", 200.0), "valid integer"),
    (set_at("step", float("inf")), "valid integer"),
    (set_at("step", -200), "greater than or equal to 0"),
    (set_at("step", 10**4000), "is of step 1000"),
    (set_at("state", []), "state: Input should be an object"),
    (set_at("state", "rate", float("nan")), "state.rate: nan is not a JSON number"),
    (set_at("state", "rates", [1, {"x": -float("inf")}]), "state.rates.1.x: -inf is not a JSON number"),
    (set_at("tensors", []), "tensors: Input should be an object"),
    # Names
    (set_at("tensors", "nokind", {"shape": [0], "dtype": "float32", "fragments": []}), "is not named kind/name"),
    (rename_tensor("master/\x1b[2Jgone"), "is not named kind/name, in printable text"),
    (rename_tensor("master/two\nlines"), "is not named kind/name, in printable text"),
    (set_at(*FRAGMENT, "key", "two\nlines"), "its key 'two\\nlines' is not printable text"),
    (set_at("tensors", "two\nlines", 3), "tensors.'two\\nlines': Input should be an object"),
    (set_at("state", "two\nlines", float("nan")), "state.'two\\nlines': nan is not a JSON number"),
    (set_at("extra", 1), "extra: Extra inputs are not permitted"),
    # Identity
    (set_at("version", 2), "has format version 2, and this harness reads 1"),
    (set_at("version", "two\nlines"), "has format version 'two\\nlines', and this harness reads 1"),
    (set_at("format", "other"), "is not the manifest of a checkpoint"),
    (set_at("step", 300), "is of step 300, but its folder says 200"),
]


def refused(store: CheckpointStore, tensors: dict[str, torch.Tensor] | None = None) -> str:
    """The line with which step 200 is refused, after a look that no memory was touched."""
    into = tensors or blank_like(random_tensors(200))
    before = {key: tensor.clone() for key, tensor in into.items()}
    with pytest.raises(CheckpointError) as caught:
        store.load(200, whole_fragments(into))
    assert_same_bits(into, before)
    line = str(caught.value)
    assert line.isprintable()
    return line


@pytest.mark.parametrize(("change", "line"), FORGERIES, ids=[line[:40] for _, line in FORGERIES])
def test_a_forged_manifest_leads_nowhere(store: CheckpointStore, change: Change, line: str) -> None:
    rewrite(store.folder / STEP, change)
    said = refused(store)
    assert line in said
    assert said.startswith(f"{store.folder / STEP}/")
    assert "manifest.json: " in said or "tensors-00000.safetensors: has" in said
    assert store.latest_good() == 100
    assert len(store.verify(200)) == 1


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (set_at(*FRAGMENT, "key", "master/other"), "has no tensor master/other, which the manifest places there"),
        (set_at(*FRAGMENT, "key", "__metadata__"), "has no tensor __metadata__"),
        (set_at(*FRAGMENT, "key", "exp_avg_sq/norm.weight"), "exp_avg_sq/norm.weight"),
        (set_at(*TENSOR, "dtype", "int32"), "is F32 (7,), and I32 (7,) in the manifest"),
        (set_at("tensors", "rng/cpu", "dtype", "int8"), "is U8 (33,), and I8 (33,) in the manifest"),
        (lift(), "is F32 (7,), and F32 (7, 1) in the manifest"),
    ],
)
def test_headers_are_compared_with_the_manifest(store: CheckpointStore, change: Change, line: str) -> None:
    """Live memory that agrees with the forgery, so that only the file itself can tell."""
    rewrite(store.folder / STEP, change)
    into = blank_like(random_tensors(200))
    if "I32" in line:
        into["master/norm.weight"] = torch.full((7,), 77, dtype=torch.int32)
    if "I8" in line:
        into["rng/cpu"] = torch.full((33,), 77, dtype=torch.int8)
    if "(7, 1)" in line:
        into["master/norm.weight"] = torch.full((7, 1), 77.0)
    said = refused(store, into)
    assert f"{store.folder / STEP}/tensors-0000" in said
    assert line in said


def test_a_tensor_beyond_all_memory_is_refused_by_its_shape(store: CheckpointStore) -> None:
    """A tiling that agrees with the shape that it claims."""
    rewrite(store.folder / STEP, all_of(set_at(*TENSOR, "shape", [2**50]), set_at(*FRAGMENT, "shape", [2**50])))
    assert "tensor master/norm.weight is float32 (1125899906842624,) there, and float32 (7,) here" in refused(store)


def test_manifests_that_are_not_json(store: CheckpointStore) -> None:
    folder = store.folder / STEP
    endless = (folder / "manifest.json").read_bytes().replace(b'"step": 200', b'"step": ' + b"9" * 5000)
    for content in (b"", b"[" * 100_000, b"[1]", b"\xff\xfe", b"null", b'{"a":' * 3000, b"\0" * 1000, endless):
        write(folder, content)
        said = refused(store)
        assert f"{folder}/manifest.json: is not " in said
        assert len(store.verify(200)) == 1
        assert store.latest_good() == 100


@pytest.mark.parametrize("depth", [101, 250, 900, 100_000])
@pytest.mark.parametrize("brackets", ["[]", '{"a":}'])
def test_deep_manifests(store: CheckpointStore, depth: int, brackets: str) -> None:
    """Past what a parser can follow, and past what check_json allows: a line, and not the end of the process."""
    opening, closing = brackets[:-1], brackets[-1]
    text = (store.folder / STEP / "manifest.json").read_text()
    deep = opening * depth + "1" + closing * depth if brackets != "[]" else opening * depth + closing * depth
    write(store.folder / STEP, text.replace('"state": {', f'"state": {{"deep": {deep}, ').encode())
    said = refused(store)
    assert "manifest.json: " in said
    assert "deep" in said or "recursion" in said or "is not JSON" in said
    assert store.latest_good() == 100


def test_what_could_not_be_read_back_is_not_saved(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    deep: dict[str, Any] = {}
    for _ in range(150):
        deep = {"below": deep}
    refusals: list[tuple[dict[str, Any], str]] = [
        (deep, "is nested more than 100 deep"),
        ({"name": "half of a pair: \ud800"}, "state.name: 'half of a pair: \\ud800' is not text in Unicode"),
        ({"\udfff": 1}, "state: '\\udfff' is not text in Unicode"),
    ]
    for state, line in refusals:
        with pytest.raises(CheckpointError) as caught:
            store.save(1, [], state)
        assert line in str(caught.value)
    assert store.steps() == []
    kept = {"text": "\u2028 \x00 \U0001f600 \x7f", "number": 10**4000, "small": 5e-324, "empty": [{}, []]}
    nested: Any = 1
    for _ in range(99):
        nested = [nested]
    store.save(1, [], kept | {"nested": nested})
    assert store.read_state(1) == kept | {"nested": nested}


JUNK: list[Any] = [None, True, -1, 0, 1, 7, 2**63, 10**40, 0.5, float("nan"), [], [7], [0], {}]
JUNK += ["", "..", "float32", "int8", "master/norm.weight"]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a tree of JSON, by its path."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in below for place in places(item, (*path, key)))]


def test_random_forgeries_are_refused_or_harmless(store: CheckpointStore) -> None:
    """Junk anywhere: what is loaded in the end is what was saved, or nothing is and a line says why."""
    folder, truth = store.folder / STEP, random_tensors(200)
    original = json.loads((folder / "manifest.json").read_text())
    everywhere = [place for place in places(original) if place]
    refusals = 0
    for _ in range(400):
        forged = copy.deepcopy(original)
        for _ in range(random.randint(1, 3)):
            *above, last = random.choice(everywhere)
            try:
                place = forged
                for part in above:
                    place = place[part]
                if random.random() < 0.25:
                    del place[last]
                else:
                    place[last] = random.choice(JUNK)
            except (KeyError, IndexError, TypeError):
                continue  # an earlier piece of junk took its place
        write(folder, json.dumps(forged).encode())
        into = blank_like(truth)
        line = ""
        try:
            store.load(200, whole_fragments(into))
        except CheckpointError as error:
            line = str(error)
        assert line.isprintable()
        assert STEP in line or not line
        assert_same_bits(into, blank_like(truth) if line else truth)
        refusals += bool(line)
        store.verify(200)
        assert store.latest_good() in (100, 200)
    assert refusals > 200
