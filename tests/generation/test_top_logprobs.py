"""The likeliest symbols beside each token: those of the distribution that it was sampled from, or of the ensemble's."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
from toys import END, exact_distribution, member_distribution, toys

from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.types import Sampling

OPTIONS = {"temperature": 0.8, "top_k": 5, "repetition_penalty": 1.5}
ALL_METHODS = ["mixture", "conventional", "greedy", "single", "speculative", "auto"]
PROMPT = "ab c"


def reported(token):
    return {top_logprob.data: top_logprob.logprob for top_logprob in token.top_logprobs}


def assert_likeliest(token, distribution, count):
    """The token's figures are the distribution's: as many as were asked for, in order, and none likelier is missing."""
    assert token.logprob == pytest.approx(math.log(distribution[token.data]))
    result = reported(token)
    assert (
        len(result)
        == len(token.top_logprobs)
        == min(count, sum(distribution > 0 for distribution in distribution.values()))
    )
    for data, logprob in result.items():
        assert logprob == pytest.approx(math.log(distribution[data])), data
    values = [top_logprob.logprob for top_logprob in token.top_logprobs]
    assert values == sorted(values, reverse=True)
    assert all(distribution[data] <= math.exp(values[-1]) + 1e-12 for data in distribution.keys() - result.keys())


def own_distribution(ensemble: Ensemble, name: str, pieces, sampling):
    toy = next(member for member in ensemble.members if member.name == name).engine
    if ensemble.unit.name == "token":
        ids = [toy.vocabulary.tokens.index(piece) for piece in pieces]
    else:
        ids = toy.encoder.encode(b"".join(pieces)).ids
    return member_distribution(toy, sampling, toy.prompts.raw(PROMPT).tolist(), ids)


@pytest.mark.parametrize("unit", ["token", "piece"])
@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize("of", ["member", "ensemble"])
@pytest.mark.parametrize("count", [1, 3, 100])
def test_they_are_those_of_the_distribution_that_was_sampled_from(unit, method, of, count):
    ensemble, seen = toys(unit, 3), 0
    for seed in (1, 5, 6):
        plain = {"raw": True, "seed": seed, "max_tokens": 8, "method": method, **OPTIONS}
        completion = ensemble.generate(PROMPT, top_logprobs=count, logprobs_of=of, **plain)
        assert [(token.data, token.member) for token in completion.tokens] == [
            (token.data, token.member) for token in ensemble.generate(PROMPT, **plain).tokens
        ]
        pieces: list[bytes] = []
        for token in completion.tokens:
            if of == "ensemble" or method in ("conventional", "greedy"):
                distribution = exact_distribution(ensemble, OPTIONS, PROMPT, pieces)
            else:
                distribution = own_distribution(ensemble, token.member, pieces, Sampling(**OPTIONS))
            assert_likeliest(token, distribution, count)
            pieces.append(token.data)
        seen += len(pieces)
    assert seen > 2


@pytest.mark.parametrize("method", ALL_METHODS)
def test_the_average_of_a_sampled_token_is_the_one_that_conventional_reports(method):
    """For what was written: also where the draft of a block was a guess, and where greedy stopped asking early."""
    ensemble = toys("piece", 3)
    draft = {"draft": "m1"} if method in ("speculative", "greedy") else {}
    completion = ensemble.generate(
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
    for token in completion.tokens:
        assert_likeliest(token, exact_distribution(ensemble, OPTIONS, PROMPT, pieces), 2)
        pieces.append(token.data)


def test_greedy_asks_every_member_where_alternatives_are_reported():
    """A heavy member is certain by itself; the figures are the average's all the same."""
    ensemble = toys("piece", 2).with_weights([0.9, 0.1])
    options = {"raw": True, "method": "greedy", "max_tokens": 12, "temperature": 0.5}
    plain, result = ensemble.generate(PROMPT, **options), ensemble.generate(PROMPT, top_logprobs=2, **options)
    assert result.text == plain.text
    # Without them, the lighter one is left out where the heavier is certain.
    assert plain.usage.members["m1"].forwards < result.usage.members["m1"].forwards
    pieces: list[bytes] = []
    for token in result.tokens:
        assert_likeliest(token, exact_distribution(ensemble, {"temperature": 0.5, "top_k": 0}, PROMPT, pieces), 2)
        pieces.append(token.data)


def test_the_ensembles_cost_a_forward_of_every_member_and_the_members_cost_nothing():
    ensemble = toys("piece", 3)
    options = {"raw": True, "seed": 1, "max_tokens": 12, "ignore_end": True}
    plain, member_usage, average = (
        ensemble.generate(PROMPT, **options, **more).usage.members
        for more in ({}, {"top_logprobs": 5}, {"top_logprobs": 5, "logprobs_of": "ensemble"})
    )
    assert [usage.forwards for usage in member_usage.values()] == [usage.forwards for usage in plain.values()]
    assert [usage.forwards for usage in average.values()] == [12, 12, 12]


