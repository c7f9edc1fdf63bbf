"""Every file of a checkpoint damaged in every way: always noticed, always named, and an older step is found."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.checkpoint import CheckpointError, CheckpointStore
from harness.parallel import Fragment
from tests.checkpoint.states import blank_like, fragment_at, random_tensors, random_tiling, whole_fragments
from tests.checkpoint.test_layouts import save_together

STEP = "step-00000200"


@pytest.fixture(scope="module", params=[1, 3], ids=["one writer", "three writers"])
def pristine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the steps 100 and 200, several files a writer, none of which may be touched."""
    folder = tmp_path_factory.mktemp("pristine") / "checkpoints"
    rng = np.random.default_rng()
    for step in (100, 200):
        tensors = random_tensors(step)
        if request.param == 1:
            CheckpointStore(folder, max_file_bytes=700).save(step, whole_fragments(tensors), {"step": step})
            continue
        shares: list[list[Fragment]] = [[] for _ in range(request.param)]
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            for box in random_tiling(rng, tuple(tensor.shape), 5 if tensor.dim() else 0):
                shares[rng.integers(request.param)].append(fragment_at(name, kind, tensor, box))
        assert save_together(folder, step, shares, {"step": step}) == [None] * request.param
    return folder


@pytest.fixture
def fresh(pristine: Path, tmp_path: Path) -> Callable[[], CheckpointStore]:
    """Call it for a copy to damage."""

    def copy() -> CheckpointStore:
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        shutil.copytree(pristine, tmp_path / "checkpoints")
        return CheckpointStore(tmp_path / "checkpoints")

    return copy


def files_of(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir())
    assert names[:2] == ["manifest.json", "manifest.sha256"]
    assert len(names) >= 4
    return names


def refused(store: CheckpointStore, step: int = 200) -> str:
    """The one line of the error with which `step` is refused, after a look that no memory was touched."""
    into = blank_like(random_tensors(step))
    before = {key: tensor.clone() for key, tensor in into.items()}
    with pytest.raises(CheckpointError) as caught:
        store.load(step, whole_fragments(into))
    assert all(torch.equal(into[key], before[key]) for key in into)
    line = str(caught.value)
    assert line.isprintable()
    return line


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def cut_one_byte(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def cut_to_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + random.choice([b"\0", b"\n", b" " * 4096]))


def blank_a_block(path: Path) -> None:
    """What a lost write leaves: zeros, the size as it was."""
    content = bytearray(path.read_bytes())
    start = random.randrange(len(content) - 16)
    content[start : start + 512] = bytes(len(content[start : start + 512]))
    path.write_bytes(content)


def replace_by_a_link(path: Path) -> None:
    """To the very same bytes: a checkpoint holds its own files."""
    elsewhere = path.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_a_pipe(path: Path) -> None:
    """Reading it would wait for ever."""
    path.unlink()
    os.mkfifo(path)


def replace_by_the_earlier_steps(path: Path) -> None:
    earlier = path.parent.parent / "step-00000100"
    name = path.name if (earlier / path.name).exists() else files_of(earlier)[-1]
    path.write_bytes((earlier / name).read_bytes())


BY_SIZE = "bytes and the manifest says"
LINES: dict[Callable[[Path], None], str] = {
    flip_a_bit: "digest differs from",
    cut_one_byte: BY_SIZE,
    cut_to_half: BY_SIZE,
    empty: BY_SIZE,
    append: BY_SIZE,
    blank_a_block: "digest differs from",
    Path.unlink: "cannot be read (No such file or directory)",
    replace_by_a_link: "is not a plain file",
    replace_by_a_folder: "is not a plain file",
    replace_by_a_pipe: "is not a plain file",
    replace_by_the_earlier_steps: "",
}


