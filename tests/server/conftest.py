from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from serving import Process, Running, running

from mixlm.loading import load


@pytest.fixture(scope="module")
def toys() -> Iterator[Running]:
    """A server of two toys."""
    with running(load("toy:1", "toy:2")) as one:
        yield one


@pytest.fixture
def process() -> Iterator[Callable[..., Process]]:
    """Start `mixlm serve`."""
    started: list[Process] = []

    def start(*arguments: str, **options: Any) -> Process:
        started.append(Process(*arguments, **options))
        return started[-1]

    yield start
    for one in started:
        one.close()
