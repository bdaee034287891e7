"""Fixtures that run the command line."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator

import pytest
from programs import Result, Run, Terminal


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No colours by the environment, and no installed models."""
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MIXLM_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process."""
    from mixlm.cli import main

    def run(*arguments: str, stdin: str | bytes = "") -> Result:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        code = main(list(arguments))
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def at_terminal() -> Iterator[Callable[..., Terminal]]:
    """Start the command line at a pseudo-terminal."""
    started: list[Terminal] = []

    def start(*arguments: str, before: str = "", **environment: str) -> Terminal:
        started.append(Terminal(*arguments, before=before, **environment))
        return started[-1]

    yield start
    for terminal in started:
        terminal.close()
