"""The distribution of bytes: against enumeration of all that members can write, and against one member's own texts."""

from __future__ import annotations

from collections import defaultdict
from functools import cache

import numpy as np
import pytest
from toys import (
    END,
    OPTIONS,
    ReportingToy,
    assert_same_distribution,
    assert_sampled_from,
    counted,
    driven,
    engine,
    fixed,
    make_ensemble,
    member_distribution,
    written,
)

from mixlm.core.rng import Noise
from mixlm.decoding.byte_mixture import byte_mixture
from mixlm.decoding.single import single
from mixlm.engines.requests import LogitsRequest
from mixlm.ensemble import Ensemble
from mixlm.errors import UnsupportedError
from mixlm.types import Sampling
from mixlm.verification.exact import ExactReference

PLAIN = {"temperature": 1.0, "top_k": 0}
# Every byte can be written in several ways, and tokens lie across each other.
TOKENS = ((b"a", b"b", b"ab", b" ", b" a", b"ba", b"bab"), (b" a", b"b", b"a", b" ", b" ab", b"bb"))
WEIGHTS = [0.8, 0.2]


def pair(**options):
    return make_ensemble(
        [engine(tokens, seed=30 + i) for i, tokens in enumerate(TOKENS)], WEIGHTS, unit="byte", **options
    )


def own_distribution(ensemble, i: int, options, text: bytes):
    """A member's distribution of tokens behind a text, by their bytes."""
    member = ensemble.members[i]
    ids = member.engine.encoder.encode(text).ids if text else []
    prompt = member.engine.prompts.raw("ab").tolist()
    return member_distribution(member.engine, Sampling(**{**member.sampling, **options}), prompt, ids)


def next_byte(ensemble, i: int, options, text: bytes) -> dict[bytes, float]:
    """A member's distribution of the byte behind a text: all that it can write, token by token, until it is longer."""
    distribution = defaultdict(float)
    known = cache(lambda before: own_distribution(ensemble, i, options, before))

    def go(before: bytes, probability: float) -> None:
        for data, p in known(before).items():
            after = before + data
            if data == END:
                if before == text:
                    distribution[END] += probability * p
            elif after.startswith(text) and len(after) > len(text):
                distribution[after[len(text) : len(text) + 1]] += probability * p
            elif text.startswith(after):
                go(after, probability * p)

    go(b"", 1.0)
    return dict(distribution)


def average(ensemble, options, text: bytes) -> dict[bytes, float]:
    out = defaultdict(float)
    for i, weight in enumerate(ensemble.weights):
        distribution = next_byte(ensemble, i, options, text)
        total = sum(distribution.values())
        assert total > 0
        for key, p in distribution.items():
            out[key] += weight * p / total
    return dict(out)


def exact(ensemble, options, text: bytes) -> dict[bytes, float]:
    settings = ensemble.settings(raw=True, seed=0, **options)
    distribution = ExactReference(ensemble, settings, ensemble.encode_prompt("ab", settings)).distribution(tuple(text))
    return {
        END if symbol == ensemble.unit.end else bytes([symbol]): distribution[symbol]
        for symbol in np.flatnonzero(distribution).tolist()
    }


PLACES = [b"", b"a", b"ab", b"bab", b"ab a", b"a  ab", b"babab a"]
KEPT = {name: value for name, value in OPTIONS.items() if name not in ("top_k", "top_p", "min_p", "defaults", "all")}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("text", PLACES)
def test_the_reference_is_the_sum_over_everything_that_can_be_written(text, name):
    result = exact(pair(), OPTIONS[name], text)
    assert sum(result.values()) == pytest.approx(1)
    assert_same_distribution(result, average(pair(), OPTIONS[name], text), 1e-9)


def state_at(ensemble, options, text: bytes):
    return written(ensemble, options, "ab", [bytes([b]) for b in text])


def first(writing, ensemble, noise) -> bytes:
    """The first byte that the strategy writes behind a text, which it does not change."""
    choice, _ = driven(byte_mixture, writing, ensemble.weights, noise)
    return END if choice.symbol == ensemble.unit.end else bytes([choice.symbol])


@pytest.mark.slow
@pytest.mark.parametrize("options", [PLAIN, {"temperature": 1.0, "top_k": 3}, {}])
@pytest.mark.parametrize("text", PLACES)
def test_samples_follow_the_exact_distribution(text, options):
    ensemble = pair()
    writing = state_at(ensemble, options, text)
    counts = counted(lambda i: first(writing, ensemble, Noise(3, i, len(text))), 600)
    assert_sampled_from(counts, exact(ensemble, options, text))


@pytest.mark.slow
@pytest.mark.parametrize("text", [b"ab", b"bab", b"babab a"])
@pytest.mark.parametrize("member", [0, 1])
def test_the_next_byte_follows_the_members_own_distribution_whichever_it_is(text, member):
    ensemble = pair()
    writing = state_at(ensemble, PLAIN, text)
    counts = defaultdict(int)
    for sequence in range(600):
        choice, _ = driven(single(member, byte_mixture), writing, ensemble.weights, Noise(4, sequence, 1))
        assert choice.member == member
        counts[END if choice.symbol == ensemble.unit.end else bytes([choice.symbol])] += 1
    distribution = next_byte(ensemble, member, PLAIN, text)
    assert_sampled_from(counts, {key: p / sum(distribution.values()) for key, p in distribution.items()})


