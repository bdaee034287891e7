from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from serving import RunningServer, ServerProcess, running

from mixlm.loading import load


@pytest.fixture(scope="module")
def toys() -> Iterator[RunningServer]:
    """A server of two toys."""
    with running(load("toy:1", "toy:2")) as server:
        yield server


@pytest.fixture
def start_process() -> Iterator[Callable[..., ServerProcess]]:
    """Start `mixlm serve`."""
    processes: list[ServerProcess] = []

    def start(*arguments: str, **options: Any) -> ServerProcess:
        processes.append(ServerProcess(*arguments, **options))
        return processes[-1]

    yield start
    for process in processes:
        process.close()
