"""What is imported, counted in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "pydantic", "starlette", "uvicorn", "rich", "typer", "tokenizers")
SOURCES = Path(__file__).parents[1] / "src"


def imported_by(code: str) -> list[str]:
    program = f"import json, sys\n{code}\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    modules: list[str] = json.loads(done.stdout.splitlines()[-1])
    return modules


def assert_small(modules: list[str], *, most: int, most_lines: int) -> None:
    """Check how many modules of mixlm there are, and how many lines they have together."""
    own = [name for name in modules if name == "mixlm" or name.startswith("mixlm.")]
    paths = [SOURCES.joinpath(*name.split(".")) for name in own]
    files = [path / "__init__.py" if path.is_dir() else path.with_suffix(".py") for path in paths]
    assert len(own) <= most
    assert sum(len(file.read_text("utf-8").splitlines()) for file in files) <= most_lines


def test_the_package_itself_imports_neither_torch_nor_a_web_framework_nor_pydantic():
    assert not set(HEAVY) & set(imported_by("import mixlm"))


@pytest.mark.slow
def test_models_and_logs_are_imported_where_the_system_has_no_fcntl():
    imported_by(
        "sys.modules['fcntl'] = None\nimport mixlm.models.gguf, mixlm.models.fetch, mixlm.evaluation.run_folder"
    )


@pytest.mark.slow
def test_a_file_that_is_not_there_is_missed_before_libraries_are_imported():
    program = (
        "import mixlm\ntry: mixlm.load('no.gguf')\nexcept mixlm.MixlmError as error: assert 'no GGUF' in str(error)"
    )
    assert not {"torch", "transformers"} & set(imported_by(program))


@pytest.mark.slow
def test_a_generation_of_toys_imports_little_that_it_does_not_use():
    modules = imported_by("import mixlm\nmixlm.load('toy:1', 'toy:2').generate('x', max_tokens=2)")
    routers = ("features", "prompt", "function", "gate", "gate_router", "observation")
    assert not {f"mixlm.routing.{name}" for name in routers} & set(modules)
    assert_small(modules, most=41, most_lines=7900)


@pytest.mark.models
@pytest.mark.slow
def test_a_generation_in_transformers_imports_little_that_it_does_not_use(demo_installed):
    load = "mixlm.load('smollm2-135m', 'smollm2-135m', engine='hf')"
    modules = imported_by(f"import mixlm\n{load}.generate('x', max_tokens=2)")
    assert_small(modules, most=63, most_lines=11_800)
