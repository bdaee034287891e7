"""The table of modules in docs/structure.md holds: a module imports modules of lower rows only."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "mixlm"


def rows() -> list[tuple[int, list[str]]]:
    """Each row of the table: its number and its modules."""
    results = []
    for line in (ROOT / "docs" / "structure.md").read_text(encoding="utf-8").splitlines():
        if cells := re.fullmatch(r"\|\s*(\d+)\s*\|([^|]*)\|.*", line.strip()):
            results.append((int(cells[1]), re.findall(r"`([^`]+)`", cells[2])))
    return results


def modules() -> dict[str, Path]:
    """Every module but the package's own, by its path; a package's name stands for its `__init__`."""
    out = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = "/".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            out[name] = path
    return out


def imported(name: str, path: Path, known: set[str]) -> set[str]:
    """The modules of mixlm that a module imports, at its head or anywhere else."""
    out = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            # `from mixlm.a import b` may mean the module a/b.
            deeper = [f"{node.module}.{name.name}" for name in node.names]
            targets = [one if one.replace(".", "/").removeprefix("mixlm/") in known else node.module for one in deeper]
        else:
            continue
        for target in targets:
            inside = target.split(".")
            if inside[0] == "mixlm" and len(inside) > 1:
                out.add("/".join(inside[1:]))
    return out - {name}


def test_the_table_lists_every_module_once():
    listed = [name for _, names in rows() for name in names]
    assert sorted(listed) == sorted(set(listed))
    assert set(listed) == set(modules())


@pytest.mark.parametrize("name", modules())
def test_a_module_imports_modules_of_lower_rows_only(name):
    place = {name: (row, number) for number, (row, names) in enumerate(rows()) for name in names}
    known = set(modules())
    assert name in place, f"the table lacks {name}"
    for other in imported(name, modules()[name], known):
        assert other in place, f"the table lacks {other}, which {name} imports"
        lower = place[other][0] < place[name][0]
        # Modules in one cell belong together.
        assert lower or place[other] == place[name], f"{name} imports {other}, which is not of a lower row"


def test_what_a_module_imports_is_found(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "import mixlm\nimport mixlm.core.rng\nfrom mixlm.units import tokens\nfrom mixlm.errors import MixlmError\n"
        "def f():\n    from mixlm.engines.toy import ToyEngine\nfrom numpy import linalg\n"
    )
    assert imported("x", path, set(modules())) == {"noise", "vocab/tokens", "errors", "engines/toy"}
