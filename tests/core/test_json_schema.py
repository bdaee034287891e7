"""Replies held to a JSON schema: the law by enumeration, validity by another library, every unit and method."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from speaking import speaking
from toys import (
    END,
    Recorder,
    assert_drawn_from,
    assert_same_law,
    counted,
    driven,
    engine,
    ensemble,
    named,
    written,
)

from mixlm.core.sampling import dense_distribution
from mixlm.decoding.conventional import conventional
from mixlm.decoding.mixture import mixture
from mixlm.engines.toy import ToyEngine
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.types import Sampling
from mixlm.verification.exact import ExactReference

# A language small enough to write down: texts of JSON, without any place for whitespace.
CHOICES = ["a", "ab", "b a", 1, 12, 121, None]
SCHEMA = {"enum": CHOICES}
LANGUAGE = frozenset(json.dumps(one).encode() for one in CHOICES)
FIRST = (b'"', b"a", b"b", b'"a', b" ", b"1", b"2", b"12", b"null", b'b"', b'a"', b"n", b"u", b"l", b'""')
SECOND = (b"21", b"b", b'"', b" ", b"nu", b"l", b"ll", b'"ab', b"1", b"a", b'b a"', b"2", b"u", b"n", b"a", b" a")
OPTIONS = {"temperature": 0.9, "top_k": 4}
BOTH_UNITS = pytest.mark.parametrize("unit", ["token", "piece"])


def pair(unit: str, **more: Any) -> Ensemble:
    vocabularies = (FIRST, FIRST) if unit == "token" else (FIRST, SECOND)
    engines = [engine(tokens, seed=40 + i) for i, tokens in enumerate(vocabularies)]
    return ensemble(engines, [0.6, 0.4], unit=unit, **more)


def held_law(one: ToyEngine, sampling: Sampling, text: bytes, reply) -> dict[bytes, float]:
    """A member's law of the next symbol: what keeps the text a beginning of the language, by looking at all of it."""
    vocabulary = one.vocabulary

    def fits(i: int) -> bool:
        if i in vocabulary.end_ids:
            return text in LANGUAGE
        data = vocabulary.tokens[i]
        return bool(data) and any(whole.startswith(text + data) for whole in LANGUAGE)

    banned = np.array([i for i in range(vocabulary.size) if not fits(i)], dtype=np.int64)
    logits = one.table((*one.prompts.raw("a").tolist(), *reply)).astype(np.float32)
    if len(banned) == vocabulary.size:
        return {}
    law: dict[bytes, float] = defaultdict(float)
    for i, probability in enumerate(dense_distribution(logits, sampling, banned)):
        if probability > 0:
            law[END if i in vocabulary.end_ids else vocabulary.tokens[i]] += float(probability)
    return dict(law)


def laws(those: Ensemble, pieces: tuple[bytes, ...]) -> list[dict[bytes, float]]:
    text = b"".join(pieces)
    out = []
    for member in those.members:
        one = member.engine
        shared = those.unit.name == "token"
        reply = [one.vocabulary.tokens.index(data) for data in pieces] if shared else one.encoder.encode(text).ids
        out.append(held_law(one, Sampling(**OPTIONS), text, reply))
    return out


def average(those: Ensemble, pieces: tuple[bytes, ...]) -> dict[bytes, float]:
    """The ensemble's law: a member that has no token to go on with leaves its weight to the others."""
    law: dict[bytes, float] = defaultdict(float)
    parts = [(weight, one) for weight, one in zip(those.weights, laws(those, pieces), strict=True) if one]
    total = sum(weight for weight, _ in parts)
    for weight, one in parts:
        for data, probability in one.items():
            law[data] += weight / total * probability
    return dict(law)


def whole_texts(those: Ensemble) -> dict[bytes, float]:
    """The probability of every text, a sum over all ways to write it."""
    out: dict[bytes, float] = defaultdict(float)

    def go_on(pieces: tuple[bytes, ...], mass: float) -> None:
        for data, probability in average(those, pieces).items():
            if data == END:
                out[b"".join(pieces)] += mass * probability
            else:
                go_on((*pieces, data), mass * probability)

    go_on((), 1.0)
    return dict(out)


def reachable(those: Ensemble) -> list[tuple[bytes, ...]]:
    found, waiting = [], [()]
    while waiting:
        pieces = waiting.pop()
        found.append(pieces)
        waiting += [(*pieces, data) for data in average(those, pieces) if data != END]
    return found


