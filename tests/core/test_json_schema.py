"""Completions under a JSON schema: the distribution by enumeration, validity by another library; units, methods."""

from __future__ import annotations

import json
import sys
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
    assert_same_distribution,
    assert_sampled_from,
    counted,
    driven,
    engine,
    make_ensemble,
    named,
    written,
)

from mixlm.core import grammar_compiler
from mixlm.core import limited_objects as limited_objects_module
from mixlm.core.grammar import GrammarCache, Language
from mixlm.core.limited_objects import limited_objects
from mixlm.core.sampling import dense_distribution
from mixlm.decoding.conventional import conventional
from mixlm.decoding.mixture import mixture
from mixlm.engines.toy import ToyEngine
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.generation.target import average_target
from mixlm.types import Sampling
from mixlm.verification.exact import ExactReference

# A language small enough to write down: texts of JSON, without any place for whitespace.
CHOICES = ["a", "ab", "b a", 1, 12, 121, None]
SCHEMA = {"enum": CHOICES}
LANGUAGE = frozenset(json.dumps(choice).encode() for choice in CHOICES)
FIRST = (b'"', b"a", b"b", b'"a', b" ", b"1", b"2", b"12", b"null", b'b"', b'a"', b"n", b"u", b"l", b'""')
SECOND = (b"21", b"b", b'"', b" ", b"nu", b"l", b"ll", b'"ab', b"1", b"a", b'b a"', b"2", b"u", b"n", b"a", b" a")
OPTIONS = {"temperature": 0.9, "top_k": 4}
BOTH_UNITS = pytest.mark.parametrize("unit", ["token", "piece"])


def pair(unit: str, **more: Any) -> Ensemble:
    vocabularies = (FIRST, FIRST) if unit == "token" else (FIRST, SECOND)
    engines = [engine(tokens, seed=40 + i) for i, tokens in enumerate(vocabularies)]
    return make_ensemble(engines, [0.6, 0.4], unit=unit, **more)


def constrained_distribution(toy: ToyEngine, sampling: Sampling, text: bytes, ids) -> dict[bytes, float]:
    """A member's distribution over next symbols that keep the text a prefix of the language, from all of it."""
    vocabulary = toy.vocabulary

    def fits(i: int) -> bool:
        if i in vocabulary.end_ids:
            return text in LANGUAGE
        data = vocabulary.tokens[i]
        return bool(data) and any(whole.startswith(text + data) for whole in LANGUAGE)

    banned = np.array([i for i in range(vocabulary.size) if not fits(i)], dtype=np.int64)
    logits = toy.table((*toy.prompts.raw("a").tolist(), *ids)).astype(np.float32)
    if len(banned) == vocabulary.size:
        return {}
    distribution: dict[bytes, float] = defaultdict(float)
    for i, probability in enumerate(dense_distribution(logits, sampling, banned)):
        if probability > 0:
            distribution[END if i in vocabulary.end_ids else vocabulary.tokens[i]] += float(probability)
    return dict(distribution)


def distributions(ensemble: Ensemble, pieces: tuple[bytes, ...]) -> list[dict[bytes, float]]:
    text = b"".join(pieces)
    out = []
    for member in ensemble.members:
        toy = member.engine
        shared = ensemble.unit.name == "token"
        ids = [toy.vocabulary.tokens.index(data) for data in pieces] if shared else toy.encoder.encode(text).ids
        out.append(constrained_distribution(toy, Sampling(**OPTIONS), text, ids))
    return out


def average(ensemble: Ensemble, pieces: tuple[bytes, ...]) -> dict[bytes, float]:
    """The ensemble's distribution: a member that has no token to go on with leaves its weight to the others."""
    average: dict[bytes, float] = defaultdict(float)
    each = zip(ensemble.weights, distributions(ensemble, pieces), strict=True)
    parts = [(weight, distribution) for weight, distribution in each if distribution]
    total = sum(weight for weight, _ in parts)
    for weight, distribution in parts:
        for data, probability in distribution.items():
            average[data] += weight / total * probability
    return dict(average)


