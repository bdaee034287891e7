"""Biases by text, through every strategy and every unit."""

from __future__ import annotations

import json

import numpy as np
import pytest
from toys import (
    SHARED,
    VOCABULARIES,
    assert_same_distribution,
    driven,
    engine,
    exact_distribution,
    make_ensemble,
    member_distribution,
    named,
    table,
    written,
)
from toys import Recorder as Fixed

from mixlm.decoding.conventional import conventional
from mixlm.engines.toy import ToyEngine
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.generation.target import average_target
from mixlm.types import Sampling

BIAS = {"ab": 2.5, "c": -1.25, " ": 1.5, "b": -100.0}
OPTIONS = {"temperature": 0.8, "top_k": 5, "repetition_penalty": 1.5}


def shifted(tokens, seed: int) -> ToyEngine:
    """The toy whose model itself likes and dislikes these tokens."""
    plain = table(len(tokens) + 2, seed)
    shift = np.array([BIAS.get(token.decode(), 0.0) for token in tokens] + [0.0, 0.0])
    return ToyEngine(tokens, lambda context: plain(context) + shift)


def pair(unit: str, make) -> Ensemble:
    vocabularies = [SHARED] * 2 if unit == "token" else [SHARED, VOCABULARIES[1]]
    return make_ensemble([make(tokens, 30 + i) for i, tokens in enumerate(vocabularies)], [0.6, 0.4], unit=unit)


@pytest.mark.parametrize(
    ("unit", "method"),
    [
        *(
            (unit, method)
            for unit in ("token", "piece")
            for method in ("mixture", "conventional", "greedy", "speculative")
        ),
        ("word", "mixture"),
        ("byte", "mixture"),
        ("piece", "single"),
    ],
)
def test_a_biased_member_is_one_whose_model_has_the_bias(unit, method):
    plain, expected = pair(unit, engine), pair(unit, shifted)
    different = 0
    for seed in range(12):
        options = {"raw": True, "seed": seed, "max_tokens": 10, "method": method, **OPTIONS}
        completion = plain.generate("ab c", logit_bias=BIAS, **options)
        wanted = expected.generate("ab c", **options)
        assert [(token.data, token.member) for token in completion.tokens] == [
            (token.data, token.member) for token in wanted.tokens
        ]
        assert [token.logprob for token in completion.tokens] == pytest.approx(
            [token.logprob for token in wanted.tokens], abs=1e-4
        )
        different += completion.text != plain.generate("ab c", **options).text
    assert different


@pytest.mark.parametrize("unit", ["token", "piece"])
def test_the_distribution_is_the_dense_one(unit):
    plain = pair(unit, engine)
    writing = written(plain, {**OPTIONS, "logit_bias": BIAS}, "ab", [b"c", b"a"])
    noise = Fixed()
    driven(conventional(average_target()), writing, plain.weights, noise)
    result = named(plain, noise.symbols, np.exp(noise.logprobs))
    assert_same_distribution(result, exact_distribution(pair(unit, shifted), OPTIONS, "ab", [b"c", b"a"]), 1e-6)


def test_mix_then_truncate_biases_members_in_front_of_the_average():
    plain, expected = pair("token", engine), pair("token", shifted)
    options = {"raw": True, "max_tokens": 8, "method": "conventional", "mix_then_truncate": True, "top_k": 3}
    for seed in range(6):
        completion = plain.generate("ab", seed=seed, logit_bias=BIAS, **options)
        assert completion.text == expected.generate("ab", seed=seed, **options).text


