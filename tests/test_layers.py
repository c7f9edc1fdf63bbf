"""The layers of the house: an import only ever points down, and other rooms are entered by their door."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = [
    {"kernels", "config", "stop"},
    {"disk"},
    {"text"},
    {"parallel"},
    {"optim"},
    {"model"},
    {"data", "checkpoint", "runs"},
    {"callbacks", "report"},
    {"convert"},
    {"evaluate", "plan"},
    {"selection", "normfree", "scaling"},
    {"forecast"},
    {"settings", "model_folder"},
    {"start"},
    {"train"},
    {"remove_norms"},
    {"studies", "run_report"},
    {"cli_study"},
    {"cli", "launcher"},
    {"__main__"},
]
HEIGHT = {room: height for height, rooms in enumerate(LAYERS) for room in rooms}
# Light enough for `harness --help`: the one file that is imported past its room's door.
EXCEPTIONS = {("cli", "harness.config.errors"), ("cli_study", "harness.config.errors")}
ONLY_IN_PARALLEL = ("deepspeed", "megatron.core.parallel_state", "megatron.core.tensor_parallel")


def sources() -> dict[Path, str]:
    """Every source file with the room that it belongs to."""
    found = dict.fromkeys((ROOT / "kernels").rglob("*.py"), "kernels")
    for path in (ROOT / "harness").rglob("*.py"):
        room = path.relative_to(ROOT / "harness").parts[0].removesuffix(".py")
        found[path] = room
    return found


def imported_modules(path: Path) -> list[str]:
    """The absolute names that a file imports, inside functions too."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names += [f"harness.{a.name}" for a in node.names] if node.module == "harness" else [node.module]
    return names


def problems(path: Path, room: str) -> list[str]:
    found = []
    for name in imported_modules(path):
        if name.startswith(ONLY_IN_PARALLEL) and room != "parallel":
            found.append(f"{path}: only parallel/ may touch {name}")
        if name.split(".")[0] == "kernels":
            found.append(f"{path}: import harness.kernels, not kernels")
        if not name.startswith("harness.") or name == "harness.__version__" or room == "__init__":
            continue
        target = name.split(".")[1]
        if target == room and room not in HEIGHT:
            continue
        if target != room and HEIGHT[target] >= HEIGHT[room]:
            found.append(f"{path}: {room} may not import {name}, which lies no lower")
        if target != room and name.count(".") > 1 and (room, name) not in EXCEPTIONS:
            found.append(f"{path}: enter {target} by its door, not by {name}")
    return found


def test_imports_point_down_and_enter_by_the_door() -> None:
    found = sources()
    assert len(found) > 40
    assert not [line for path, room in found.items() for line in problems(path, room)]


def test_every_room_says_what_it_is() -> None:
    for path in sources():
        if path.name == "__init__.py":
            doc = ast.get_docstring(ast.parse(path.read_text()))
            assert doc, f"{path} has no docstring"


def test_the_check_sees_violations(tmp_path: Path) -> None:
    wrong = {
        "from harness.train import train": "no lower",
        "from harness.data.stream import TokenStream": "door",
        "def f():\n    import deepspeed": "only parallel",
        "import kernels.linear_cross_entropy": "harness.kernels",
        "from harness import cli": "no lower",
    }
    for source, message in wrong.items():
        path = tmp_path / "module.py"
        path.write_text(source)
        assert any(message in line for line in problems(path, "callbacks")), source


def test_files_stay_small() -> None:
    lengths = sorted(len(path.read_text().splitlines()) for path in sources())
    assert lengths[len(lengths) // 2] <= 150
    assert lengths[len(lengths) * 9 // 10] <= 350
    assert lengths[-1] <= 600


def test_every_room_is_installed() -> None:
    """pyproject.toml lists the packages by hand."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    rooms = {
        file.parent.relative_to(ROOT) for room in ("harness", "kernels") for file in (ROOT / room).rglob("__init__.py")
    }
    named = {".".join(room.parts) for room in rooms}
    assert {name if name.startswith("harness") else f"harness.{name}" for name in named} == set(listed) - {
        "harness.configs"
    }