def whole_texts(ensemble: Ensemble) -> dict[bytes, float]:
    """The probability of every text, a sum over all ways to write it."""
    out: dict[bytes, float] = defaultdict(float)

    def go_on(pieces: tuple[bytes, ...], mass: float) -> None:
        for data, probability in average(ensemble, pieces).items():
            if data == END:
                out[b"".join(pieces)] += mass * probability
            else:
                go_on((*pieces, data), mass * probability)

    go_on((), 1.0)
    return dict(out)


def reachable(ensemble: Ensemble) -> list[tuple[bytes, ...]]:
    texts, waiting = [], [()]
    while waiting:
        pieces = waiting.pop()
        texts.append(pieces)
        waiting += [(*pieces, data) for data in average(ensemble, pieces) if data != END]
    return texts


@BOTH_UNITS
def test_the_distribution_at_every_place_is_the_one_by_enumeration(unit):
    ensemble = pair(unit)
    places = reachable(ensemble)
    assert len(places) > 15
    for pieces in places:
        options = {**OPTIONS, "json_schema": SCHEMA}
        noise = Recorder()
        driven(conventional(average_target()), written(ensemble, options, "a", pieces), ensemble.weights, noise)
        result = named(ensemble, noise.symbols, np.exp(noise.logprobs))
        assert_same_distribution(result, average(ensemble, pieces) if all(distributions(ensemble, pieces)) else result)
        for coin, distribution in enumerate(distributions(ensemble, pieces)):
            if distribution:
                noise = Recorder(coin)
                driven(mixture, written(ensemble, options, "a", pieces), ensemble.weights, noise)
                assert_same_distribution(named(ensemble, noise.symbols, np.exp(noise.logprobs)), distribution)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "unit"),
    [("mixture", "piece"), ("conventional", "token"), ("speculative", "token"), ("speculative", "piece")],
)
def test_whole_texts_follow_the_distribution(unit, method):
    ensemble = pair(unit)
    distribution = whole_texts(ensemble)
    assert set(distribution) <= LANGUAGE
    assert sum(distribution.values()) == pytest.approx(1)

    def write(sequence: int) -> bytes:
        done = ensemble.generate(
            "a", raw=True, seed=9, sequence=sequence, method=method, json_schema=SCHEMA, max_tokens=40, **OPTIONS
        )
        assert done.finish_reason == "stop"
        return done.text.encode()

    assert_sampled_from(counted(write, 400), distribution)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["word", "byte"])
@pytest.mark.parametrize("tokens", [FIRST, SECOND])
def test_one_member_has_one_distribution_in_every_unit(unit, tokens):
    """Words and bytes of one member are what it writes in pieces."""
    alone = make_ensemble([engine(tokens, seed=40)], unit="piece")
    distribution = whole_texts(alone)
    other = Ensemble(alone.members, unit=unit)

    def write(sequence: int) -> bytes:
        return other.generate(
            "a", raw=True, seed=3, sequence=sequence, json_schema=SCHEMA, max_tokens=60, **OPTIONS
        ).text.encode()

    assert_sampled_from(counted(write, 400), distribution)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["piece", "word", "byte"])
def test_several_members_follow_the_exact_distribution_of_their_unit(unit):
    """Against the reference, which sums over every way to write a text, dense and uncached."""
    ensemble = Ensemble(pair("piece").members, [0.6, 0.4], unit=unit)
    settings = ensemble.settings(raw=True, seed=0, json_schema=SCHEMA, **OPTIONS)
    exact = ExactReference(ensemble, settings, ensemble.encode_prompt("a", settings))
    distribution: dict[bytes, float] = defaultdict(float)

    def go_on(symbols: tuple[int, ...], mass: float) -> None:
        following = exact.distribution(symbols)
        for symbol in np.flatnonzero(following).tolist():
            if symbol == ensemble.unit.end:
                distribution[b"".join(map(ensemble.unit.symbol_bytes, symbols))] += mass * following[symbol]
            else:
                go_on((*symbols, symbol), mass * following[symbol])

    go_on((), 1.0)
    assert set(distribution) <= LANGUAGE
    assert sum(distribution.values()) == pytest.approx(1)
    if unit == "piece":
        assert_same_distribution(distribution, whole_texts(ensemble), 1e-9)

    def write(sequence: int) -> bytes:
        return ensemble.generate(
            "a", raw=True, seed=6, sequence=sequence, json_schema=SCHEMA, max_tokens=60, **OPTIONS
        ).text.encode()

    assert_sampled_from(counted(write, 400), distribution)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["token", "piece", "word", "byte"])
