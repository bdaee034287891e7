"""The likeliest symbols beside each token: those of the law that it was drawn from, or of the ensemble's."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
from toys import END, exact_law, member_law, toys

from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.types import Sampling

OPTIONS = {"temperature": 0.8, "top_k": 5, "repetition_penalty": 1.5}
ALL_METHODS = ["mixture", "conventional", "greedy", "single", "speculative", "auto"]
PROMPT = "ab c"


def reported(token):
    return {one.data: one.logprob for one in token.top_logprobs}


def assert_likeliest(token, law, count):
    """The token's figures are the law's: as many as were asked for, in order, and none likelier is missing."""
    assert token.logprob == pytest.approx(math.log(law[token.data]))
    found = reported(token)
    assert len(found) == len(token.top_logprobs) == min(count, sum(one > 0 for one in law.values()))
    for data, logprob in found.items():
        assert logprob == pytest.approx(math.log(law[data])), data
    values = [one.logprob for one in token.top_logprobs]
    assert values == sorted(values, reverse=True)
    assert all(law[data] <= math.exp(values[-1]) + 1e-12 for data in law.keys() - found.keys())


def own_law(those: Ensemble, name: str, pieces, sampling):
    one = next(one for one in those.members if one.name == name).engine
    if those.unit.name == "token":
        reply = [one.vocabulary.tokens.index(piece) for piece in pieces]
    else:
        reply = one.encoder.encode(b"".join(pieces)).ids
    return member_law(one, sampling, one.prompts.raw(PROMPT).tolist(), reply)


@pytest.mark.parametrize("unit", ["token", "piece"])
@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize("of", ["member", "ensemble"])
@pytest.mark.parametrize("count", [1, 3, 100])
def test_they_are_those_of_the_law_that_was_drawn_from(unit, method, of, count):
    those, seen = toys(unit, 3), 0
    for seed in (1, 5, 6):
        plain = {"raw": True, "seed": seed, "max_tokens": 8, "method": method, **OPTIONS}
        found = those.generate(PROMPT, top_logprobs=count, logprobs_of=of, **plain)
        assert [(one.data, one.member) for one in found.tokens] == [
            (one.data, one.member) for one in those.generate(PROMPT, **plain).tokens
        ]
        pieces: list[bytes] = []
        for token in found.tokens:
            if of == "ensemble" or method in ("conventional", "greedy"):
                law = exact_law(those, OPTIONS, PROMPT, pieces)
            else:
                law = own_law(those, token.member, pieces, Sampling(**OPTIONS))
            assert_likeliest(token, law, count)
            pieces.append(token.data)
        seen += len(pieces)
    assert seen > 2


@pytest.mark.parametrize("method", ALL_METHODS)
def test_the_average_of_a_drawn_token_is_the_one_that_conventional_tells(method):
    """For what was written: also where the draft of a block was a guess, and where greedy stopped asking early."""
    those = toys("piece", 3)
    draft = {"draft": "m1"} if method in ("speculative", "greedy") else {}
    found = those.generate(
        PROMPT,
        raw=True,
        seed=2,
        max_tokens=9,
        method=method,
        top_logprobs=2,
        logprobs_of="ensemble",
        **OPTIONS,
        **draft,
    )
    pieces: list[bytes] = []
    for token in found.tokens:
        assert_likeliest(token, exact_law(those, OPTIONS, PROMPT, pieces), 2)
        pieces.append(token.data)


def test_greedy_asks_every_member_where_alternatives_are_reported():
    """A heavy member is certain by itself; the figures are the average's all the same."""
    those = toys("piece", 2).with_weights([0.9, 0.1])
    options = {"raw": True, "method": "greedy", "max_tokens": 12, "temperature": 0.5}
    plain, found = those.generate(PROMPT, **options), those.generate(PROMPT, top_logprobs=2, **options)
    assert found.text == plain.text
    # Without them, the lighter one is left out where the heavier is certain.
    assert plain.usage.members["m1"].forwards < found.usage.members["m1"].forwards
    pieces: list[bytes] = []
    for token in found.tokens:
        assert_likeliest(token, exact_law(those, {"temperature": 0.5, "top_k": 0}, PROMPT, pieces), 2)
        pieces.append(token.data)


def test_the_ensembles_cost_a_forward_of_every_member_and_the_members_cost_nothing():
    those = toys("piece", 3)
    options = {"raw": True, "seed": 1, "max_tokens": 12, "ignore_end": True}
    plain, own, average = (
        those.generate(PROMPT, **options, **more).usage.members
        for more in ({}, {"top_logprobs": 5}, {"top_logprobs": 5, "logprobs_of": "ensemble"})
    )
    assert [one.forwards for one in own.values()] == [one.forwards for one in plain.values()]
    assert [one.forwards for one in average.values()] == [12, 12, 12]