def test_every_token_of_the_bytes_is_biased():
    """The second vocabulary has b"ab" twice."""
    toy = engine(VOCABULARIES[1], seed=3)
    distribution = member_distribution(toy, Sampling(temperature=1.0, top_k=0), toy.prompts.raw("a").tolist(), [])
    odds = distribution[b"ab"] / distribution[b"c"]
    alone = make_ensemble([toy], unit="piece")
    [token] = alone.generate(
        "a", raw=True, max_tokens=1, seed=1, temperature=1.0, top_k=0, top_logprobs=99, ignore_end=True,
        logit_bias={"ab": 1.5, "c": 0.5},
    ).tokens  # fmt: skip
    reported = {top_logprob.data: np.exp(top_logprob.logprob) for top_logprob in token.top_logprobs}
    assert reported[b"ab"] / reported[b"c"] == pytest.approx(odds * np.e, rel=1e-5)


def test_ids_are_for_members_of_one_vocabulary():
    shared = pair("token", engine)
    options = {"raw": True, "seed": 2, "max_tokens": 9}
    by_id = shared.generate("ab", logit_bias={SHARED.index(b"ab"): 3.0, 0: -2.0}, **options)
    assert by_id.tokens == shared.generate("ab", logit_bias={"ab": 3.0, "a": -2.0}, **options).tokens
    # The end of the text has an id, and no text.
    end = shared.generate("ab", logit_bias={len(SHARED) + 1: -100.0}, **{**options, "max_tokens": 60})
    assert end.finish_reason == "length"
    with pytest.raises(ConfigError, match=r"token id 3, and in the unit piece each member .*token's text"):
        pair("piece", engine).generate("ab", logit_bias={3: 1.0}, **options)
    for wrong in (99, len(SHARED)):  # no row, and a control token
        with pytest.raises(ConfigError, match=f"token id {wrong}, and m0 has no token of that id"):
            shared.generate("ab", logit_bias={wrong: 1.0}, **options)


@pytest.mark.parametrize(("text", "name"), [(" c", "m1"), ("abc", "m0"), ("\ud800", "m0")])
def test_a_text_that_is_no_token_of_a_member_is_refused_and_the_member_named(text, name):
    with pytest.raises(ConfigError, match=f"{name} has no token with exactly these bytes"):
        pair("piece", engine).generate("ab", raw=True, logit_bias={text: 1.0})


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        ({"": 1.0}, "logit_bias has the key ''"),
        ({-1: 1.0}, "logit_bias has the key -1"),
        ({True: 1.0}, "logit_bias has the key True"),
        ({"a": 101}, "logit_bias is 101 for 'a'; it must be a number from -100 to 100"),
        ({"a": float("nan")}, "logit_bias is nan"),
        ({"a": "1"}, "logit_bias is '1'"),
    ],
)
def test_what_is_no_bias_is_refused(bias, message):
    with pytest.raises(ConfigError, match=message):
        pair("piece", engine).settings(logit_bias=bias)


def test_an_engine_that_tells_few_tokens_refuses_it():
    toy = engine(SHARED)
    toy.top_k_limit = 4
    with pytest.raises(UnsupportedError, match="logit_bias moves tokens from anywhere"):
        make_ensemble([toy]).generate("a", raw=True, top_k=2, logit_bias={"a": 1.0})


@pytest.mark.models
def test_real_members_write_what_they_are_pushed_to(demo_pair):
    options = {"max_tokens": 8, "seed": 3, "stop": ["\n"]}
    often = demo_pair.generate("What is the capital of France?", logit_bias={" tea": 30.0}, **options)
    assert often.text.count(" tea") >= 3
    assert {token.member for token in often.tokens if token.data == b" tea"} == set(demo_pair.names)


def test_the_command_line_takes_them(capfd):
    from mixlm.cli import main

    toys = ["generate", "hello", "-m", "toy:1", "-m", "toy:2", "--seed", "3", "--json"]
    assert main([*toys, "--logit-bias", " river=50", "--logit-bias", " bird=-1e1"]) == 0
    assert " river river" in json.loads(capfd.readouterr().out)["text"]
    for wrong in ("river", "=1", "river=much"):
        assert main([*toys, "--logit-bias", wrong]) == 2
        assert "--logit-bias is" in capfd.readouterr().err
