"""The engine keeps the contract of every engine."""

from pathlib import Path

import pytest
from mixlm_ngram import NgramEngine

from mixlm.engines.contract import *  # noqa: F403


@pytest.fixture
def engine():
    return NgramEngine("readme", Path(__file__).with_name("README.md").read_bytes())
