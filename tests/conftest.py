"""Settings of every test, and the models that some of them need."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from mixlm.ensemble import Ensemble

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

pytest.register_assert_rewrite("mixlm.engines.contract", "toys", "vllm_cases")

# No time limits for examples, and the same examples in every run.
settings.register_profile("mixlm", deadline=None, derandomize=True, max_examples=60, database=None)
settings.load_profile("mixlm")


@pytest.fixture(scope="session")
def demo_models() -> dict[str, Path]:
    """Folders of the demo models, by name."""
    from mixlm.errors import ModelNotFoundError
    from mixlm.models import GROUPS, resolve

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
