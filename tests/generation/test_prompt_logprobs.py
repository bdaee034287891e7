"""The log-probabilities of a raw prompt, told with the completion that continues it."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from speaking import speaking
from toys import SHARED, engine, make_ensemble

from mixlm.core.sampling import softmax
from mixlm.engines.toy import ToyEngine, random_table
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.generation import prompt_logprobs as given
from mixlm.routing import FunctionRouter
from mixlm.scoring.score import score
from mixlm.scoring.scores import router_weights

TEXT = "The river turns under the old stone bridge; it's 2024 and señor naïve café 日本 🎉 ok"


def pair(unit: str) -> Ensemble:
    kinds = ("gpt2", "gpt2") if unit == "token" else ("gpt2", "gemma")
    return make_ensemble([speaking(kind, i) for i, kind in enumerate(kinds)], [0.7, 0.3], unit=unit)


@pytest.mark.parametrize("unit", ["token", "piece", "word", "byte"])
def test_a_prompts_segments_are_those_of_scoring(unit):
    ensemble = pair(unit)
    completion = ensemble.generate(TEXT, raw=True, score_prompt=True, max_tokens=0)
    expected = score(ensemble, TEXT, by_segment=True)
    assert "".join(token.text for token in completion.prompt) == TEXT
    assert [token.data for token in completion.prompt] == [
        expected.text[a:b] for a, b in zip(expected.starts, expected.ends, strict=True)
    ]
    np.testing.assert_allclose(
        [token.logprob for token in completion.prompt], expected.mixture(ensemble.weights), atol=1e-5
    )
    assert (completion.text, completion.tokens, completion.finish_reason) == ("", (), "length")


@pytest.mark.parametrize("rows", [1, 2, 3, 64])
def test_it_does_not_matter_in_how_many_parts_a_prompt_is_read(rows, monkeypatch):
    ensemble = pair("piece")
    whole = ensemble.generate(TEXT, raw=True, score_prompt=True, max_tokens=0, top_logprobs=3)
    monkeypatch.setattr(given, "ROWS", rows)
    parts = ensemble.generate(TEXT, raw=True, score_prompt=True, max_tokens=0, top_logprobs=3)
    assert parts.prompt == whole.prompt


def test_alternatives_take_one_number_for_each_symbol_of_each_member():
    ensemble = pair("piece")
    options = {"raw": True, "score_prompt": True, "max_tokens": 0}
    ensemble.generate(TEXT, top_logprobs=1, **options)
    peaks = []
    for count in (0, 1):
        tracemalloc.start()
        segments = len(ensemble.generate(TEXT * 4, top_logprobs=count, **options).prompt)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 10 * 2 * segments * ensemble.unit.end


def test_alternatives_are_those_of_the_plain_average():
    ensemble = make_ensemble([engine(SHARED, seed=1), engine(SHARED, seed=2)], [0.6, 0.4], unit="token")
    text = "ab c abca"
    completion = ensemble.generate(text, raw=True, score_prompt=True, max_tokens=0, top_logprobs=4)
    begin, end = len(SHARED), len(SHARED) + 1
    context = [begin]
    for token in completion.prompt:
        average = sum(
            weight * softmax(member.engine.table(tuple(context)))
            for weight, member in zip(ensemble.weights, ensemble.members, strict=True)
        )
        named = {b"" if i == end else SHARED[i]: average[i] for i in range(end + 1) if i != begin}
        expected = sorted(named, key=named.__getitem__, reverse=True)[:4]
        assert [top_logprob.data for top_logprob in token.top_logprobs] == expected
        assert [math.exp(top_logprob.logprob) for top_logprob in token.top_logprobs] == pytest.approx(
            [named[alternative] for alternative in expected]
        )
        assert math.exp(token.logprob) == pytest.approx(named[token.data])
        context.append(SHARED.index(token.data))
    assert b"".join(token.data for token in completion.prompt) == text.encode()


def test_the_completion_behind_it_is_the_same_and_costs_nothing_twice():
    ensemble = pair("piece")
    options = {"raw": True, "seed": 3, "max_tokens": 6}
    plain, scored = ensemble.generate(TEXT, **options), ensemble.generate(TEXT, score_prompt=True, **options)
    assert scored.tokens == plain.tokens
    for name, member in scored.usage.members.items():
        prompt = member.prompt_tokens
        assert member.forward_tokens >= prompt - 1
        # The first token's forward is the prompt's own.
        assert member.forward_tokens <= plain.usage.members[name].forward_tokens + prompt


def test_single_tells_its_members():
    ensemble = pair("piece")
    completion = ensemble.generate(TEXT, raw=True, score_prompt=True, max_tokens=0, method="single")
    alone = Ensemble(ensemble.members[:1], unit="piece")
    expected = score(alone, TEXT, by_segment=True)
    assert [token.data for token in completion.prompt] == [
        expected.text[a:b] for a, b in zip(expected.starts, expected.ends, strict=True)
    ]
    np.testing.assert_allclose([token.logprob for token in completion.prompt], expected.logprobs[:, 0], atol=1e-5)
    assert {token.member for token in completion.prompt} == {ensemble.names[0]}


def test_routers_weigh_the_segments():
    ensemble = pair("piece")
    ensemble.router = FunctionRouter(lambda prompt, text: [0.9, 0.1] if text.endswith(b"e") else [0.2, 0.8], 2)
    completion = ensemble.generate(TEXT, raw=True, score_prompt=True, max_tokens=0)
    expected = score(ensemble, TEXT, by_segment=True)
    mixture = expected.mixture(router_weights(expected, ensemble.router))
    np.testing.assert_allclose([token.logprob for token in completion.prompt], mixture, atol=1e-5)


def test_nothing_in_front_of_a_text_says_nothing_about_its_beginning():
    toy = speaking("gpt4", 5)
    begin, toy.prompts._begin = toy.prompts._begin, []
    try:
        completion = make_ensemble([toy]).generate(TEXT, raw=True, score_prompt=True, max_tokens=0, top_logprobs=2)
    finally:
        toy.prompts._begin = begin
    assert math.isnan(completion.prompt[0].logprob)
    assert completion.prompt[0].top_logprobs == ()
    assert all(token.logprob < 0 and len(token.top_logprobs) == 2 for token in completion.prompt[1:])
    assert completion.as_dict()["prompt"][0]["logprob"] is None
    assert "".join(token.text for token in completion.prompt) == TEXT


def test_a_space_that_a_tokenizer_adds_belongs_to_the_first_token():
    toy = speaking("llama2", 0)
    completion = make_ensemble([toy]).generate("river bank", raw=True, score_prompt=True, max_tokens=0)
    assert "".join(token.text for token in completion.prompt) == "river bank"
    ids = toy.prompts.raw("river bank")
    expected = toy.session().token_logprobs(ids).sum()
    assert sum(token.logprob for token in completion.prompt) == pytest.approx(expected, abs=1e-5)


def test_the_end_that_was_sampled_is_reported():
    ensemble = make_ensemble([engine(SHARED, seed=1)])
    ended = [
        completion
        for seed in range(20)
        if (completion := ensemble.generate("ab", raw=True, seed=seed, max_tokens=30)).finish_reason == "stop"
    ]
    assert ended
    for completion in ended:
        assert completion.end is not None
        assert (completion.end.data, completion.end.member) == (b"", "m0")
        assert completion.end.logprob < 0
        assert completion.end not in completion.tokens


def test_what_cannot_be_reported_is_refused():
    ensemble = pair("piece")
    with pytest.raises(UnsupportedError, match="score_prompt needs a raw prompt"):
        ensemble.generate("x", score_prompt=True)
    with pytest.raises(ConfigError, match="max_tokens is 0"):
        ensemble.generate("x", raw=True, max_tokens=0)
    few = engine(SHARED)
    few.top_k_limit = 4
    with pytest.raises(UnsupportedError, match="score_prompt needs every token"):
        make_ensemble([few]).generate("a", raw=True, top_k=2, score_prompt=True)
    # Composed by this tokenizer's normaliser: its tokens spell another text.
    with pytest.raises(ConfigError, match="do not spell the prompt exactly"):
        make_ensemble([speaking("gpt4", 1)]).generate("e\u0301", raw=True, score_prompt=True)


@pytest.mark.parametrize("rule", ["geometric", "max", "contrastive"])
def test_under_a_rule_each_token_has_the_rules_probability(rule, monkeypatch):
    ensemble = pair("token").with_weights([1, 1])
    options = {"raw": True, "rule": rule, "top_logprobs": 2}
    prompt = ensemble.generate(TEXT, score_prompt=True, max_tokens=0, **options).prompt
    assert "".join(token.text for token in prompt) == TEXT
    before, plain = "", {"raw": True, "rule": rule, "method": "conventional", "temperature": 1.0, "top_k": 0}
    for token in prompt[:6]:
        if before:
            following = ensemble.distribution(before, **plain)
            expected = dict(zip(following.symbol_bytes, np.log(following.probs), strict=True))
            assert token.logprob == pytest.approx(expected.get(token.data, -np.inf), abs=1e-5)
            assert token.top_logprobs[0].logprob == pytest.approx(max(expected.values()), abs=1e-5)
        before += token.text
    monkeypatch.setattr(given, "POSITIONS", 64)
    assert ensemble.generate(TEXT, score_prompt=True, max_tokens=0, **options).prompt == prompt


def test_tokens_that_members_do_not_share_have_no_probability_under_a_rule():
    # The first member has a token for "ab", and the second spells it in two.
    members = [ToyEngine([b"a", b"b", word], random_table(5, seed)) for word, seed in ((b"ab", 1), (b"", 2))]
    ensemble = make_ensemble(members, [0.5, 0.5], unit="token")
    options = {"raw": True, "score_prompt": True, "max_tokens": 0}
    with pytest.raises(UnsupportedError, match="m0 has 'ab' where m1 has 'a'"):
        ensemble.generate("aab", rule="max", **options)
    apart = ensemble.generate("ba", rule="max", **options).prompt
    assert [token.data for token in apart] == [b"b", b"a"]


def test_a_prompt_under_a_rule_is_scored_in_small_steps():
    ensemble = pair("token").with_weights([1, 1])
    settings = ensemble.settings(raw=True, rule="max", score_prompt=True, max_tokens=0)
    generation = ensemble.context(settings).start(ensemble.encode_prompt(TEXT, settings))
    requests = generation.requests()
    assert [request.last for request in requests] == [given.POSITIONS] * 2
    assert given.POSITIONS < 8
    generation.release()


def test_a_rule_between_vocabularies_has_no_log_probabilities_of_tokens():
    with pytest.raises(UnsupportedError, match="score_prompt gives the log-probability of each token under rule max"):
        pair("piece").generate("ab", raw=True, score_prompt=True, rule="max")