@BOTH_UNITS
def test_the_law_at_every_place_is_the_one_by_enumeration(unit):
    those = pair(unit)
    places = reachable(those)
    assert len(places) > 15
    for pieces in places:
        options = {**OPTIONS, "json_schema": SCHEMA}
        noise = Recorder()
        driven(conventional, written(those, options, "a", pieces), those.weights, noise)
        found = named(those, noise.symbols, np.exp(noise.logprobs))
        assert_same_law(found, average(those, pieces) if all(laws(those, pieces)) else found)
        for coin, own in enumerate(laws(those, pieces)):
            if own:
                noise = Recorder(coin)
                driven(mixture, written(those, options, "a", pieces), those.weights, noise)
                assert_same_law(named(those, noise.symbols, np.exp(noise.logprobs)), own)


@BOTH_UNITS
@pytest.mark.parametrize("method", ["mixture", "conventional", "speculative"])
def test_whole_texts_follow_the_law(unit, method):
    those = pair(unit)
    law = whole_texts(those)
    assert set(law) <= LANGUAGE
    assert sum(law.values()) == pytest.approx(1)

    def write(sequence: int) -> bytes:
        done = those.generate(
            "a", raw=True, seed=9, sequence=sequence, method=method, json_schema=SCHEMA, max_tokens=40, **OPTIONS
        )
        assert done.finish_reason == "stop"
        return done.text.encode()

    assert_drawn_from(counted(write, 800), law)


@pytest.mark.parametrize("unit", ["word", "byte"])
@pytest.mark.parametrize("tokens", [FIRST, SECOND])
def test_one_member_has_one_law_in_every_unit(unit, tokens):
    """Words and bytes of one member are what it writes in pieces."""
    alone = ensemble([engine(tokens, seed=40)], unit="piece")
    law = whole_texts(alone)
    other = Ensemble(alone.members, unit=unit)

    def write(sequence: int) -> bytes:
        return other.generate(
            "a", raw=True, seed=3, sequence=sequence, json_schema=SCHEMA, max_tokens=60, **OPTIONS
        ).text.encode()

    assert_drawn_from(counted(write, 800), law)


@pytest.mark.parametrize("unit", ["piece", "word", "byte"])
def test_several_members_follow_the_exact_law_of_their_unit(unit):
    """Against the reference, which sums over every way to write a text, dense and uncached."""
    those = Ensemble(pair("piece").members, [0.6, 0.4], unit=unit)
    settings = those.settings(raw=True, seed=0, json_schema=SCHEMA, **OPTIONS)
    exact = ExactReference(those, settings, those.encode_prompt("a", settings))
    law: dict[bytes, float] = defaultdict(float)

    def go_on(symbols: tuple[int, ...], mass: float) -> None:
        following = exact.distribution(symbols)
        for symbol in np.flatnonzero(following).tolist():
            if symbol == those.unit.end:
                law[b"".join(map(those.unit.symbol_bytes, symbols))] += mass * following[symbol]
            else:
                go_on((*symbols, symbol), mass * following[symbol])

    go_on((), 1.0)
    assert set(law) <= LANGUAGE
    assert sum(law.values()) == pytest.approx(1)
    if unit == "piece":
        assert_same_law(law, whole_texts(those), 1e-9)

    def write(sequence: int) -> bytes:
        return those.generate(
            "a", raw=True, seed=6, sequence=sequence, json_schema=SCHEMA, max_tokens=60, **OPTIONS
        ).text.encode()

    assert_drawn_from(counted(write, 800), law)


@pytest.mark.parametrize("unit", ["token", "piece", "word", "byte"])
def test_several_members_stay_in_the_language_in_every_unit(unit):
    those = Ensemble(pair("token" if unit == "token" else "piece").members, [0.6, 0.4], unit=unit)
    for seed in range(150):
        found = those.generate("a", raw=True, seed=seed, json_schema=SCHEMA, max_tokens=60, **OPTIONS)
        assert found.finish_reason == "stop"
        assert found.text.encode() in LANGUAGE


@BOTH_UNITS
def test_greedy_takes_the_likeliest_of_the_held_average(unit):
    those = pair(unit)
    for draft in (None, "m1", "lookup"):
        found = those.generate(
            "a", raw=True, method="greedy", json_schema=SCHEMA, draft=draft, top_logprobs=3, **OPTIONS
        )  # fmt: skip
        pieces: tuple[bytes, ...] = ()
        for token in found.tokens:
            law = average(those, pieces)
            assert law[token.data] == pytest.approx(max(law.values()))
            assert np.exp(token.logprob) == pytest.approx(law[token.data])
            assert {one.data for one in token.top_logprobs} <= set(law)
            pieces = (*pieces, token.data)
        assert b"".join(pieces) in LANGUAGE


@pytest.mark.parametrize("draft", ["m0", "lookup"])
def test_speculative_writes_mixtures_text(draft):
    those = pair("piece")
    for seed in range(40):
        options = {"raw": True, "seed": seed, "json_schema": SCHEMA, **OPTIONS}
        expected = those.generate("a", **options)
        found = those.generate("a", method="speculative", draft=draft, block=3, **options)
        assert found.tokens == expected.tokens


