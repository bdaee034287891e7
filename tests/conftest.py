"""Settings of every test, and the models that some of them need."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from hypothesis import settings

from mixlm.ensemble import Ensemble

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # there are as many workers as cores

pytest.register_assert_rewrite("mixlm.engines.contract", "toys", "vllm_cases")

# Rarer searches for garbage among everything that is imported: a fifth of the time that it takes to find the tests.
gc.set_threshold(50_000, 10, 10)

# No time limits for examples, and the same examples in every run.
settings.register_profile("mixlm", deadline=None, derandomize=True, max_examples=60, database=None)
settings.register_profile("fast", settings.get_profile("mixlm"), max_examples=8)
settings.load_profile("mixlm")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sets", type=int, metavar="N", help="run each test with N of its parameter sets, evenly spread")


def _loads(item: pytest.Item) -> int:
    """What a test needs: the real models, the evaluation harness, or neither. Workers then load each once, not both."""
    if "demo_pair" in getattr(item, "fixturenames", ()):
        return 0
    return 1 if {"evaluation", "paper"} & {*item.path.parts} else 2


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put tests of what takes long to load together, and leave parameter sets out for `make test-fast`."""
    items.sort(key=_loads)
    limit = config.getoption("--sets")
    if limit is None:
        return
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = set()
    for sets in tests.values():
        count = min(limit, len(sets))
        kept |= {sets[i * (len(sets) - 1) // max(count - 1, 1)] for i in range(count)}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture(scope="session")
def demo_models() -> dict[str, Path]:
    """Folders of the demo models, by name."""
    from mixlm.errors import ModelNotFoundError
    from mixlm.models.catalog import GROUPS
    from mixlm.models.resolve import resolve

    try:
        return {name: Path(resolve(name).path_or_id) for name in GROUPS["demo"]}
    except ModelNotFoundError:
        pytest.skip("the demo models are not installed")


@pytest.fixture(scope="session")
def demo_installed(demo_models: dict[str, Path]) -> None:
    """Asks for the demo models without looking at them: for tests that run commands."""


@pytest.fixture(scope="session")
def demo_pair(demo_models: dict[str, Path]) -> Ensemble:
    """The demo pair in float32, for tests of exactness."""
    from mixlm.loading import load

    return load(*demo_models.values(), engine="hf", dtype="float32")
