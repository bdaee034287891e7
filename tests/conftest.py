"""Settings of every test, and the models that some of them need."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
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


def _group(item: pytest.Item) -> str:
    """What a test needs that takes long to load: one worker loads it, and runs all tests that need it."""
    if "demo_pair" in getattr(item, "fixturenames", ()):
        return "demo pair"
    if item.path.name == "test_readme.py":
        return "models"
    return "evaluation" if {"evaluation", "paper"} & {*item.path.parts} else str(item.path)


def _seconds(item: pytest.Item) -> float:
    """Roughly how long a test takes."""
    return next((s for mark, s in (("models", 5.0), ("slow", 1.5)) if item.get_closest_marker(mark)), 0.02)


def _in_shares(items: Sequence[pytest.Item], workers: int) -> list[pytest.Item]:
    """Order tests so that workers load little twice, and none waits for the others at the end.

    Each worker begins with an equal number of tests, and takes over some of another's last ones when it has run its
    own. So a worker's share begins with groups of tests that take long, and ends with files whose tests do not.
    """
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        groups.setdefault(_group(item), []).append(item)
    seconds = {name: [_seconds(item) for item in group] for name, group in groups.items()}
    long = sorted((name for name in groups if max(seconds[name]) > 1), key=lambda name: -sum(seconds[name]))
    shares: list[list[pytest.Item]] = [[] for _ in range(workers)]
    totals = [0.0] * workers
    for name in long:
        fits = [k for k in range(workers) if len(shares[k]) + len(groups[name]) <= len(items) // workers]
        share = min(fits or range(workers), key=totals.__getitem__)
        shares[share] += groups[name]
        totals[share] += sum(seconds[name])
    short = [item for name, group in groups.items() if name not in long for item in group]
    for k, share_items in enumerate(shares):
        size = len(items) * (k + 1) // workers - len(items) * k // workers
        missing = max(size - len(share_items), 0)
        share_items.extend(short[:missing])
        del short[:missing]
    return [item for share_items in (*shares, short) for item in share_items]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave parameter sets out for `make test-fast`, and put tests in an order that suits several workers."""
    limit = config.getoption("--sets")
    if limit is not None:
        tests: dict[str, list[pytest.Item]] = {}
        for item in items:
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
        kept = set()
        for sets in tests.values():
            count = min(limit, len(sets))
            kept |= {sets[i * (len(sets) - 1) // max(count - 1, 1)] for i in range(count)}
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]
    items[:] = _in_shares(items, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


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
