from __future__ import annotations

import subprocess
import sys

import pytest

import mixlm
from mixlm import routing


def test_the_public_names_are_these():
    assert mixlm.__all__ == [
        "Chat",
        "Completion",
        "Ensemble",
        "Generation",
        "Message",
        "MixlmError",
        "Sampling",
        "Token",
        "Tool",
        "ToolCall",
        "Usage",
        "__version__",
        "load",
    ]


def test_every_public_name_is_there():
    for module in (mixlm, routing):
        for name in module.__all__:
            assert getattr(module, name) is not None
        assert {*module.__all__} <= {*dir(module)}  # what a shell completes


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'mixlm' has no attribute 'nothing'"):
        mixlm.nothing  # noqa: B018


def in_a_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


HEAVY = "('torch', 'transformers', 'tokenizers', 'starlette', 'uvicorn', 'prometheus_client', 'rich', 'typer', 'scipy')"


@pytest.mark.parametrize("use", ["pass", "mixlm.Sampling(), mixlm.Message('user', 'x')"])
def test_importing_it_imports_nothing_heavy(use):
    code = f"import sys, mixlm; {use}; print([one for one in {HEAVY} if one in sys.modules])"
    assert in_a_fresh_process(code) == "[]"


@pytest.mark.slow
def test_a_toy_ensemble_needs_no_torch():
    code = (
        "import sys, mixlm; pair = mixlm.load('toy:1', 'toy:2'); "
        "print(len(pair.generate('x', seed=0, max_tokens=3, ignore_end=True).tokens), "
        f"[one for one in {HEAVY} if one in sys.modules])"
    )
    assert in_a_fresh_process(code) == "3 []"


def test_the_older_name_of_a_generation_is_an_alias():
    assert mixlm.Stream is mixlm.Generation