def test_several_members_stay_in_the_language_in_every_unit(unit):
    ensemble = Ensemble(pair("token" if unit == "token" else "piece").members, [0.6, 0.4], unit=unit)
    for seed in range(150):
        completion = ensemble.generate("a", raw=True, seed=seed, json_schema=SCHEMA, max_tokens=60, **OPTIONS)
        assert completion.finish_reason == "stop"
        assert completion.text.encode() in LANGUAGE


@BOTH_UNITS
def test_greedy_takes_the_likeliest_of_the_constrained_average(unit):
    ensemble = pair(unit)
    for draft in (None, "m1", "lookup"):
        completion = ensemble.generate(
            "a", raw=True, method="greedy", json_schema=SCHEMA, draft=draft, top_logprobs=3, **OPTIONS
        )  # fmt: skip
        pieces: tuple[bytes, ...] = ()
        for token in completion.tokens:
            distribution = average(ensemble, pieces)
            assert distribution[token.data] == pytest.approx(max(distribution.values()))
            assert np.exp(token.logprob) == pytest.approx(distribution[token.data])
            assert {top_logprob.data for top_logprob in token.top_logprobs} <= set(distribution)
            pieces = (*pieces, token.data)
        assert b"".join(pieces) in LANGUAGE


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["m0", "lookup"])
def test_speculative_writes_mixtures_text(draft):
    ensemble = pair("piece")
    for seed in range(40):
        options = {"raw": True, "seed": seed, "json_schema": SCHEMA, **OPTIONS}
        expected = ensemble.generate("a", **options)
        completion = ensemble.generate("a", method="speculative", draft=draft, block=3, **options)
        assert completion.tokens == expected.tokens


@pytest.mark.slow
def test_mixing_before_truncating_and_published_rules_stay_in_the_language():
    ensemble = pair("piece")
    for more in ({"mix_then_truncate": True}, {"rule": "gac"}, {"rule": "unite"}):
        for seed in range(40):
            completion = ensemble.generate(
                "a", raw=True, method="conventional", seed=seed, json_schema=SCHEMA, temperature=1.0, top_k=3, **more
            )
            assert completion.text.encode() in LANGUAGE


@pytest.mark.slow
def test_a_member_that_cannot_go_on_leaves_its_weight_to_the_others():
    """The first cannot write a 2: behind a 1 that has to be followed by one, the second does, whatever the coin."""
    without = tuple(token for token in FIRST if b"2" not in token)
    # It can read one: what it reads is encoded.
    first = engine(without, seed=1)
    first.encoder = engine(FIRST).encoder
    first.encoder._ids = {**first.encoder._ids, b"2": 0, b"12": 0}
    ensemble = make_ensemble([first, engine(FIRST, seed=2)], [0.9, 0.1], unit="piece")
    drafted = [("speculative", "m0"), ("speculative", "lookup"), ("greedy", "m0"), ("greedy", "lookup")]
    for method, draft in [("mixture", None), ("conventional", None), ("greedy", None), *drafted]:
        for seed in range(20):
            completion = ensemble.generate(
                "a", raw=True, seed=seed, method=method, draft=draft, json_schema={"const": 12}, **OPTIONS
            )
            assert completion.text == "12"
            assert completion.tokens[-1].member == "m1"
    with pytest.raises(UnsupportedError, match="no member has a token"):
        make_ensemble([first], unit="piece").generate("a", raw=True, json_schema={"const": 12})