@pytest.mark.parametrize("damage", LINES)
def test_damage_to_any_file_is_noticed_and_named(
    fresh: Callable[[], CheckpointStore], damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    names = files_of(fresh().folder / STEP)
    for name in names:
        caplog.clear()
        store = fresh()
        path = store.folder / STEP / name
        damage(path)
        line = refused(store)
        of_manifest = name.startswith("manifest")
        # Of the manifest and its digest it cannot be told which one was changed: both are named.
        named = str(path) if not of_manifest else f"{store.folder / STEP}/manifest."
        assert named in line
        assert name in line
        assert line.endswith("; use an earlier step: 100")
        assert (LINES[damage] if not (of_manifest and LINES[damage] == BY_SIZE) else "digest differs") in line
        problems = store.verify(200)
        assert len(problems) == 1
        assert line.startswith(problems[0])
        if of_manifest or "digest differs" not in line:
            assert store.latest_good() == 100, "seen without reading the tensors"
        assert store.latest_good(verify=True) == 100
        assert f"checkpoint of step 200 is passed over: {problems[0]}" in caplog.text
        assert store.load(100, whole_fragments(blank_like(random_tensors(100)))) == {"step": 100}


def test_every_damaged_file_is_named(fresh: Callable[[], CheckpointStore]) -> None:
    """Several at once, in random ways."""
    for _ in range(12):
        store = fresh()
        tensors = files_of(store.folder / STEP)[2:]
        chosen = random.sample(tensors, random.randint(2, len(tensors)))
        for name in chosen:
            random.choice([damage for damage in LINES if damage is not replace_by_the_earlier_steps])(
                store.folder / STEP / name
            )
        problems = store.verify(200)
        assert {problem.partition(": ")[0] for problem in problems} == {str(store.folder / STEP / n) for n in chosen}
        assert len(problems) == len(chosen)
        assert store.latest_good(verify=True) == 100


def exchange(first: Path, second: Path) -> None:
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def test_swapped_names(fresh: Callable[[], CheckpointStore]) -> None:
    names = files_of(fresh().folder / STEP)
    for first in names:
        second = random.choice([name for name in names if name != first])
        store = fresh()
        exchange(store.folder / STEP / first, store.folder / STEP / second)
        line = refused(store)
        assert STEP in line
        assert first in line or second in line
        assert store.verify(200)
        assert store.latest_good(verify=True) == 100


def test_swapped_names_of_equal_sizes(tmp_path: Path) -> None:
    """What only the digests can tell; without them the exchanged tensors would be loaded."""
    store = CheckpointStore(tmp_path, max_file_bytes=1)
    for step in (100, 200):
        store.save(step, [Fragment.whole(name, "master", torch.randn(4)) for name in "ab"], {})
    first, second = (tmp_path / STEP / f"tensors-0000{number}.safetensors" for number in (0, 1))
    assert first.stat().st_size == second.stat().st_size
    exchange(first, second)
    into = [Fragment.whole(name, "master", torch.full((4,), 77.0)) for name in "ab"]
    with pytest.raises(CheckpointError, match=r"tensors-00000\.safetensors: digest differs"):
        store.load(200, into)
    assert all((fragment.tensor == 77).all() for fragment in into)
    assert [problem.partition(": ")[0] for problem in store.verify(200)] == [str(first), str(second)]
    assert store.latest_good(verify=True) == 100


def test_names_of_other_steps(fresh: Callable[[], CheckpointStore]) -> None:
    store = fresh()
    for name in ("manifest.json", "manifest.sha256"):
        shutil.copy(store.folder / "step-00000100" / name, store.folder / STEP / name)
    assert f"{store.folder / STEP}/manifest.json: is of step 100, but its folder says 200" in refused(store)
    assert store.latest_good() == 100

    store = fresh()
    (store.folder / STEP).rename(store.folder / "step-00000300")
    assert "step-00000300/manifest.json: is of step 200, but its folder says 300" in refused(store, 300)
    assert store.latest_good() == 100
    assert "has no step 200; steps there: 100, 300" in refused(store)

    store = fresh()
    exchange(store.folder / STEP, store.folder / "step-00000100")
    for step in (100, 200):
        assert f"is of step {300 - step}, but its folder says {step}" in refused(store, step)
        assert len(store.verify(step)) == 1
    assert store.latest_good() is None


def test_a_disk_that_fails_under_a_file(fresh: Callable[[], CheckpointStore], monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while reading is damage like any other: named, and the earlier step is used."""
    store = fresh()
    bad = store.folder / STEP / files_of(store.folder / STEP)[-1]
    original = Path.open

    def open_file(path: Path, *arguments: object, **options: object) -> object:
        if path == bad:
            raise OSError(5, "Input/output error", str(path))
        return original(path, *arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", open_file)
    assert store.verify(200) == [f"{bad}: cannot be read (Input/output error): the file is damaged"]
    assert store.latest_good(verify=True) == 100


def test_without_verification_sizes_and_headers_still_count(fresh: Callable[[], CheckpointStore]) -> None:
    store = fresh()
    path = store.folder / STEP / files_of(store.folder / STEP)[2]
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert store.latest_good() == 200
    assert store.latest_good(verify=True) == 100
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        store.load(200, whole_fragments(blank_like(random_tensors(200))), verify=False)