def test_mixing_before_truncating_and_published_rules_stay_in_the_language():
    those = pair("piece")
    for more in ({"mix_then_truncate": True}, {"rule": "gac"}, {"rule": "unite"}):
        for seed in range(40):
            found = those.generate(
                "a", raw=True, method="conventional", seed=seed, json_schema=SCHEMA, temperature=1.0, top_k=3, **more
            )
            assert found.text.encode() in LANGUAGE


def test_a_member_that_cannot_go_on_leaves_its_weight_to_the_others():
    """The first cannot write a 2: behind a 1 that has to be followed by one, the second does, whatever the coin."""
    without = tuple(one for one in FIRST if b"2" not in one)
    # It can read one: what it reads is encoded.
    first = engine(without, seed=1)
    first.encoder = engine(FIRST).encoder
    first.encoder._ids = {**first.encoder._ids, b"2": 0, b"12": 0}
    those = ensemble([first, engine(FIRST, seed=2)], [0.9, 0.1], unit="piece")
    drafted = [("speculative", "m0"), ("speculative", "lookup"), ("greedy", "m0"), ("greedy", "lookup")]
    for method, draft in [("mixture", None), ("conventional", None), ("greedy", None), *drafted]:
        for seed in range(20):
            found = those.generate(
                "a", raw=True, seed=seed, method=method, draft=draft, json_schema={"const": 12}, **OPTIONS
            )
            assert found.text == "12"
            assert found.tokens[-1].member == "m1"
    with pytest.raises(UnsupportedError, match="no member has a token"):
        ensemble([first], unit="piece").generate("a", raw=True, json_schema={"const": 12})


def test_a_character_may_be_written_byte_by_byte():
    tokens = (b'"', b"\xc3", b"\xa9", b"\xc3\xa9", b"a", b"\xe2", b"\x82", b"\xac")
    those = ensemble([engine(tokens, seed=1), engine(tokens[::-1], seed=2)], unit="piece")
    seen = set()
    for seed in range(30):
        found = those.generate("a", raw=True, seed=seed, json_schema={"enum": ["é", "€"]}, top_k=0)
        assert json.loads(found.text) in ("é", "€")
        seen.add(tuple(one.data for one in found.tokens))
    assert len(seen) > 2


def test_the_schema_says_where_a_reply_ends_and_not_the_stop_strings_of_a_template():
    those = ensemble([ToyEngine(seed=1)])
    those.members[0].engine.stops = ("a",)
    assert those.generate("a", seed=1, json_schema={"const": "a"}).text == '"a"'
    assert those.generate("a", seed=1, json_schema={"const": "a"}, stop="a").text == '"'


def test_the_ensembles_figures_are_those_of_the_held_laws():
    those = pair("piece")
    options = {"raw": True, "seed": 3, "json_schema": SCHEMA, "logprobs_of": "ensemble", "top_logprobs": 9}
    for seed in range(10):
        pieces: tuple[bytes, ...] = ()
        for token in those.generate("a", **{**options, "seed": seed}, **OPTIONS).tokens:
            law = average(those, pieces)
            told = {one.data: np.exp(one.logprob) for one in token.top_logprobs}
            assert told == pytest.approx(law)
            pieces = (*pieces, token.data)


# Schemas that a machine makes up.

scalars = st.one_of(
    st.just({"type": "null"}),
    st.just({"type": "boolean"}),
    st.builds(
        lambda a, b: {"type": "integer", "minimum": a, "maximum": a + b}, st.integers(-99, 99), st.integers(0, 99)
    ),
    st.builds(
        lambda a, b: {"type": "string", "minLength": a, "maxLength": a + b}, st.integers(0, 2), st.integers(0, 4)
    ),
    st.builds(
        lambda one: {"enum": one}, st.lists(st.text(max_size=4) | st.integers(-(2**53), 2**53), min_size=1, max_size=3)
    ),
    st.just({"type": "string", "pattern": "^[a-c]{1,3}-(x|yz)$"}),
    st.just({"type": "string", "format": "date"}),
)


