"""Texts of the demo pair in float32: however they are written, the same noise gives the same text."""

from __future__ import annotations

from typing import Any

import pytest

from mixlm import Ensemble
from mixlm.types import Completion

pytestmark = pytest.mark.models

QUESTIONS = ["Why is the sky blue?", "Name three fruits.", "Write a line of Python that sorts a list: déjà vu 😀"]


def pieces(completion: Completion) -> list[tuple[bytes, str]]:
    return [(one.data, one.member) for one in completion.tokens]


@pytest.mark.parametrize("how", [{"draft": "smollm2-135m", "block": 3}, {"draft": "lookup"}])
def test_speculative_writes_the_mixtures_text(demo_pair: Ensemble, how: dict[str, Any]) -> None:
    options: dict[str, Any] = {"seed": 5, "max_tokens": 24}
    expected = demo_pair.generate(QUESTIONS[0], **options)
    found = demo_pair.generate(QUESTIONS[0], method="speculative", **how, **options)
    assert pieces(found) == pieces(expected)
    if how["draft"] != "lookup":
        assert 0 < found.usage.accepted <= found.usage.drafted


def test_auto_writes_the_mixtures_text(demo_pair: Ensemble) -> None:
    options: dict[str, Any] = {"seed": 6, "max_tokens": 24}
    found = demo_pair.generate(QUESTIONS[1], method="auto", **options)
    assert pieces(found) == pieces(demo_pair.generate(QUESTIONS[1], **options))
    assert found.usage.chosen


@pytest.mark.parametrize("draft", ["smollm2-135m", "lookup"])
def test_drafted_greedy_is_greedy(demo_pair: Ensemble, draft: str) -> None:
    options: dict[str, Any] = {"method": "greedy", "seed": 0, "max_tokens": 20}
    expected = demo_pair.generate(QUESTIONS[0], **options)
    found = demo_pair.generate(QUESTIONS[0], **options, draft=draft)
    assert [one.data for one in found.tokens] == [one.data for one in expected.tokens]


@pytest.mark.parametrize("method", ["mixture", "conventional", "speculative"])
def test_replies_written_together_are_those_written_one_by_one(demo_pair: Ensemble, method: Any) -> None:
    options: dict[str, Any] = {"seed": 7, "max_tokens": 12, "method": method}
    together = demo_pair.generate(QUESTIONS, **options)
    alone = [demo_pair.generate(one, sequence=i, **options) for i, one in enumerate(QUESTIONS)]
    assert [pieces(one) for one in together] == [pieces(one) for one in alone]
    # Several replies were in one forward, or this would be no test of it.
    assert all(one.engine.runner.batches for one in demo_pair.members)  # type: ignore[attr-defined]
