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


@pytest.mark.slow
def test_the_start_of_the_process_is_not_the_time_of_a_schema(monkeypatch, tmp_path):
    slow = tmp_path / "slow.py"
    worker = str(grammar_check._WORKER)
    slow.write_text(f"import runpy, time\ntime.sleep(3)\nrunpy.run_path({worker!r}, run_name='__main__')")
    monkeypatch.setattr(grammar_check, "_WORKER", slow)
    CompileLimits(max_chars=99, timeout=2.5, num_vocabularies=1)('start: "a"')
