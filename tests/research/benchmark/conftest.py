"""Fixtures: `python -m research.benchmark` in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line: exit code, stdout, stderr."""
    from research.benchmark.__main__ import main

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(list(arguments))
        return (code, *capsys.readouterr())

    return run