def test_mix_then_truncate_tells_the_truncated_average():
    ensemble = toys("token", 2)
    plain = {"raw": True, "seed": 3, "max_tokens": 6, "method": "conventional", "top_logprobs": 9}
    completion = ensemble.generate(PROMPT, mix_then_truncate=True, temperature=1.0, top_k=2, **plain)
    assert all(len(token.top_logprobs) == 2 for token in completion.tokens)
    assert all(sum(map(math.exp, reported(token).values())) == pytest.approx(1) for token in completion.tokens)
    for rule in ("gac", "unite"):
        ruled = ensemble.generate(PROMPT, rule=rule, temperature=1.0, **plain)
        for token in ruled.tokens:
            assert reported(token)[token.data] == pytest.approx(token.logprob)


def test_words_report_the_distribution_of_the_member_whose_word_it_is():
    ensemble = toys("piece", 3)
    ensemble = Ensemble(ensemble.members, ensemble.weights, unit="word")
    completion = ensemble.generate(
        PROMPT, raw=True, seed=8, max_tokens=30, ignore_end=True, top_logprobs=100, temperature=1.0
    )
    pieces: list[bytes] = []
    whole = begun = 0
    for token in completion.tokens:
        distribution = own_distribution(ensemble, token.member, pieces, Sampling(temperature=1.0))
        del distribution[END]
        scale = sum(distribution.values())
        distribution = {data: distribution / scale for data, distribution in distribution.items()}
        if reported(token).keys() != distribution.keys():  # given that a word begins
            begun += 1
            distribution = {data: distribution for data, distribution in distribution.items() if data.startswith(b" ")}
            scale = sum(distribution.values())
            distribution = {data: distribution / scale for data, distribution in distribution.items()}
        else:
            whole += 1
        assert_likeliest(token, distribution, 100)
        pieces.append(token.data)
    assert whole > 3
    assert begun > 0


def test_bytes_report_the_distribution_of_the_byte():
    ensemble = toys("piece", 1)
    ensemble = Ensemble(ensemble.members, unit="byte")
    completion = ensemble.generate(PROMPT, raw=True, seed=4, max_tokens=25, top_logprobs=9, temperature=1.0)
    first = defaultdict(float)
    for data, probability in own_distribution(ensemble, "m0", [], Sampling(temperature=1.0)).items():
        first[data[:1]] += probability
    assert_likeliest(completion.tokens[0], first, 9)
    for token in completion.tokens:
        assert reported(token)[token.data] == pytest.approx(token.logprob, abs=1e-9)
        assert sum(map(math.exp, reported(token).values())) < 1 + 1e-9


@pytest.mark.parametrize("unit", ["word", "byte"])
def test_units_without_an_average_of_symbols_refuse_the_ensembles(unit):
    ensemble = Ensemble(toys("piece", 2).members, unit=unit)
    with pytest.raises(UnsupportedError, match=f"unit {unit}"):
        ensemble.generate(PROMPT, raw=True, logprobs_of="ensemble")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"top_logprobs": -1}, "top_logprobs is -1"), ({"logprobs_of": "all"}, "logprobs_of is 'all'")],
)
def test_wrong_values_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        toys("token", 2).settings(**options)


def test_json_has_them_where_they_were_asked_for():
    ensemble = toys("token", 2)
    [token] = ensemble.generate(PROMPT, raw=True, max_tokens=1, seed=0, top_logprobs=2, ignore_end=True).as_dict()[
        "tokens"
    ]
    assert [set(alternative) for alternative in token["alternatives"]] == [{"text", "logprob"}] * 2
    [token] = ensemble.generate(PROMPT, raw=True, max_tokens=1, seed=0, ignore_end=True).as_dict()["tokens"]
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
    tokens = alone.context(settings).start(prompts).finish().tokens
    assert len(tokens) == 4
    vocabulary, text = engine.vocabulary, b""
    allowed = np.array([bool(token) for token in vocabulary.tokens])
    for token in tokens:
        ids = np.concatenate([prompts.ids[0], np.array(engine.encoder.encode(text).ids, dtype=np.int64)])
        with torch.inference_mode(), own_attention(engine) as model:
            logits = model(torch.tensor(ids[None])).logits[0, -1].clone()
            logits[~torch.tensor(allowed)] = -torch.inf
            logprobs = torch.log_softmax(logits, -1).double()
        mass = defaultdict(float)  # tokens of equal bytes are one symbol
        for i in torch.topk(logprobs, 400).indices.tolist():
            mass[vocabulary.tokens[i]] += math.exp(logprobs[i])
        expected = sorted(mass, key=mass.__getitem__, reverse=True)[:8]
        assert [top_logprob.data for top_logprob in token.top_logprobs] == expected
        for top_logprob in token.top_logprobs:
            assert top_logprob.logprob == pytest.approx(math.log(mass[top_logprob.data]), abs=2e-4)
        text += token.data