def wider(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.sampled_from(["name", "ok", "Größe", "a b", 'q"', "日本"])

    @st.composite
    def objects(draw: Any) -> dict[str, Any]:
        properties = draw(st.dictionaries(names, inner, max_size=3))
        required = [one for one in properties if draw(st.booleans())]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    arrays = st.builds(
        lambda items, a, b: {"type": "array", "items": items, "minItems": a, "maxItems": a + b},
        inner, st.integers(0, 1), st.integers(0, 2),
    )  # fmt: skip
    return st.one_of(objects(), arrays, st.builds(lambda one: {"anyOf": one}, st.lists(inner, min_size=1, max_size=2)))


schemas = st.recursive(scalars, wider, max_leaves=6)


@settings(max_examples=40)
@given(
    schema=schemas,
    seed=st.integers(0, 999),
    kinds=st.sampled_from([("gpt2", "gemma"), ("gpt4", "llama2"), ("tools", "digits")]),
)
def test_what_ended_is_valid(schema, seed, kinds):
    those = ensemble([speaking(kind, i) for i, kind in enumerate(kinds)], unit="piece")
    if seed % 4 == 3:
        those = those.with_unit("byte" if seed % 8 == 3 else "word")
    found = those.generate("the", raw=True, seed=seed, json_schema=schema, max_tokens=400, temperature=1.0, top_k=0)
    if found.finish_reason == "stop":
        jsonschema.validate(json.loads(found.text), schema)


def test_most_replies_end():
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "n": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["name", "n"],
        "additionalProperties": False,
    }
    those = ensemble([speaking("gpt2", 0), speaking("gemma", 1)], unit="piece")
    ended = 0
    for seed in range(20):
        found = those.generate("the", raw=True, seed=seed, json_schema=schema, max_tokens=120, top_k=0)
        ended += found.finish_reason == "stop"
        if found.finish_reason == "stop":
            jsonschema.validate(json.loads(found.text), schema)
    assert ended > 15


# What cannot be.


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "strin"}, "Invalid type"),
        ({"type": "string", "pattern": "(?=a)b"}, "regex"),
        ({"not": {"type": "string"}}, "not"),
        ({"$ref": "http://example.com/x.json"}, "not present"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, "minLength"),
    ],
)
def test_schemas_that_cannot_be_held_to_are_refused(schema, why):
    with pytest.raises(ConfigError, match=f"json_schema cannot be enforced: .*{why}"):
        pair("piece").generate("a", json_schema=schema)


def test_what_is_no_schema_is_refused():
    with pytest.raises(ConfigError, match="it must be a JSON object"):
        pair("piece").settings(json_schema="string")
    with pytest.raises(ConfigError, match="json_schema is not JSON"):
        pair("piece").generate("a", json_schema={"const": {1, 2}})
    deep: dict[str, Any] = {}
    for _ in range(3000):
        deep = {"items": deep}
    with pytest.raises(ConfigError, match="json_schema"):
        pair("piece").generate("a", json_schema=deep)
    with pytest.raises(ConfigError, match="json_schema has the integer 9007199254740993"):
        pair("piece").generate("a", json_schema={"const": 2**53 + 1})
    with pytest.raises(UnsupportedError, match="ignore_end"):
        pair("piece").settings(json_schema=SCHEMA, ignore_end=True)


def test_an_engine_that_tells_few_tokens_refuses_it():
    one = engine(FIRST)
    one.top_k_limit = 4
    with pytest.raises(UnsupportedError, match="json_schema allows tokens from anywhere"):
        ensemble([one]).generate("a", raw=True, top_k=2, json_schema=SCHEMA)


def test_without_the_library_it_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match=r"json_schema needs llguidance.*mixlm\[grammar\]"):
        pair("piece").generate("a", json_schema=SCHEMA)


def test_schemas_are_read_once_and_only_the_latest_are_kept():
    grammars = pair("piece").grammars
    first = grammars.for_schema(SCHEMA)
    assert grammars.for_schema(dict(SCHEMA)) is first
    for i in range(20):
        grammars.for_schema({"const": i})
    assert grammars.for_schema(SCHEMA) is not first
    assert pair("token").grammars.for_schema(SCHEMA)[0] is not None


def test_the_command_line_takes_a_file(capfd, tmp_path):
    from mixlm.cli import main

    file = tmp_path / "schema.json"
    asked = ["generate", "hello", "-m", "toy:1", "-m", "toy:2", "--seed", "3", "--json-schema", str(file)]
    file.write_text('{"enum": ["river", "bird"]}')
    assert main(asked) == 0
    assert json.loads(capfd.readouterr().out) in ("river", "bird")
    for text, why in (("{", "is not valid JSON"), ('"x"', "JSON object"), ('{"type": 5}', "cannot be enforced")):
        file.write_text(text)
        assert main(asked) == 2
        assert why in capfd.readouterr().err


@pytest.mark.models
def test_real_members_write_valid_json(demo_pair):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "kind": {"enum": ["river", "lake"]}},
        "required": ["name", "kind"],
        "additionalProperties": False,
    }
    ended = 0
    for unit, seed in (("piece", 1), ("word", 3)):
        found = demo_pair.with_unit(unit).generate(
            "Name a river, as JSON.", seed=seed, json_schema=schema, max_tokens=40
        )
        if found.finish_reason == "stop":
            ended += 1
            jsonschema.validate(json.loads(found.text), schema)
    assert ended