@pytest.mark.slow
@pytest.mark.parametrize("options", [PLAIN, {"temperature": 1.0, "top_k": 2}])
def test_one_member_alone_writes_its_own_distribution_of_texts(options):
    alone = make_ensemble([engine(TOKENS[0], seed=7)], unit="byte")
    distribution = defaultdict(float)

    def go(before: bytes, probability: float) -> None:
        for data, p in own_distribution(alone, 0, options, before).items():
            after = before + data
            if data == END or len(after) >= 4:
                distribution[(after + (b"." if data == END else b""))[:4]] += probability * p
            else:
                go(after, probability * p)

    go(b"", 1.0)
    assert sum(distribution.values()) == pytest.approx(1)

    def sampled_text(sequence: int) -> bytes:
        done = alone.generate("ab", raw=True, seed=6, sequence=sequence, max_tokens=4, **options)
        return b"".join(token.data for token in done.tokens) + (b"." if done.finish_reason == "stop" else b"")

    assert_sampled_from(counted(sampled_text, 600), distribution)


@pytest.mark.slow
@pytest.mark.parametrize("options", [PLAIN, {"temperature": 1.0, "top_k": 2}])
def test_completions_follow_the_distribution_byte_by_byte(options):
    ensemble = pair()
    distribution: dict[bytes, float] = {b"": 1.0}
    for length in range(3):
        for text in [
            distribution
            for distribution in distribution
            if len(distribution) == length and not distribution.endswith(b".")
        ]:
            probability = distribution.pop(text)
            for key, p in exact(ensemble, options, text).items():
                distribution[text + (key or b".")] = probability * p

    def sampled_text(sequence: int) -> bytes:
        done = ensemble.generate("ab", raw=True, seed=8, sequence=sequence, max_tokens=3, **options)
        return b"".join(token.data for token in done.tokens) + (b"." if done.finish_reason == "stop" else b"")

    assert_sampled_from(counted(sampled_text, 600), distribution)


@pytest.mark.slow
def test_a_text_that_a_member_would_not_write_is_written_over():
    toy = fixed({b"ab": 0.5, b"a": 0.2, b"b": 0.2, b"ba": 0.1}, [b"a", b"b", b"ab", b"ba"])
    ensemble = make_ensemble([toy], unit="byte")
    options = {"temperature": 1.0, "top_k": 1}
    # It would write "ab" only. Of what begins with b, "b" is likeliest; behind it comes "ab" again.
    assert_same_distribution(exact(ensemble, options, b"b"), {b"a": 1.0}, 1e-9)
    # "a" is most likely the beginning of "ab", and what it would have written.
    assert_same_distribution(exact(ensemble, options, b"a"), {b"b": 1.0}, 1e-9)
    # With three tokens left it could have written "b", and goes on with any of the three.
    assert_same_distribution(exact(ensemble, {"temperature": 1.0, "top_k": 3}, b"b"), {b"a": 7 / 9, b"b": 2 / 9}, 1e-6)
    for text in (b"b", b"a", b"bb", b"bba"):
        for some in (1, 2, 3):
            options = {"temperature": 1.0, "top_k": some}
            writing = state_at(ensemble, options, text)
            counts = counted(lambda i, writing=writing: first(writing, ensemble, Noise(2, i)), 400)
            distribution = exact(ensemble, options, text)
            assert counts.keys() == distribution.keys()
            if len(distribution) > 1:
                assert_sampled_from(counts, distribution)


def test_engines_that_report_few_tokens_are_asked_for_those_that_agree():
    """The second member's two likeliest tokens do not spell x; of those that do, a report has xy alone."""
    tokens = (b"x", b"y", b"xy", b"z", b"w", b"xz")
    likely = ({b"x": 1.0}, {b"w": 0.5, b"z": 0.3, b"xy": 0.1, b"xz": 0.06, b"x": 0.04})
    toys = [fixed(dict.fromkeys(tokens, 1e-9) | probabilities, tokens) for probabilities in likely]
    whole = make_ensemble(toys, [0.5, 0.5], unit="byte")
    few = make_ensemble([ReportingToy(toy, 3) for toy in toys], [0.5, 0.5], unit="byte")
    for seed in range(20):
        settings = {"raw": True, "max_tokens": 3, "temperature": 1.0, "top_k": 2, "seed": seed}
        expected, actual = (ensemble.generate("w", **settings).tokens for ensemble in (whole, few))
        assert [(token.data, token.member) for token in actual] == [(token.data, token.member) for token in expected]


