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
def test_every_way_to_sample_the_mixture_gives_its_text(demo_pair: Ensemble) -> None:
    options: dict[str, Any] = {"seed": 5, "max_tokens": 10}
    expected = pieces(demo_pair.generate(QUESTIONS[0], **options))
    drafted = demo_pair.generate(QUESTIONS[0], method="speculative", draft="smollm2-135m", block=3, **options)
    assert pieces(drafted) == expected
    assert 0 < drafted.usage.accepted <= drafted.usage.drafted
    assert pieces(demo_pair.generate(QUESTIONS[0], method="speculative", draft="lookup", **options)) == expected
    auto = demo_pair.generate(QUESTIONS[0], method="auto", **options)
    assert pieces(auto) == expected
    assert auto.usage.chosen


@pytest.mark.slow
def test_drafted_greedy_is_greedy(demo_pair: Ensemble) -> None:
    options: dict[str, Any] = {"method": "greedy", "seed": 0, "max_tokens": 8}
    plain, *drafted = (demo_pair.generate(QUESTIONS[0], **options, draft=d) for d in (None, "smollm2-135m", "lookup"))
    for completion in drafted:
        assert [token.data for token in completion.tokens] == [token.data for token in plain.tokens]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mixture", "conventional", "speculative"])
def test_completions_of_a_batch_are_those_generated_one_by_one(demo_pair: Ensemble, method: Any) -> None:
    options: dict[str, Any] = {"seed": 7, "max_tokens": 4, "method": method}
    together = demo_pair.generate(QUESTIONS, **options)
    alone = [demo_pair.generate(question, sequence=i, **options) for i, question in enumerate(QUESTIONS)]
    assert [pieces(completion) for completion in together] == [pieces(completion) for completion in alone]
    # Several sequences were in one forward, or this would not test it.
    assert all(member.engine.runner.batches for member in demo_pair.members)  # type: ignore[attr-defined]