def test_a_character_may_be_written_byte_by_byte():
    tokens = (b'"', b"\xc3", b"\xa9", b"\xc3\xa9", b"a", b"\xe2", b"\x82", b"\xac")
    ensemble = make_ensemble([engine(tokens, seed=1), engine(tokens[::-1], seed=2)], unit="piece")
    seen = set()
    for seed in range(30):
        completion = ensemble.generate("a", raw=True, seed=seed, json_schema={"enum": ["é", "€"]}, top_k=0)
        assert json.loads(completion.text) in ("é", "€")
        seen.add(tuple(token.data for token in completion.tokens))
    assert len(seen) > 2


def test_the_schema_says_where_a_completion_ends_and_not_the_stop_strings_of_a_template():
    ensemble = make_ensemble([ToyEngine(seed=1)])
    ensemble.members[0].engine.stops = ("a",)
    assert ensemble.generate("a", seed=1, json_schema={"const": "a"}).text == '"a"'
    assert ensemble.generate("a", seed=1, json_schema={"const": "a"}, stop="a").text == '"'


def test_the_ensembles_figures_are_those_of_the_constrained_distributions():
    ensemble = pair("piece")
    options = {"raw": True, "seed": 3, "json_schema": SCHEMA, "logprobs_of": "ensemble", "top_logprobs": 9}
    for seed in range(10):
        pieces: tuple[bytes, ...] = ()
        for token in ensemble.generate("a", **{**options, "seed": seed}, **OPTIONS).tokens:
            distribution = average(ensemble, pieces)
            reported = {top_logprob.data: np.exp(top_logprob.logprob) for top_logprob in token.top_logprobs}
            assert reported == pytest.approx(distribution)
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
        lambda values: {"enum": values},
        st.lists(st.text(max_size=4) | st.integers(-(2**53), 2**53), min_size=1, max_size=3),
    ),
    st.just({"type": "string", "pattern": "^[a-c]{1,3}-(x|yz)$"}),
    st.just({"type": "string", "format": "date"}),
)


def wider(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.sampled_from(["name", "ok", "Größe", "a b", 'q"', "日本"])

    @st.composite
    def objects(draw: Any) -> dict[str, Any]:
        properties = draw(st.dictionaries(names, inner, max_size=3))
        required = [name for name in properties if draw(st.booleans())]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    arrays = st.builds(
        lambda items, a, b: {"type": "array", "items": items, "minItems": a, "maxItems": a + b},
        inner, st.integers(0, 1), st.integers(0, 2),
    )  # fmt: skip
    return st.one_of(
        objects(), arrays, st.builds(lambda values: {"anyOf": values}, st.lists(inner, min_size=1, max_size=2))
    )


schemas = st.recursive(scalars, wider, max_leaves=6)


@pytest.mark.slow
@settings(max_examples=40)
@given(
    schema=schemas,
    seed=st.integers(0, 999),
    kinds=st.sampled_from([("gpt2", "gemma"), ("gpt4", "llama2"), ("tools", "digits")]),
)
def test_what_ended_is_valid(schema, seed, kinds):
    ensemble = make_ensemble([speaking(kind, i) for i, kind in enumerate(kinds)], unit="piece")
    if seed % 4 == 3:
        ensemble = ensemble.with_unit("byte" if seed % 8 == 3 else "word")
    completion = ensemble.generate(
        "the", raw=True, seed=seed, json_schema=schema, max_tokens=400, temperature=1.0, top_k=0
    )
    if completion.finish_reason == "stop":
        jsonschema.validate(json.loads(completion.text), schema)


@pytest.mark.slow
def test_most_completions_end():
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "n": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["name", "n"],
        "additionalProperties": False,
    }
    ensemble = make_ensemble([speaking("gpt2", 0), speaking("gemma", 1)], unit="piece")
    ended = 0
    for seed in range(20):
        completion = ensemble.generate("the", raw=True, seed=seed, json_schema=schema, max_tokens=120, top_k=0)
        ended += completion.finish_reason == "stop"
        if completion.finish_reason == "stop":
            jsonschema.validate(json.loads(completion.text), schema)
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
    toy = engine(FIRST)
    toy.top_k_limit = 4
    with pytest.raises(UnsupportedError, match="json_schema allows tokens from anywhere"):
        make_ensemble([toy]).generate("a", raw=True, top_k=2, json_schema=SCHEMA)


