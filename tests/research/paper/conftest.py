"""Fixtures: the command line, toy ensembles and questions on disk."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from evaluating import command_line, write_questions

# Without the extra `paper` there is neither a harness nor a figure to test.
collect_ignore_glob = [] if find_spec("lm_eval") and find_spec("matplotlib") else ["test_*.py"]


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Run `python -m research.paper` in this process: exit code, stdout, stderr."""
    from research.paper.__main__ import main

    return command_line(capsys, monkeypatch, tmp_path, main)


@pytest.fixture
def toys(tmp_path: Path) -> str:
    """An ensemble file of two toys."""
    path = tmp_path / "toys.toml"
    path.write_text('[[members]]\nmodel = "toy:1"\nweight = 3\n[[members]]\nmodel = "toy:2"\nweight = 1\n')
    return str(path)


@pytest.fixture
def questions(tmp_path: Path) -> str:
    """A folder with three questions of each of the paper's tasks."""
    return str(write_questions(tmp_path / "questions"))
