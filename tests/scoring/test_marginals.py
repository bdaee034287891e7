"""Exact probabilities of texts in the units `word` and `byte`: against enumeration of all tokenizations."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from toys import END, engine, make_ensemble, member_distribution

from mixlm.errors import TokenizerError, UnsupportedError
from mixlm.scoring.marginals import byte_logprobs, match_tokens, piece_logprobs
from mixlm.scoring.passages import text_prefix
from mixlm.scoring.score import score, score_answers
from mixlm.scoring.scores import router_weights
from mixlm.tokenization.segments import encode_exactly
from mixlm.types import Sampling
from mixlm.units.word import begins_word
from mixlm.verification.exact import ExactReference

TOKENS = ((b"a", b"b", b"ab", b" ", b" a", b"ba", b"bab"), (b" a", b"b", b"a", b" ", b" ab", b"bb"))
WEIGHTS = np.array([0.6, 0.4])
PLAIN = {"temperature": 1.0, "top_k": 0}
TEXTS = [b"a", b"ab a", b"a  ab", b"babab a", b"b a b ab", b" ab"]
# The same, with tokens that lie across the beginning of a word.
ACROSS = ((*TOKENS[0], b"b a", b"a b"), (*TOKENS[1], b"a "))


def pair(unit: str, tokens=TOKENS):
    return make_ensemble([engine(vocabulary, seed=30 + i) for i, vocabulary in enumerate(tokens)], WEIGHTS, unit=unit)


def total(scores, weights=WEIGHTS) -> float:
    return float(scores.mixture(weights).sum())


def next_tokens(toy, unit: str, path) -> dict[tuple[bytes, int], float]:
    """The distribution of the next token and its member after a path of such."""
    text = b"".join(data for data, _ in path)
    distributions = []
    for member in toy.members:
        ids = member.engine.encoder.encode(text).ids if text else []
        prompt = member.engine.prompts.raw("").tolist()
        distributions.append(member_distribution(member.engine, Sampling(**PLAIN), prompt, ids))
    if unit == "piece" or not path:
        return {(u, i): WEIGHTS[i] * p for i, tokens in enumerate(distributions) for u, p in tokens.items()}
    owner = path[-1][1]
    starts = [
        {u: p for u, p in distribution.items() if u == END or begins_word(u, text)} for distribution in distributions
    ]
    out = {(u, owner): p for u, p in distributions[owner].items() if u not in starts[owner]}
    ended = sum(starts[owner].values())
    for i, distribution in enumerate(starts):
        out |= {(u, i): WEIGHTS[i] * ended * p / sum(distribution.values()) for u, p in distribution.items()}
    return out


def text_probability(toy, text: bytes, *, ends: bool = False, unit: str = "word") -> float:
    """The probability that a text is generated, or that what is generated begins with it, over all paths."""

    def go(path) -> float:
        before = b"".join(data for data, _ in path)
        if len(before) >= len(text) and not ends:
            return 1.0
        out = 0.0
        for (data, member), p in next_tokens(toy, unit, path).items():
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
def test_a_text_in_words_has_the_probability_of_all_its_tokenizations(text, tokens):
    toy = pair("word", tokens)
    scores = score(toy, text)
    assert scores.unit == "word"
    assert b"".join(text[a:b] for a, b in zip(scores.starts, scores.ends, strict=True)) == text
    assert total(scores) == pytest.approx(np.log(text_probability(toy, text, ends=False)))


@pytest.mark.parametrize("tokens", [TOKENS, ACROSS])
@pytest.mark.parametrize("text", TEXTS)
def test_a_text_in_pieces_has_the_probability_of_all_its_tokenizations(text, tokens):
    toy = pair("piece", tokens)
    matches = [match_tokens(member.engine, text_prefix(member.engine), text) for member in toy.members]
    scores = piece_logprobs(matches, WEIGHTS)
    assert scores.shape == (len(text),)
    assert scores.sum() == pytest.approx(np.log(text_probability(toy, text, unit="piece")))


def test_words_that_no_token_lies_across_are_told_apart():
    starts = {tokens: score(pair("word", tokens), b"a ab  b").starts.tolist() for tokens in (TOKENS, ACROSS)}
    assert starts == {TOKENS: [0, 1, 4], ACROSS: [0, 4]}


@pytest.mark.parametrize("unit", ["word", "byte"])
@pytest.mark.parametrize("tokens", [TOKENS, ACROSS])
def test_a_member_alone_has_one_distribution_of_texts_in_every_unit(unit, tokens):
    for text in TEXTS:
        for member in range(2):
            alone = np.eye(2)[member]
            toy = pair(unit, tokens).with_weights(alone.tolist())
            model = toy.members[member].engine
            expected = byte_logprobs(match_tokens(model, text_prefix(model), text)).sum()
            assert total(score(toy, text), alone) == pytest.approx(expected)


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_in_bytes_has_the_exact_distribution_of_every_byte(text):
    toy = pair("byte")
    settings = toy.settings(raw=True, **PLAIN)
    exact = ExactReference(toy, settings, toy.encode_prompt("", settings))
    expected = [np.log(exact.distribution(list(text[:offset]))[text[offset]]) for offset in range(len(text))]
    np.testing.assert_allclose(score(toy, text).mixture(WEIGHTS), expected)


def test_the_end_of_an_answer_is_scored():
    toy = pair("word")
    text = b"ab a"
    scores = score_answers(toy, [("", text.decode())], settings=toy.settings(raw=True), ends=True)
    assert total(scores) == pytest.approx(np.log(text_probability(toy, text, ends=True)))
    assert (scores.starts[-1], scores.ends[-1]) == (4, 4)
    scores = score_answers(pair("byte"), [("", text.decode())], settings=toy.settings(raw=True), ends=True)
    settings = toy.settings(raw=True, **PLAIN)
    exact = ExactReference(pair("byte"), settings, toy.encode_prompt("", settings))
    assert scores.mixture(WEIGHTS)[-1] == pytest.approx(np.log(exact.distribution(list(text))[-1]))


@pytest.mark.slow
def test_a_long_text_without_words_is_no_underflow():
    toy = pair("word")
    scores = score(toy, b"ab" * 1000)
    assert np.isfinite(total(scores))
    assert total(scores) < np.log(np.finfo(np.float64).tiny)


def test_matches_at_an_offset_are_the_same_at_the_end_of_a_text_and_inside_a_longer_one():
    model, text = engine(TOKENS[0], seed=30), b"babab abab ba"
    whole = match_tokens(model, text_prefix(model), text)
    for length in range(len(text)):
        part = match_tokens(model, text_prefix(model), text[:length])
        np.testing.assert_array_equal(part.word_start_mass, whole.word_start_mass[: length + 1])
        np.testing.assert_array_equal(part.end_mass, whole.end_mass[: length + 1])


def test_matches_are_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXLM_CACHE", str(tmp_path))
    toy = pair("word")
    calls = []
    first = score(toy, b"ab a ab", identities=["x", "y"], progress=lambda *state: calls.append(state))
    assert calls[-1] == ("m1", 8, 8)
    sessions = []
    for member in toy.members:
        monkeypatch.setattr(member.engine, "session", lambda: sessions.append(1))
    again = score(toy, b"ab a ab", identities=["x", "y"])
    np.testing.assert_array_equal(again.logprobs, first.logprobs)
    byte = dataclasses.replace(first, unit="byte")
    assert byte.names == again.names
    assert not sessions


def test_engines_that_return_top_tokens_only_are_refused():
    toy = pair("byte")
    toy.members[1].engine.top_k_limit = 4
    with pytest.raises(UnsupportedError, match="the log-probability of a given text needs every token's probability"):
        score(toy, b"ab")


def test_a_router_weighs_words():
    toy = pair("word")
    scores = score(toy, b"ab a b")
    assert router_weights(scores, toy.router).shape == scores.logprobs.shape
    assert begins_word(scores.text[scores.starts[1] :], scores.text[: scores.starts[1]])


def test_tokens_without_an_embedding_are_refused_by_name():
    member = engine(seed=1)
    old = member.vocabulary
    names = {**dict(enumerate(old.names)), 11: "<tool>"}
    member.vocabulary = type(old).of(dict(enumerate(old.tokens)), old.size, old.end_ids, old.special_ids, names)
    encoder = SimpleNamespace(encode=lambda data: SimpleNamespace(ids=[1, 11]))
    refused = r"has the token '<tool>' \(id 11\) for .*, whose model has embeddings for ids below 8 only"
    with pytest.raises(TokenizerError, match=refused):
        encode_exactly(encoder, member.vocabulary, b"ab", "m")
    with pytest.raises(TokenizerError, match=refused):
        match_tokens(member, np.array([6, 11]), b"a")