def test_without_the_library_it_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match=r"json_schema needs llguidance.*mixlm\[grammar\]"):
        pair("piece").generate("a", json_schema=SCHEMA)


def linked(count: int) -> dict[str, Any]:
    """Objects in each of which the next one is."""
    links = {f"a{i}": {"properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}} for i in range(count)}
    return {"$ref": "#/$defs/a0", "$defs": {**links, f"a{count}": {}}}


def test_a_schema_that_the_compiler_would_end_the_process_for_is_refused():
    ensemble = pair("piece")
    with pytest.raises(ConfigError, match="json_schema is nested too deeply to be compiled"):
        ensemble.generate("a", json_schema=linked(1500))
    with pytest.raises(ConfigError, match="tools is nested too deeply to be compiled"):
        ensemble.grammars.for_language(Language(None, {"f": {"type": "object", **linked(1500)}}))
    ensemble.grammars.for_language(Language(linked(100), {}))
    nested: dict[str, Any] = {}
    for _ in range(10_000):
        nested = {"items": nested}
    with pytest.raises(ConfigError, match="json_schema is nested too deeply to be compiled"):
        ensemble.generate("a", json_schema=nested)


@pytest.mark.parametrize(("executable", "reason"), [(None, "None does not run"), ("/bin/false", "does not start in")])
def test_without_a_python_to_check_a_deep_schema_in_it_is_refused(monkeypatch, executable, reason):
    monkeypatch.setattr("sys.executable", executable)
    with pytest.raises(ConfigError, match=f"json_schema cannot be checked: .*{reason}"):
        pair("piece").generate("a", json_schema=linked(1500))


def test_schemas_are_read_once_and_only_the_latest_are_kept():
    grammars = pair("piece").grammars
    first = grammars.for_language(Language(SCHEMA, {}))
    assert grammars.for_language(Language(dict(SCHEMA), {})) is first
    for i in range(20):
        grammars.for_language(Language({"const": i}, {}))
    assert grammars.for_language(Language(SCHEMA, {})) is not first
    assert pair("token").grammars.for_language(Language(SCHEMA, {}))[0] is not None


def test_the_command_line_takes_a_file(capfd, tmp_path):
    from mixlm.cli import main

    file = tmp_path / "schema.json"
    arguments = ["generate", "hello", "-m", "toy:1", "-m", "toy:2", "--seed", "3", "--json-schema", str(file)]
    file.write_text('{"enum": ["river", "bird"]}')
    assert main(arguments) == 0
    assert json.loads(capfd.readouterr().out) in ("river", "bird")
    for text, why in (("{", "is not valid JSON"), ('"x"', "JSON object"), ('{"type": 5}', "cannot be enforced")):
        file.write_text(text)
        assert main(arguments) == 2
        assert why in capfd.readouterr().err


@pytest.mark.models
def test_real_members_write_valid_json(demo_pair):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "kind": {"enum": ["river", "lake"]}},
        "required": ["name", "kind"],
        "additionalProperties": False,
    }
    completion = demo_pair.with_unit("word").generate(
        "Name a river, as JSON.", seed=3, json_schema=schema, max_tokens=40
    )
    assert completion.finish_reason == "stop"
    jsonschema.validate(json.loads(completion.text), schema)


def consumed(schema: dict[str, Any], text: str) -> bool:
    """Whether a text is JSON that the grammar of a schema takes as complete."""
    vocabulary = ToyEngine().vocabulary
    allowed = GrammarCache([vocabulary]).for_language(Language(schema, {}))[0].matcher().allowed(text.encode())
    return allowed is not None and bool(allowed[sorted(vocabulary.end_ids)].all())


