"""The law of bytes: against enumeration of everything members can write, and against one member's own texts."""

from __future__ import annotations

from collections import defaultdict
from functools import cache

import numpy as np
import pytest
from toys import (
    END,
    OPTIONS,
    assert_drawn_from,
    assert_same_law,
    counted,
    driven,
    engine,
    ensemble,
    fixed,
    member_law,
    written,
)

from mixlm.core.rng import Noise
from mixlm.decoding.byte_mixture import byte_mixture
from mixlm.engines.base import LogitsRequest
from mixlm.ensemble import Ensemble
from mixlm.errors import UnsupportedError
from mixlm.types import Sampling
from mixlm.verification.exact import ExactReference

PLAIN = {"temperature": 1.0, "top_k": 0}
# Every byte can be written in several ways, and tokens lie across each other.
TOKENS = ((b"a", b"b", b"ab", b" ", b" a", b"ba", b"bab"), (b" a", b"b", b"a", b" ", b" ab", b"bb"))
WEIGHTS = [0.6, 0.4]


def pair(**options):
    return ensemble([engine(one, seed=30 + i) for i, one in enumerate(TOKENS)], WEIGHTS, unit="byte", **options)


def own_law(those, i: int, options, text: bytes):
    """A member's law of tokens behind a text, by their bytes."""
    member = those.members[i]
    reply = member.engine.encoder.encode(text).ids if text else []
    prompt = member.engine.prompts.raw("ab").tolist()
    return member_law(member.engine, Sampling(**{**member.sampling, **options}), prompt, reply)


def next_byte(those, i: int, options, text: bytes) -> dict[bytes, float]:
    """A member's law of the byte behind a text: all that it can write, token by token, until it is longer."""
    law = defaultdict(float)
    known = cache(lambda before: own_law(those, i, options, before))

    def go(before: bytes, probability: float) -> None:
        for data, p in known(before).items():
            after = before + data
            if data == END:
                if before == text:
                    law[END] += probability * p
            elif after.startswith(text) and len(after) > len(text):
                law[after[len(text) : len(text) + 1]] += probability * p
            elif text.startswith(after):
                go(after, probability * p)

    go(b"", 1.0)
    return dict(law)


def average(those, options, text: bytes) -> dict[bytes, float]:
    out = defaultdict(float)
    for i, weight in enumerate(those.weights):
        law = next_byte(those, i, options, text)
        total = sum(law.values())
        assert total > 0
        for key, p in law.items():
            out[key] += weight * p / total
    return dict(out)


def exact(those, options, text: bytes) -> dict[bytes, float]:
    settings = those.settings(raw=True, seed=0, **options)
    law = ExactReference(those, settings, those.encode_prompt("ab", settings)).distribution(tuple(text))
    return {END if one == those.unit.end else bytes([one]): law[one] for one in np.flatnonzero(law).tolist()}


PLACES = [b"", b"a", b"ab", b"bab", b"ab a", b"a  ab", b"babab a"]
KEPT = {name: one for name, one in OPTIONS.items() if name not in ("top_k", "top_p", "min_p", "defaults", "all")}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("text", PLACES)
def test_the_reference_is_the_sum_over_everything_that_can_be_written(text, name):
    found = exact(pair(), OPTIONS[name], text)
    assert sum(found.values()) == pytest.approx(1)
    assert_same_law(found, average(pair(), OPTIONS[name], text), 1e-9)


def at(those, options, text: bytes):
    return written(those, options, "ab", [bytes([b]) for b in text])


def drawn(strategy, those, options, text: bytes, noise):
    """The first choice of a strategy behind a text."""
    choice, _ = driven(strategy, at(those, options, text), those.weights, noise)
    return choice


def first(those, options, text: bytes, noise) -> bytes:
    choice = drawn(byte_mixture(), those, options, text, noise)
    return END if choice.symbol == those.unit.end else bytes([choice.symbol])


@pytest.mark.parametrize("options", [PLAIN, {"temperature": 0.6, "top_k": 0}, {"temperature": 1.0, "top_k": 3}, {}])
@pytest.mark.parametrize("text", PLACES)
def test_draws_follow_the_exact_law(text, options):
    those = pair()
    counts = counted(lambda i: first(those, options, text, Noise(3, i, len(text))), 1500)
    assert_drawn_from(counts, exact(those, options, text))


