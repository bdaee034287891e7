"""What scripts that measure have in common: where they ran, and how long the calls of a method take."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mixlm.benchmark.report import environment


def measured_on(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what rows of a log depend on: the settings of a script, the processor, and the packages' versions."""
    where = environment([], dict(settings))
    return {key: where[key] for key in ("settings", "processor", "versions")}


@contextmanager
def timed_calls(owner: type, name: str) -> Iterator[list[float]]:
    """Note the seconds of each call of a class's method."""
    seconds: list[float] = []
    method = getattr(owner, name)

    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*arguments)
        finally:
            seconds.append(time.perf_counter() - start)

    setattr(owner, name, timed)
    try:
        yield seconds
    finally:
        setattr(owner, name, method)