def test_mix_then_truncate_tells_the_truncated_average():
    those = toys("token", 2)
    plain = {"raw": True, "seed": 3, "max_tokens": 6, "method": "conventional", "top_logprobs": 9}
    found = those.generate(PROMPT, mix_then_truncate=True, temperature=1.0, top_k=2, **plain)
    assert all(len(one.top_logprobs) == 2 for one in found.tokens)
    assert all(sum(map(math.exp, reported(one).values())) == pytest.approx(1) for one in found.tokens)
    for rule in ("gac", "unite"):
        ruled = those.generate(PROMPT, rule=rule, temperature=1.0, **plain)
        for one in ruled.tokens:
            assert reported(one)[one.data] == pytest.approx(one.logprob)


def test_words_tell_the_law_of_the_member_whose_word_it_is():
    those = toys("piece", 3)
    those = Ensemble(those.members, those.weights, unit="word")
    found = those.generate(PROMPT, raw=True, seed=8, max_tokens=30, ignore_end=True, top_logprobs=100, temperature=1.0)
    pieces: list[bytes] = []
    whole = begun = 0
    for token in found.tokens:
        law = own_law(those, token.member, pieces, Sampling(temperature=1.0))
        del law[END]
        scale = sum(law.values())
        law = {data: one / scale for data, one in law.items()}
        if reported(token).keys() != law.keys():  # given that a word begins
            begun += 1
            law = {data: one for data, one in law.items() if data.startswith(b" ")}
            scale = sum(law.values())
            law = {data: one / scale for data, one in law.items()}
        else:
            whole += 1
        assert_likeliest(token, law, 100)
        pieces.append(token.data)
    assert whole > 3
    assert begun > 0


def test_bytes_tell_the_law_of_the_byte():
    those = toys("piece", 1)
    those = Ensemble(those.members, unit="byte")
    found = those.generate(PROMPT, raw=True, seed=4, max_tokens=25, top_logprobs=9, temperature=1.0)
    first = defaultdict(float)
    for data, probability in own_law(those, "m0", [], Sampling(temperature=1.0)).items():
        first[data[:1]] += probability
    assert_likeliest(found.tokens[0], first, 9)
    for one in found.tokens:
        assert reported(one)[one.data] == pytest.approx(one.logprob, abs=1e-9)
        assert sum(map(math.exp, reported(one).values())) < 1 + 1e-9


@pytest.mark.parametrize("unit", ["word", "byte"])
def test_units_without_an_average_of_symbols_refuse_the_ensembles(unit):
    those = Ensemble(toys("piece", 2).members, unit=unit)
    with pytest.raises(UnsupportedError, match=f"unit {unit}"):
        those.generate(PROMPT, raw=True, logprobs_of="ensemble")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"top_logprobs": -1}, "top_logprobs is -1"), ({"logprobs_of": "all"}, "logprobs_of is 'all'")],
)
def test_wrong_values_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        toys("token", 2).settings(**options)


def test_json_has_them_where_they_were_asked_for():
    those = toys("token", 2)
    [token] = those.generate(PROMPT, raw=True, max_tokens=1, seed=0, top_logprobs=2, ignore_end=True).as_dict()[
        "tokens"
    ]
    assert [set(one) for one in token["alternatives"]] == [{"text", "logprob"}] * 2
    [token] = those.generate(PROMPT, raw=True, max_tokens=1, seed=0, ignore_end=True).as_dict()["tokens"]
    assert "alternatives" not in token


@pytest.mark.models
@pytest.mark.parametrize("member", [0, 1])
def test_a_real_members_are_those_of_transformers(demo_pair, member):
    import torch
    from test_against_transformers import own_attention

    alone = Ensemble([demo_pair.members[member]])
    engine = alone.members[0].engine
    settings = alone.settings(seed=3, max_tokens=4, temperature=1.0, top_k=0, top_logprobs=8, ignore_end=True)
    prompts = alone.encode_prompt("Name three rivers.", settings)
    found = alone.context(settings).start(prompts).finish().tokens
    assert len(found) == 4
    vocabulary, text = engine.vocabulary, b""
    allowed = np.array([bool(one) for one in vocabulary.tokens])
    for token in found:
        ids = np.concatenate([prompts.ids[0], np.array(engine.encoder.encode(text).ids, dtype=np.int64)])
        with torch.inference_mode(), own_attention(engine) as model:
            logits = model(torch.tensor(ids[None])).logits[0, -1].clone()
            logits[~torch.tensor(allowed)] = -torch.inf
            logprobs = torch.log_softmax(logits, -1).double()
        mass = defaultdict(float)  # tokens of equal bytes are one symbol
        for i in torch.topk(logprobs, 400).indices.tolist():
            mass[vocabulary.tokens[i]] += math.exp(logprobs[i])
        expected = sorted(mass, key=mass.__getitem__, reverse=True)[:8]
        assert [one.data for one in token.top_logprobs] == expected
        for one in token.top_logprobs:
            assert one.logprob == pytest.approx(math.log(mass[one.data]), abs=2e-4)
        text += token.data
