"""Exact probabilities of texts in the units `word` and `byte`: against enumeration of every way to write them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from toys import END, engine, ensemble, member_law

from mixlm.errors import UnsupportedError
from mixlm.scoring.passages import beginning
from mixlm.scoring.score import score, score_answers
from mixlm.scoring.scores import router_weights
from mixlm.scoring.ways import bytes_logprobs, pieces_logprobs, read
from mixlm.types import Sampling
from mixlm.units.word import begins_word
from mixlm.verification.exact import Exact

TOKENS = ((b"a", b"b", b"ab", b" ", b" a", b"ba", b"bab"), (b" a", b"b", b"a", b" ", b" ab", b"bb"))
WEIGHTS = np.array([0.6, 0.4])
PLAIN = {"temperature": 1.0, "top_k": 0}
TEXTS = [b"a", b"ab a", b"a  ab", b"babab a", b"b a b ab", b" ab"]
# The same, with tokens that lie across the beginning of a word.
ACROSS = ((*TOKENS[0], b"b a", b"a b"), (*TOKENS[1], b"a "))


def pair(unit: str, tokens=TOKENS):
    return ensemble([engine(one, seed=30 + i) for i, one in enumerate(tokens)], WEIGHTS, unit=unit)


def total(scores, weights=WEIGHTS) -> float:
    return float(scores.mixture(weights).sum())


def following(those, unit: str, path) -> dict[tuple[bytes, int], float]:
    """The law of the next token and its writer behind a path of such."""
    text = b"".join(data for data, _ in path)
    laws = []
    for one in those.members:
        reply = one.engine.encoder.encode(text).ids if text else []
        laws.append(member_law(one.engine, Sampling(**PLAIN), one.engine.prompts.raw("").tolist(), reply))
    if unit == "piece" or not path:
        return {(u, i): WEIGHTS[i] * p for i, law in enumerate(laws) for u, p in law.items()}
    owner = path[-1][1]
    begun = [{u: p for u, p in law.items() if u == END or begins_word(u, text)} for law in laws]
    out = {(u, owner): p for u, p in laws[owner].items() if u not in begun[owner]}
    ended = sum(begun[owner].values())
    for i, law in enumerate(begun):
        out |= {(u, i): WEIGHTS[i] * ended * p / sum(law.values()) for u, p in law.items()}
    return out


def written(those, text: bytes, *, ends: bool = False, unit: str = "word") -> float:
    """The probability that a text is written in words, or that what is written begins with it, by every path."""

    def go(path) -> float:
        before = b"".join(data for data, _ in path)
        if len(before) >= len(text) and not ends:
            return 1.0
        out = 0.0
        for (data, member), p in following(those, unit, path).items():
            if data == END:
                out += p * (ends and before == text)
            elif (before + data).startswith(text) or text.startswith(before + data):
                if ends and len(before + data) > len(text):
                    continue
                out += p * go((*path, (data, member)))
        return out

    return go(())


@pytest.mark.parametrize("tokens", [TOKENS, ACROSS])
@pytest.mark.parametrize("text", TEXTS)
def test_a_text_in_words_has_the_probability_of_all_ways_to_write_it(text, tokens):
    those = pair("word", tokens)
    scores = score(those, text)
    assert scores.unit == "word"
    assert b"".join(text[a:b] for a, b in zip(scores.starts, scores.ends, strict=True)) == text
    assert total(scores) == pytest.approx(np.log(written(those, text, ends=False)))


@pytest.mark.parametrize("tokens", [TOKENS, ACROSS])
@pytest.mark.parametrize("text", TEXTS)
def test_a_text_in_pieces_has_the_probability_of_all_ways_to_write_it(text, tokens):
    those = pair("piece", tokens)
    readings = [read(one.engine, beginning(one.engine), text) for one in those.members]
    found = pieces_logprobs(readings, WEIGHTS)
    assert found.shape == (len(text),)
    assert found.sum() == pytest.approx(np.log(written(those, text, unit="piece")))


def test_words_that_no_token_lies_across_are_told_apart():
    starts = {tokens: score(pair("word", tokens), b"a ab  b").starts.tolist() for tokens in (TOKENS, ACROSS)}
    assert starts == {TOKENS: [0, 1, 4], ACROSS: [0, 4]}


@pytest.mark.parametrize("unit", ["word", "byte"])
@pytest.mark.parametrize("tokens", [TOKENS, ACROSS])
def test_a_member_alone_has_one_law_of_texts_in_every_unit(unit, tokens):
    for text in TEXTS:
        for member in range(2):
            alone = np.eye(2)[member]
            those = pair(unit, tokens).with_weights(alone.tolist())
            one = those.members[member].engine
            expected = bytes_logprobs(read(one, beginning(one), text)).sum()
            assert total(score(those, text), alone) == pytest.approx(expected)


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_in_bytes_has_the_exact_law_of_every_byte(text):
    those = pair("byte")
    settings = those.settings(raw=True, **PLAIN)
    exact = Exact(those, settings, those.encode_prompt("", settings))
    expected = [np.log(exact.law(list(text[:at]))[text[at]]) for at in range(len(text))]
    np.testing.assert_allclose(score(those, text).mixture(WEIGHTS), expected)


def test_the_end_of_an_answer_is_scored():
    those = pair("word")
    text = b"ab a"
    found = score_answers(those, [("", text.decode())], settings=those.settings(raw=True), ends=True)
    assert total(found) == pytest.approx(np.log(written(those, text, ends=True)))
    assert (found.starts[-1], found.ends[-1]) == (4, 4)
    found = score_answers(pair("byte"), [("", text.decode())], settings=those.settings(raw=True), ends=True)
    settings = those.settings(raw=True, **PLAIN)
    exact = Exact(pair("byte"), settings, those.encode_prompt("", settings))
    assert found.mixture(WEIGHTS)[-1] == pytest.approx(np.log(exact.law(list(text))[-1]))


def test_a_long_text_without_words_is_no_underflow():
    those = pair("word")
    scores = score(those, b"ab" * 1000)
    assert np.isfinite(total(scores))
    assert total(scores) < np.log(np.finfo(np.float64).tiny)


def test_the_same_is_said_at_a_place_that_ends_a_text_and_inside_a_longer_one():
    one, text = engine(TOKENS[0], seed=30), b"babab abab ba"
    whole = read(one, beginning(one), text)
    for at in range(len(text)):
        part = read(one, beginning(one), text[:at])
        np.testing.assert_array_equal([part.begins, part.ends], [whole.begins[: at + 1], whole.ends[: at + 1]])


def test_what_was_read_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXLM_CACHE", str(tmp_path))
    those = pair("word")
    told = []
    first = score(those, b"ab a ab", identities=["x", "y"], progress=lambda *one: told.append(one))
    assert told[-1] == ("m1", 8, 8)
    calls = []
    for one in those.members:
        monkeypatch.setattr(one.engine, "session", lambda: calls.append(1))
    again = score(those, b"ab a ab", identities=["x", "y"])
    np.testing.assert_array_equal(again.logprobs, first.logprobs)
    byte = dataclasses.replace(first, unit="byte")
    assert byte.names == again.names
    assert not calls


def test_engines_that_tell_their_likeliest_tokens_only_are_refused():
    those = pair("byte")
    those.members[1].engine.top_k_limit = 4
    with pytest.raises(UnsupportedError, match="the log-probability of a given text needs every token's probability"):
        score(those, b"ab")


def test_a_router_weighs_words():
    those = pair("word")
    scores = score(those, b"ab a b")
    assert router_weights(scores, those.router).shape == scores.logprobs.shape
    assert begins_word(scores.text[scores.starts[1] :], scores.text[: scores.starts[1]])
