"""The log-probabilities of a raw prompt, told with the reply that continues it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from speaking import speaking
from toys import SHARED, engine, ensemble

from mixlm.core.sampling import softmax
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.generation import prompt_logprobs as given
from mixlm.routing import FunctionRouter
from mixlm.scoring.score import score
from mixlm.scoring.scores import router_weights

TEXT = "The river turns under the old stone bridge; it's 2024 and señor naïve café 日本 🎉 ok"


def pair(unit: str) -> Ensemble:
    kinds = ("gpt2", "gpt2") if unit == "token" else ("gpt2", "gemma")
    return ensemble([speaking(kind, i) for i, kind in enumerate(kinds)], [0.7, 0.3], unit=unit)


@pytest.mark.parametrize("unit", ["token", "piece", "word", "byte"])
def test_a_prompts_segments_are_those_of_scoring(unit):
    those = pair(unit)
    found = those.generate(TEXT, raw=True, score_prompt=True, max_tokens=0)
    expected = score(those, TEXT, by_segment=True)
    assert "".join(one.text for one in found.prompt) == TEXT
    assert [one.data for one in found.prompt] == [
        expected.text[a:b] for a, b in zip(expected.starts, expected.ends, strict=True)
    ]
    np.testing.assert_allclose([one.logprob for one in found.prompt], expected.mixture(those.weights), atol=1e-5)
    assert (found.text, found.tokens, found.finish_reason) == ("", (), "length")


@pytest.mark.parametrize("rows", [1, 2, 3, 64])
def test_it_does_not_matter_in_how_many_parts_a_prompt_is_read(rows, monkeypatch):
    those = pair("piece")
    whole = those.generate(TEXT, raw=True, score_prompt=True, max_tokens=0, top_logprobs=3)
    monkeypatch.setattr(given, "_ROWS", rows)
    parts = those.generate(TEXT, raw=True, score_prompt=True, max_tokens=0, top_logprobs=3)
    assert parts.prompt == whole.prompt


def test_alternatives_are_those_of_the_plain_average():
    those = ensemble([engine(SHARED, seed=1), engine(SHARED, seed=2)], [0.6, 0.4], unit="token")
    text = "ab c abca"
    found = those.generate(text, raw=True, score_prompt=True, max_tokens=0, top_logprobs=4)
    begin, end = len(SHARED), len(SHARED) + 1
    context = [begin]
    for token in found.prompt:
        average = sum(
            weight * softmax(one.engine.table(tuple(context)))
            for weight, one in zip(those.weights, those.members, strict=True)
        )
        named = {b"" if i == end else SHARED[i]: average[i] for i in range(end + 1) if i != begin}
        expected = sorted(named, key=named.__getitem__, reverse=True)[:4]
        assert [one.data for one in token.top_logprobs] == expected
        assert [math.exp(one.logprob) for one in token.top_logprobs] == pytest.approx([named[one] for one in expected])
        assert math.exp(token.logprob) == pytest.approx(named[token.data])
        context.append(SHARED.index(token.data))
    assert b"".join(one.data for one in found.prompt) == text.encode()


def test_the_reply_behind_it_is_the_same_and_costs_nothing_twice():
    those = pair("piece")
    options = {"raw": True, "seed": 3, "max_tokens": 6}
    plain, told = those.generate(TEXT, **options), those.generate(TEXT, score_prompt=True, **options)
    assert told.tokens == plain.tokens
    for name, one in told.usage.members.items():
        prompt = one.prompt_tokens
        assert one.forward_tokens >= prompt - 1
        # The first token's forward is the prompt's own.
        assert one.forward_tokens <= plain.usage.members[name].forward_tokens + prompt


def test_single_tells_its_members():
    those = pair("piece")
    found = those.generate(TEXT, raw=True, score_prompt=True, max_tokens=0, method="single")
    alone = Ensemble(those.members[:1], unit="piece")
    expected = score(alone, TEXT, by_segment=True)
    assert [one.data for one in found.prompt] == [
        expected.text[a:b] for a, b in zip(expected.starts, expected.ends, strict=True)
    ]
    np.testing.assert_allclose([one.logprob for one in found.prompt], expected.logprobs[:, 0], atol=1e-5)
    assert {one.member for one in found.prompt} == {those.names[0]}


def test_routers_weigh_the_segments():
    those = pair("piece")
    those.router = FunctionRouter(lambda prompt, text: [0.9, 0.1] if text.endswith(b"e") else [0.2, 0.8], 2)
    found = those.generate(TEXT, raw=True, score_prompt=True, max_tokens=0)
    expected = score(those, TEXT, by_segment=True)
    mixture = expected.mixture(router_weights(expected, those.router))
    np.testing.assert_allclose([one.logprob for one in found.prompt], mixture, atol=1e-5)


def test_nothing_in_front_of_a_text_says_nothing_about_its_beginning():
    one = speaking("gpt4", 5)
    begin, one.prompts._begin = one.prompts._begin, []
    try:
        found = ensemble([one]).generate(TEXT, raw=True, score_prompt=True, max_tokens=0, top_logprobs=2)
    finally:
        one.prompts._begin = begin
    assert math.isnan(found.prompt[0].logprob)
    assert found.prompt[0].top_logprobs == ()
    assert all(one.logprob < 0 and len(one.top_logprobs) == 2 for one in found.prompt[1:])
    assert found.as_dict()["prompt"][0]["logprob"] is None
    assert "".join(one.text for one in found.prompt) == TEXT


def test_a_space_that_a_tokenizer_adds_belongs_to_the_first_token():
    one = speaking("llama2", 0)
    found = ensemble([one]).generate("river bank", raw=True, score_prompt=True, max_tokens=0)
    assert "".join(one.text for one in found.prompt) == "river bank"
    ids = one.prompts.raw("river bank")
    expected = one.session().token_logprobs(ids).sum()
    assert sum(one.logprob for one in found.prompt) == pytest.approx(expected, abs=1e-5)


def test_the_end_that_was_drawn_is_told():
    those = ensemble([engine(SHARED, seed=1)])
    ended = [
        found
        for seed in range(20)
        if (found := those.generate("ab", raw=True, seed=seed, max_tokens=30)).finish_reason == "stop"
    ]
    assert ended
    for found in ended:
        assert found.end is not None
        assert (found.end.data, found.end.member) == (b"", "m0")
        assert found.end.logprob < 0
        assert found.end not in found.tokens


def test_what_cannot_be_told_is_refused():
    those = pair("piece")
    with pytest.raises(UnsupportedError, match="score_prompt needs a raw prompt"):
        those.generate("x", score_prompt=True)
    with pytest.raises(ConfigError, match="max_tokens is 0"):
        those.generate("x", raw=True, max_tokens=0)
    few = engine(SHARED)
    few.top_k_limit = 4
    with pytest.raises(UnsupportedError, match="score_prompt needs every token"):
        ensemble([few]).generate("a", raw=True, top_k=2, score_prompt=True)
    # Composed by this tokenizer's normaliser: its tokens spell another text.
    with pytest.raises(ConfigError, match="do not spell the prompt exactly"):
        ensemble([speaking("gpt4", 1)]).generate("e\u0301", raw=True, score_prompt=True)
