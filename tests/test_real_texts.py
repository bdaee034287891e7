"""Texts of the demo pair in float32: whatever the method, the same noise gives the same text."""

from __future__ import annotations

from typing import Any

import pytest

from mixlm import Ensemble
from mixlm.types import Completion

pytestmark = pytest.mark.models

QUESTIONS = ["Why is the sky blue?", "Name three fruits.", "Write a line of Python that sorts a list: déjà vu 😀"]


def pieces(completion: Completion) -> list[tuple[bytes, str]]:
    return [(token.data, token.member) for token in completion.tokens]


@pytest.mark.slow
@pytest.mark.parametrize("draft", [{"draft": "smollm2-135m", "block": 3}, {"draft": "lookup"}])
def test_speculative_gives_the_mixtures_text(demo_pair: Ensemble, draft: dict[str, Any]) -> None:
    options: dict[str, Any] = {"seed": 5, "max_tokens": 12}
    expected = demo_pair.generate(QUESTIONS[0], **options)
    completion = demo_pair.generate(QUESTIONS[0], method="speculative", **draft, **options)
    assert pieces(completion) == pieces(expected)
    if draft["draft"] != "lookup":
        assert 0 < completion.usage.accepted <= completion.usage.drafted


@pytest.mark.slow
def test_auto_gives_the_mixtures_text(demo_pair: Ensemble) -> None:
    options: dict[str, Any] = {"seed": 6, "max_tokens": 12}
    completion = demo_pair.generate(QUESTIONS[1], method="auto", **options)
    assert pieces(completion) == pieces(demo_pair.generate(QUESTIONS[1], **options))
    assert completion.usage.chosen


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["smollm2-135m", "lookup"])
def test_drafted_greedy_is_greedy(demo_pair: Ensemble, draft: str) -> None:
    options: dict[str, Any] = {"method": "greedy", "seed": 0, "max_tokens": 10}
    expected = demo_pair.generate(QUESTIONS[0], **options)
    completion = demo_pair.generate(QUESTIONS[0], **options, draft=draft)
    assert [token.data for token in completion.tokens] == [token.data for token in expected.tokens]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mixture", "conventional", "speculative"])
def test_completions_of_a_batch_are_those_generated_one_by_one(demo_pair: Ensemble, method: Any) -> None:
    options: dict[str, Any] = {"seed": 7, "max_tokens": 6, "method": method}
    together = demo_pair.generate(QUESTIONS, **options)
    alone = [demo_pair.generate(question, sequence=i, **options) for i, question in enumerate(QUESTIONS)]
    assert [pieces(completion) for completion in together] == [pieces(completion) for completion in alone]
    # Several sequences were in one forward, or this would not test it.
    assert all(member.engine.runner.batches for member in demo_pair.members)  # type: ignore[attr-defined]