def test_a_text_that_no_tokens_spell_ends_on_a_boundary():
    gone = make_ensemble([fixed({b"b": 1.0}, [b"b", b"a"])], unit="byte")
    assert_same_distribution(exact(gone, PLAIN, b"a"), {b"b": 1.0}, 1e-6)
    assert first(state_at(gone, PLAIN, b"a"), gone, Noise(0)) == b"b"


def ended(choices, coin: int, end: int) -> bool:
    return coin != choices[-1].member or choices[-1].symbol in (ord(" "), end)


@pytest.mark.slow
def test_a_tokens_bytes_stand_while_its_member_is_sampled():
    ensemble = pair()
    lengths = defaultdict(int)
    for sequence in range(300):
        settings = ensemble.settings(raw=True, seed=1, sequence=sequence, **PLAIN)
        writer = ensemble.context(settings)
        writing = writer.begin_sequence(ensemble.encode_prompt("ab", settings))
        noise = Noise(1, sequence)
        choices = writer.decode_step(writing, noise, 8)
        lengths[len(choices)] += 1
        assert {choice.member for choice in choices} == {noise.coin(ensemble.weights)}
        assert all(noise.at(k).coin(ensemble.weights) == choices[0].member for k in range(len(choices)))
        assert len(choices) == 8 or ended(choices, noise.at(len(choices)).coin(ensemble.weights), ensemble.unit.end)
        assert len(writing.state) == 0
        assert len(writer.decode_step(writing, noise, 1)) == 1
    assert {1, 2, 3, 4} <= set(lengths)


def test_log_probabilities_of_a_tokens_bytes_add_up():
    ensemble = make_ensemble([fixed({b"ab": 0.5, b"a": 0.3, b"ac": 0.2}, [b"a", b"ab", b"ac"])], unit="byte")
    for seed in range(20):
        completion = ensemble.generate("a", raw=True, seed=seed, max_tokens=2, **PLAIN)
        assert np.exp(completion.tokens[0].logprob) == pytest.approx(1, abs=1e-6)
        assert completion.tokens[0].data == b"a"
        if completion.tokens[1].data == b"b":
            assert np.exp(completion.tokens[1].logprob) == pytest.approx(0.5, abs=1e-6)


def test_one_forward_is_requested_at_a_time_and_none_twice():
    ensemble = pair()
    runs = []
    writing = state_at(ensemble, PLAIN, b"ab")
    for sequence in range(40):
        _, rounds = driven(single(0, byte_mixture), writing, ensemble.weights, Noise(2, sequence))
        assert all(isinstance(request, LogitsRequest) for [request] in rounds)
        runs += [tuple(request.ids.tolist()) for [request] in rounds]
    assert len(runs) == len(set(runs)) <= 3


def test_a_member_alone_needs_about_a_forward_a_token():
    alone = make_ensemble([engine(TOKENS[0], seed=7)], unit="byte")
    forwards, tokens = 0, 0
    for seed in range(20):
        completion = alone.generate("ab", raw=True, seed=seed, max_tokens=40)
        forwards += completion.usage.members["m0"].forwards
        tokens += len(alone.members[0].engine.encoder.encode(b"".join(token.data for token in completion.tokens)).ids)
    assert forwards <= 2 * tokens


@pytest.mark.parametrize("method", ["conventional", "greedy", "speculative"])
def test_methods_that_need_an_average_are_refused_by_name(method):
    with pytest.raises(UnsupportedError, match=f"{method} does not work with the unit byte"):
        pair().stream("hello", method=method)


def test_the_most_likely_byte_is_refused():
    with pytest.raises(UnsupportedError, match="most likely byte"):
        pair().stream("hello", method="single", temperature=0)


@pytest.mark.parametrize("method", ["mixture", "single", "auto"])
def test_equal_seeds_give_equal_texts(method):
    first, second = (pair().generate("ab", raw=True, method=method, seed=5, max_tokens=60) for _ in range(2))
    assert first.text == second.text
    assert method != "single" or {token.member for token in first.tokens} <= {"m0"}


@pytest.mark.models
@pytest.mark.parametrize(
    ("text", "options"),
    [(b"They said th", {}), ("Zürich is a ".encode() + "ü".encode()[:1], PLAIN)],
)
def test_the_real_pair_follows_the_exact_distribution_inside_words_and_characters(demo_pair, text, options):
    ensemble = Ensemble(demo_pair.members, [0.5, 0.5], unit="byte")
    settings = ensemble.settings(raw=True, seed=0, **options)
    prompts = ensemble.encode_prompt("Look at the map.", settings)
    writing = ensemble.context(settings).begin_sequence(prompts)
    for byte in text:
        writing.state.append(byte)
    counts = defaultdict(int)
    for sequence in range(200):
        choice, _ = driven(byte_mixture, writing, ensemble.weights, Noise(9, sequence, len(text)))
        counts[choice.symbol] += 1
    distribution = ExactReference(ensemble, settings, prompts).distribution(tuple(text))
    assert_sampled_from(counts, {symbol: distribution[symbol] for symbol in np.flatnonzero(distribution).tolist()})