@pytest.mark.parametrize("text", [b"ab", b"bab", b"babab a"])
@pytest.mark.parametrize("member", [0, 1])
def test_the_next_byte_follows_the_members_own_law_whichever_it_is(text, member):
    those = pair()
    counts = defaultdict(int)
    for sequence in range(1500):
        choice = drawn(byte_mixture(member), those, PLAIN, text, Noise(4, sequence, 1))
        assert choice.member == member
        counts[END if choice.symbol == those.unit.end else bytes([choice.symbol])] += 1
    law = next_byte(those, member, PLAIN, text)
    assert_drawn_from(counts, {key: p / sum(law.values()) for key, p in law.items()})


@pytest.mark.parametrize("options", [PLAIN, {"temperature": 1.0, "top_k": 2}])
def test_one_member_alone_writes_the_texts_it_writes_in_pieces(options):
    alone = ensemble([engine(TOKENS[0], seed=7)], unit="byte")
    law = defaultdict(float)

    def go(before: bytes, probability: float) -> None:
        for data, p in own_law(alone, 0, options, before).items():
            after = before + data
            if data == END or len(after) >= 4:
                law[(after + (b"." if data == END else b""))[:4]] += probability * p
            else:
                go(after, probability * p)

    go(b"", 1.0)
    assert sum(law.values()) == pytest.approx(1)

    def reply(sequence: int, unit: str) -> bytes:
        those = ensemble(alone.members[:1] and [alone.members[0].engine], unit=unit)
        done = those.generate("ab", raw=True, seed=6, sequence=sequence, max_tokens=4, **options)
        data = b"".join(one.data for one in done.tokens)
        return (data + (b"." if done.finish_reason == "stop" else b""))[:4]

    for unit in ("byte", "piece"):
        assert_drawn_from(counted(lambda i, unit=unit: reply(i, unit), 4000), law)


@pytest.mark.parametrize("options", [PLAIN, {"temperature": 1.0, "top_k": 2}])
def test_replies_follow_the_law_byte_by_byte(options):
    those = pair()
    law: dict[bytes, float] = {b"": 1.0}
    for length in range(3):
        for text in [one for one in law if len(one) == length and not one.endswith(b".")]:
            probability = law.pop(text)
            for key, p in exact(those, options, text).items():
                law[text + (key or b".")] = probability * p

    def reply(sequence: int) -> bytes:
        done = those.generate("ab", raw=True, seed=8, sequence=sequence, max_tokens=3, **options)
        return b"".join(one.data for one in done.tokens) + (b"." if done.finish_reason == "stop" else b"")

    assert_drawn_from(counted(reply, 5000), law)


def test_a_text_that_a_member_would_not_write_is_written_over():
    one = fixed({b"ab": 0.5, b"a": 0.2, b"b": 0.2, b"ba": 0.1}, [b"a", b"b", b"ab", b"ba"])
    those = ensemble([one], unit="byte")
    options = {"temperature": 1.0, "top_k": 1}
    # It would write "ab" only. Of what begins with b, "b" is likeliest; behind it comes "ab" again.
    assert_same_law(exact(those, options, b"b"), {b"a": 1.0}, 1e-9)
    # "a" is most likely the beginning of "ab", and what it would have written.
    assert_same_law(exact(those, options, b"a"), {b"b": 1.0}, 1e-9)
    # With three tokens left it could have written "b", and goes on with any of the three.
    assert_same_law(exact(those, {"temperature": 1.0, "top_k": 3}, b"b"), {b"a": 7 / 9, b"b": 2 / 9}, 1e-6)
    for text in (b"b", b"a", b"bb", b"bba"):
        for some in (1, 2, 3):
            options = {"temperature": 1.0, "top_k": some}
            counts = counted(lambda i, text=text, options=options: first(those, options, text, Noise(2, i)), 400)
            law = exact(those, options, text)
            assert counts.keys() == law.keys()
            if len(law) > 1:
                assert_drawn_from(counts, law)


