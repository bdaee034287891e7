"""The limits within which a grammar is compiled."""

from __future__ import annotations

import pytest

from mixlm.core import grammar_check
from mixlm.core.grammar_check import CompileLimits
from mixlm.errors import ConfigError


def test_the_time_of_a_schema_is_that_of_all_vocabularies_and_sources(monkeypatch):
    monkeypatch.setattr(grammar_check, "_check", lambda source, **_limits: 0.6)
    check = CompileLimits(max_chars=9, timeout=2.0, num_vocabularies=2)
    check("{}")
    with pytest.raises(ConfigError, match="takes longer than 2 s"):
        check("{}")
    with pytest.raises(ConfigError, match="takes longer than 2 s"):
        CompileLimits(max_chars=9, timeout=2.0, num_vocabularies=4)("{}")