def test_equal_keys_of_other_spelling_are_a_known_limit():
    open_schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    twice = '{"a":1,"\\u0061":"x"}'
    assert consumed(open_schema, twice)  # if this fails, docs/serving.md has a limit too many
    assert not consumed(open_schema, '{"a":1,"a":"x"}')
    assert not consumed({**open_schema, "additionalProperties": False}, twice)
    pattern = {"type": "object", "patternProperties": {"^a$": {"type": "integer"}}}
    assert consumed(pattern, '{"\\u0061":"x"}')
    assert not consumed({**pattern, "additionalProperties": False}, '{"\\u0061":"x"}')
    assert consumed({"type": "object", "minProperties": 2}, '{"a":1,"a":1}')
    assert not consumed({**open_schema, "patternProperties": {"^[a-z]$": {}}, "additionalProperties": False}, twice)


@pytest.mark.parametrize("pattern", ["^a$", "^(a|b)$", "^[ab]$"])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"type": "object", "properties": {"x": {"items": s}}}])
def test_patterns_that_leave_no_other_name_are_refused(pattern, wrap):
    integer = {"type": "integer"}
    names = {"a": integer, "b": integer}
    schema = {"type": "object", "properties": names, "patternProperties": {pattern: integer}}
    closed = wrap({**schema, "additionalProperties": False})
    with pytest.raises(ConfigError, match=r"no other name than those in properties \(a, b\)"):
        GrammarCache([ToyEngine().vocabulary]).for_language(Language(closed, {}))
    more = wrap({**schema, "patternProperties": {"^[abc]$": integer}, "additionalProperties": False})
    GrammarCache([ToyEngine().vocabulary]).for_language(Language(more, {}))


NAMED = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
CLOSED = {"patternProperties": {"^[ab]$": {"type": "integer"}}, "additionalProperties": False}
JOINED = {
    "allOf": {"allOf": [NAMED, CLOSED]},
    "nested allOf": {"allOf": [{"allOf": [NAMED]}, {"allOf": [{"allOf": [CLOSED]}]}]},
    "beside allOf": {**NAMED, "allOf": [CLOSED]},
    "$ref": {"$ref": "#/$defs/x~1y/part", "$defs": {"x/y": {"part": CLOSED}}, **NAMED},
    "$ref of $ref": {
        **NAMED,
        "$ref": "#/definitions/a",
        "definitions": {"a": {"$ref": "#/definitions/b"}, "b": CLOSED},
    },
    "$anchor": {"allOf": [{"$ref": "#other"}, NAMED], "$defs": {"x": {"$anchor": "other", **CLOSED}}},
    "anyOf": {**NAMED, "anyOf": [CLOSED, {"required": ["b"]}]},
    "oneOf": {
        "oneOf": [
            {**CLOSED, **NAMED, "required": ["a"]},
            {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]},
        ]
    },
    "the value of a property": {
        "allOf": [
            {"type": "object", "properties": {"x": NAMED}, "required": ["x"]},
            {"properties": {"x": {"$ref": "#/$defs/closed"}}},
        ],
        "$defs": {"closed": CLOSED},
    },
    "required": {**CLOSED, "type": "object", "required": ["a", "b"]},
    "items": {"type": "array", "items": {"allOf": [NAMED, CLOSED]}},
    "itself": {
        "type": "object",
        "properties": {"a": {"$ref": "#"}, "b": {}},
        "allOf": [{"patternProperties": {"^[ab]$": True}, "additionalProperties": False}],
    },
    "additional values of two types": {
        "allOf": [
            {**NAMED, "patternProperties": {"^a$": True}, "additionalProperties": {"type": "string"}},
            {
                "properties": {"a": {}, "b": {}},
                "patternProperties": {"^a$": {}},
                "additionalProperties": {"type": "null"},
            },
        ]
    },
}


@pytest.mark.parametrize("schema", JOINED.values(), ids=JOINED)
def test_patterns_that_leave_no_other_name_are_refused_where_schemas_are_joined(schema):
    with pytest.raises(ConfigError, match="no other name than those in properties"):
        GrammarCache([ToyEngine().vocabulary]).for_language(Language(schema, {}))


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [NAMED, {**CLOSED, "patternProperties": {"^[abc]$": {"type": "integer"}}}]},
        {"allOf": [NAMED, {"patternProperties": {"^[ab]$": {"type": "integer"}}}]},
        {"anyOf": [NAMED, {"type": "object", **CLOSED}]},
        {"type": "object", "properties": {"x": NAMED, "y": {"type": "object", **CLOSED}}, "required": ["x", "y"]},
        {**NAMED, "additionalProperties": False, "$defs": {"not used": {**NAMED, **CLOSED}}, "default": {**CLOSED}},
    ],
)
def test_patterns_that_leave_other_names_are_not(schema):
    GrammarCache([ToyEngine().vocabulary]).for_language(Language(schema, {}))