def test_a_text_that_no_tokens_spell_ends_on_a_boundary():
    gone = ensemble([fixed({b"b": 1.0}, [b"b", b"a"])], unit="byte")
    assert_same_law(exact(gone, PLAIN, b"a"), {b"b": 1.0}, 1e-6)
    assert first(gone, PLAIN, b"a", Noise(0)) == b"b"


def ended(choices, coin: int, end: int) -> bool:
    return coin != choices[-1].member or choices[-1].symbol in (ord(" "), end)


def test_a_tokens_bytes_stand_while_its_member_is_drawn():
    those = pair()
    lengths = defaultdict(int)
    for sequence in range(300):
        settings = those.settings(raw=True, seed=1, sequence=sequence, **PLAIN)
        writer = those.context(settings)
        writing = writer.begin_sequence(those.encode_prompt("ab", settings))
        noise = Noise(1, sequence)
        choices = writer.decode_step(writing, noise, 8)
        lengths[len(choices)] += 1
        assert {one.member for one in choices} == {noise.coin(those.weights)}
        assert all(noise.at(k).coin(those.weights) == choices[0].member for k in range(len(choices)))
        assert len(choices) == 8 or ended(choices, noise.at(len(choices)).coin(those.weights), those.unit.end)
        assert len(writing.state) == 0
        assert len(writer.decode_step(writing, noise, 1)) == 1
    assert {1, 2, 3, 4} <= set(lengths)


def test_log_probabilities_of_a_tokens_bytes_add_up():
    those = ensemble([fixed({b"ab": 0.5, b"a": 0.3, b"ac": 0.2}, [b"a", b"ab", b"ac"])], unit="byte")
    for seed in range(20):
        reply = those.generate("a", raw=True, seed=seed, max_tokens=2, **PLAIN)
        assert np.exp(reply.tokens[0].logprob) == pytest.approx(1, abs=1e-6)
        assert reply.tokens[0].data == b"a"
        if reply.tokens[1].data == b"b":
            assert np.exp(reply.tokens[1].logprob) == pytest.approx(0.5, abs=1e-6)


def test_one_forward_is_asked_at_a_time_and_what_was_asked_is_not_asked_again():
    those = pair()
    asked = []
    writing = at(those, PLAIN, b"ab")
    for sequence in range(40):
        _, rounds = driven(byte_mixture(0), writing, those.weights, Noise(2, sequence))
        assert all(isinstance(one, LogitsRequest) for [one] in rounds)
        asked += [tuple(one.ids.tolist()) for [one] in rounds]
    assert len(asked) == len(set(asked)) <= 3


def test_a_member_alone_needs_about_a_forward_a_token():
    alone = ensemble([engine(TOKENS[0], seed=7)], unit="byte")
    forwards, tokens = 0, 0
    for seed in range(20):
        reply = alone.generate("ab", raw=True, seed=seed, max_tokens=40)
        forwards += reply.usage.members["m0"].forwards
        tokens += len(alone.members[0].engine.encoder.encode(b"".join(one.data for one in reply.tokens)).ids)
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
    one, two = (pair().generate("ab", raw=True, method=method, seed=5, max_tokens=60) for _ in range(2))
    assert one.text == two.text
    assert method != "single" or {token.member for token in one.tokens} <= {"m0"}


@pytest.mark.models
@pytest.mark.parametrize(
    ("text", "options"),
    [(b"The bri", PLAIN), (b"They said th", {}), ("Zürich is a ".encode() + "ü".encode()[:1], PLAIN)],
)
def test_the_real_pair_follows_the_exact_law_inside_words_and_characters(demo_pair, text, options):
    those = Ensemble(demo_pair.members, [0.5, 0.5], unit="byte")
    settings = those.settings(raw=True, seed=0, **options)
    prompts = those.encode_prompt("Look at the map.", settings)
    writing = those.context(settings).begin_sequence(prompts)
    for byte in text:
        writing.state.append(byte)
    counts = defaultdict(int)
    for sequence in range(500):
        choice, _ = driven(byte_mixture(), writing, those.weights, Noise(9, sequence, len(text)))
        counts[choice.symbol] += 1
    law = ExactReference(those, settings, prompts).distribution(tuple(text))
    assert_drawn_from(counts, {one: law[one] for one in np.flatnonzero(law).tolist()})
