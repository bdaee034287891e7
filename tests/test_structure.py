"""The house as docs/structure.md and the layers of pyproject.toml describe it, and the words of its names."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "mixlm"
STRUCTURE = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")

# Words that are no names: what something is has a better one.
PRIVATE_WORDS = {"one", "found", "at", "those", "here", "most", "told", "asked", "law", "reply"}


def rooms() -> set[str]:
    """The packages and modules directly under src/mixlm, but for the entry points."""
    names = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    return names - {"__init__", "__main__"}


def layers() -> list[list[str]]:
    """The rooms of each layer of the import contract, from the top down."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    [contract] = [contract for contract in contracts if contract["type"] == "layers"]
    return [layer.split(" | ") for layer in contract["layers"] if not layer.startswith("(")]


def picture() -> list[list[str]]:
    """The rooms of each line of the picture, from the top down."""
    lines = STRUCTURE.split("```")[1].strip("\n").splitlines()
    return [re.split(r"\s{2,}", line.strip())[0].split(" · ") for line in lines]


def room_table() -> list[tuple[list[str], list[str]]]:
    """The rooms of each row of the table of rooms, and the modules that the row names."""
    lines = STRUCTURE.split("## Rooms")[1].split("##")[0].strip().splitlines()[2:]
    return [tuple(re.findall(r"`([^`]+)`", cell) for cell in line.strip("|").split("|")) for line in lines]


def named_files() -> set[str]:
    """What the page names with a folder: `core/options`, `engines/registry.py`."""
    return set(re.findall(r"`((?:\w+/)+[\w.]+)`", STRUCTURE.split("## Rooms")[0] + STRUCTURE.split("## Where")[1]))


def exists(name: str, base: Path) -> bool:
    """Whether a file, a folder or a module has this name."""
    path = base / name
    return path.exists() or path.with_suffix(".py").exists()


@cache
def modules() -> list[tuple[Path, list[ast.AST]]]:
    """The files of the package and of research, by their paths from the root, with all their nodes."""
    files = [path for folder in (SOURCE, ROOT / "research") for path in sorted(folder.rglob("*.py"))]
    return [(path.relative_to(ROOT), [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]) for path in files]


def bound_names(nodes: list[ast.AST]) -> Iterator[tuple[str, int]]:
    """Variables and parameters, with their lines."""
    for node in nodes:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno


def test_the_import_contract_has_every_room_once():
    assert sorted(name for layer in layers() for name in layer) == sorted(rooms())


def test_the_picture_has_every_room_once_in_the_order_of_the_contract():
    shown = picture()
    assert sorted(name for line in shown for name in line) == sorted(rooms())
    heights = {name: height for height, layer in enumerate(layers()) for name in layer}
    order = [heights[name] for line in shown for name in line]
    assert order == sorted(order)


def test_the_table_names_rooms_and_modules_that_exist():
    for names, files in room_table():
        assert set(names) <= rooms()
        for module in files:
            assert any(exists(module, SOURCE / name) for name in names), f"{names} has no {module}"


@pytest.mark.parametrize("name", sorted(named_files()))
def test_a_file_that_the_page_names_exists(name):
    assert exists(name, SOURCE) or exists(name, ROOT)


def test_no_two_classes_share_a_name():
    places = defaultdict(list)
    for path, nodes in modules():
        for node in nodes:
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{path}:{node.lineno}")
    assert {name: lines for name, lines in places.items() if len(lines) > 1} == {}


def test_names_are_nouns_of_the_field():
    private = [
        f"{path}:{line}: {name}"
        for path, nodes in modules()
        for name, line in bound_names(nodes)
        if name in PRIVATE_WORDS
    ]
    assert private == []


@pytest.mark.parametrize("file", ["Makefile", "research/gpu_check.sh"])
def test_environments_for_tests_have_what_the_settings_of_tests_need(file):
    commands = (ROOT / file).read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    installs = [set(command.split()) for command in commands if "pip " in command and " pytest " in command]
    assert installs
    for packages in installs:
        assert packages >= {"pytest", "pytest-timeout", "hypothesis"}