def test_the_alternatives_that_are_looked_through_for_patterns_are_bounded():
    options = [{"anyOf": [{"properties": {f"p{i}{k}": {}}} for k in range(8)]} for i in range(4)]
    with pytest.raises(ConfigError, match="patternProperties among too many alternatives"):
        list(limited_objects({"allOf": options}))
    nested: dict[str, Any] = {**NAMED, **CLOSED}
    for _ in range(60):  # each schema is looked at once, however often it is joined
        nested = {"allOf": [nested, nested]}
    assert len(list(limited_objects(nested))) == 1


@pytest.mark.slow
def test_a_chain_of_references_may_be_long():
    links = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(1200)}
    schema = {**NAMED, "$ref": "#/$defs/a0", "$defs": {**links, "a1200": CLOSED}}
    assert [limited.patterns for limited in limited_objects(schema)] == [["^[ab]$"]]
    links = {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}], "required": [f"c{i}"]} for i in range(400)}
    for count in (1, 500):  # growing parts of one choice, of many
        options = {"anyOf": [{"required": [f"b{i}"]} for i in range(count)]}
        with pytest.raises(ConfigError, match="patternProperties among too many alternatives"):
            list(limited_objects({**schema, "$defs": {**links, "a400": options}}))


def test_the_names_of_schemas_are_looked_up_in_one_walk(monkeypatch):
    walks, nodes = [], limited_objects_module._nodes
    monkeypatch.setattr(limited_objects_module, "_nodes", lambda schema: walks.append(1) or nodes(schema))
    parts = {f"x{i}": {"$anchor": f"x{i}", **NAMED} for i in range(20)}
    references = [{"$ref": f"#x{i}"} for i in range(20)] + [{"$ref": "other"}, {"$ref": "missing#x"}]
    schema = {"anyOf": references, "$defs": {**parts, "y": {"$id": "other", **CLOSED, **NAMED}}}
    assert len(list(limited_objects(schema))) == 1
    assert len(walks) <= 2


def test_a_further_schema_copies_no_vocabulary(monkeypatch):
    cache = GrammarCache([ToyEngine().vocabulary])
    cache.for_language(Language({"type": "integer"}, {}))
    monkeypatch.setattr(grammar_compiler, "_TokenizerWrapper", None)
    cache.for_language(Language(NAMED, {}))


@pytest.mark.slow
def test_schemas_that_are_nested_too_deeply_are_refused():
    cache, limit = GrammarCache([ToyEngine().vocabulary]), sys.getrecursionlimit()
    for depth in range(limit - 200, limit + 1, 25):
        schema: Any = {"type": "integer"}
        for _ in range(depth // 2):
            schema = {"allOf": [schema]}
        with pytest.raises(ConfigError, match=r"json_schema (is|cannot)"):
            cache.for_language(Language(schema, {}))


@pytest.mark.slow
def test_the_cache_is_bounded_by_the_size_of_schemas_too():
    cache = GrammarCache([ToyEngine().vocabulary])
    schemas = [{"type": "object", "properties": {f"p{i}_{k}": {"type": "null"} for k in range(1200)}} for i in range(4)]
    grammars = [cache.for_language(Language(schema, {}))[0] for schema in schemas]
    assert len(json.dumps(schemas[:3])) > 100_000 > len(json.dumps(schemas[:2]))
    assert cache.for_language(Language(schemas[3], {}))[0] is grammars[3]
    assert cache.for_language(Language(schemas[2], {}))[0] is grammars[2]
    assert cache.for_language(Language(schemas[0], {}))[0] is not grammars[0]
