"""What is imported, counted in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = ("torch", "transformers", "pydantic", "starlette", "uvicorn", "rich", "typer", "tokenizers")


def imported_by(code: str) -> list[str]:
    program = f"import json, sys\n{code}\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    modules: list[str] = json.loads(done.stdout)
    return modules


def test_the_package_itself_imports_neither_torch_nor_a_web_framework_nor_pydantic():
    assert not set(HEAVY) & set(imported_by("import mixlm"))


def test_routers_that_are_not_used_are_not_imported():
    modules = imported_by("import mixlm\nmixlm.load('toy:1', 'toy:2').generate('x', max_tokens=2)")
    routers = ("learned", "features", "prompt", "function", "gate", "gate_router")
    assert not {f"mixlm.routing.{name}" for name in routers} & set(modules)
    assert sum(name == "mixlm" or name.startswith("mixlm.") for name in modules) <= 53
