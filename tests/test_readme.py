"""What the README says is true: its Python runs, its commands run, its ensemble file loads."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from mixlm.cli import main
from mixlm.config import parse_config
from mixlm.engines.registry import ENGINES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = "".join(blocks("sh")).splitlines()
    return [line.split("  #")[0].strip() for line in lines if "mixlm " in line]


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).is_file(), target


def test_ensemble_file_is_valid() -> None:
    [text] = blocks("toml")
    assert [member.weight for member in parse_config(tomllib.loads(text), "README").members] == [0.6, 0.4]


def test_commands_that_need_more_than_the_demo_models_exist(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.split("  #")[0].split() for block in re.findall(r"\n```\n(mixlm.*?)```", README, flags=re.DOTALL)
             for line in block.splitlines()]  # fmt: skip
    assert {line[1] for line in lines} == {"serve", "score", "fit", "eval", "chat"}
    for line in lines:
        assert main([line[1], "--help"]) == 0
        shown = capsys.readouterr().out
        for option in (word for word in line if word.startswith("--")):
            assert option in shown, (line, option)


@pytest.fixture(scope="module")
def loaded_once(demo_installed: None) -> Iterator[None]:
    """Whatever loads a model in this process gets the engine that was loaded before."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("hf", "llamacpp"):
            module = import_module(ENGINES[name][0])
            patch.setattr(module, "load", cache(module.load))
        yield


@pytest.mark.models
def test_python_runs(loaded_once: None, capsys: pytest.CaptureFixture[str]) -> None:
    [code] = blocks("python")
    exec(code, {})  # where every warning is an error
    assert capsys.readouterr().out.strip()


@pytest.mark.models
def test_generate_runs_as_a_reader_types_it(demo_installed: None) -> None:
    [command] = [command for command in commands() if "generate" in command]
    command = command.replace("mixlm ", f"{Path(sys.executable).parent / 'mixlm'} ", 1) + " --max-tokens 8"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.models
@pytest.mark.parametrize("command", [command for command in commands() if not re.search("chat|generate", command)])
def test_shell_runs(loaded_once: None, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Fewer samples of fewer tokens, and shorter runs and texts than shown; the rest is as a reader would type it.
    command = re.sub(r"--samples \d+", "--samples 100 --top-k 4", command)
    command = re.sub(r"--tokens \d+ --repeats \d+", "--tokens 4 --repeats 1", command)
    if "inspect" in command:
        (tmp_path / "text").write_text("The ferry left the harbour a little after six.\n")
        command += f" --text {tmp_path / 'text'}"
    _, *arguments = shlex.split(command)
    code = main(arguments)
    out, err = capsys.readouterr()
    assert code == 0, err
    assert out.strip()
