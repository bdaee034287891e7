"""Calls under the grammar: the masks against a description of the language, and what completions hold."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
import regex
from speaking import speaking
from toys import engine, make_ensemble

from mixlm.core.grammar import GrammarCache, Language
from mixlm.core.options import GenerationOptions
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, UnsupportedError
from mixlm.loading import load
from mixlm.types import Tool, ToolCall
from mixlm.verification.exact import ExactReference

COLOR = {"type": "object", "properties": {"c": {"enum": ["r", "g"]}}, "required": ["c"]}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": COLOR}}, {"name": "stop"}]
SCHEMAS = {"f": {**COLOR, "additionalProperties": False}, "stop": {"type": "object", "maxProperties": 0}}
SPACE = r"(?: |\n {0,32})?"
ARGUMENTS = {"f": r"\{_\"c\"_:_\"(?:r|g)\"_\}", "stop": r"\{_\}"}


def calls_pattern(language: Language) -> str:
    """A regular expression of the calls of a language."""
    forms = [rf"\"{name}\", \"arguments\": {ARGUMENTS[name]}" for name in language.tools]
    call = rf"<tool_call>\n\{{\"name\": (?:{'|'.join(forms)})\}}\n</tool_call>".replace('_"', SPACE + '"')
    call = re.sub(r"(?<=[{:\"])_(?=[\"\\:])", lambda _: SPACE, call)
    return rf"{call}(?:\n{call}){{0,{language.max_calls - 1}}}"


# Tokens that cross every border of the language.
PIECES = [
    b"a", b" ", b"\n", b"<", b"<tool", b"_call>", b"<tool_call>", b"l>\n{", b'{"name": "', b"f", b'f", "argu',
    b'ments": {', b'stop", "arguments": ', b'"c"', b':', b'"r', b'"', b"}", b"}\n</tool_call>", b"</",
    b">\n<tool_call>",
    b">",
]  # fmt: skip

# Tokens for everything that a prompt with tools may hold.
ALL_PIECES = [*PIECES, *(bytes([i]) for i in (10, *range(32, 127)) if bytes([i]) not in PIECES)]
ALL_PIECES += [bytes([i]) for i in range(128, 256)]


def is_complete(text: str, language: Language) -> bool:
    before, mark, after = text.partition("<tool_call>")
    if not mark:
        return language.json_schema is None
    allowed = language.json_schema is None or before == ""
    return allowed and regex.fullmatch(calls_pattern(language), mark + after) is not None


def is_prefix(text: str, language: Language) -> bool:
    _, mark, after = text.partition("<tool_call>")
    if language.json_schema is None:
        return not mark or regex.fullmatch(calls_pattern(language), mark + after, partial=True) is not None
    return regex.fullmatch(calls_pattern(language), text, partial=True) is not None


@pytest.mark.parametrize(
    "language",
    [Language(None, SCHEMAS, 2), Language(False, SCHEMAS, 2), Language(False, {"f": SCHEMAS["f"]}, 1)],
    ids=["auto", "required", "named"],
)
def test_masks_are_those_of_the_language(language):
    vocabulary = engine(PIECES, seed=1).vocabulary
    rng = np.random.default_rng(5)
    matcher = GrammarCache([vocabulary]).for_language(language)[0].matcher()
    seen: set[str] = set()
    one = '<tool_call>\n{"name": "f", "arguments": {"c":"r"}}\n</tool_call>'
    for start in ["", "a<tool", "<tool_call>", one, one + "\n" + one.removesuffix(">")] * 12:
        text = start
        while len(text) < 250 and (allowed := matcher.allowed(text.encode())) is not None:
            follow = []
            for i, data in enumerate(vocabulary.tokens):
                if i in vocabulary.end_ids:
                    assert allowed[i] == is_complete(text, language), text
                elif data:
                    assert allowed[i] == is_prefix(text + data.decode(), language), (text, data)
                    follow += [data.decode()] * int(allowed[i])
            seen.add(text)
            if not follow:
                break
            text += rng.choice([data for data in follow if "<" in data or "{" in data or '"' in data] or follow)
        assert is_prefix(text, language) or text == start
    assert len(seen) > 25
    assert any(text.count("</tool_call>") == language.max_calls for text in seen)


@pytest.fixture(scope="module")
def toys() -> Ensemble:
    return load("toy:1", "toy:2")


@pytest.mark.parametrize("unit", ["token", "word", "byte"])
@pytest.mark.parametrize("choice", ["auto", "required", "f"])
def test_calls_parse_and_fit_their_schema_in_every_unit(toys, unit, choice):
    ensemble = toys.with_unit(unit)
    methods = ["mixture", "single"] + (["greedy", "conventional", "speculative"] if unit == "token" else [])
    names = set()
    for i, method in enumerate(methods * 2):
        completion = ensemble.generate(
            "hello", tools=TOOLS, tool_choice=choice, method=method, seed=i, max_tokens=2000, temperature=1.0
        )
        assert completion.finish_reason == "stop"
        assert bool(completion.tool_calls) == (choice != "auto")
        for call in completion.tool_calls:
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
            names.add(call.name)
    assert names <= {"f"} if choice == "f" else names <= {"f", "stop"}


def test_speculative_and_mixture_write_the_same_calls(toys):
    options: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "seed": 7, "max_tokens": 300}
    texts = {toys.generate("hello", method=method, **options).text for method in ("mixture", "speculative")}
    assert len(texts) == 1


@pytest.mark.slow
def test_one_call_at_most_where_it_is_asked_for():
    wide = make_ensemble([speaking("gpt2", 0), speaking("gemma", 1)], unit="piece")
    counts = {True: 0, False: 0}
    for parallel in counts:
        for seed in range(8):
            completion = wide.generate(
                "the", tools=TOOLS[1:], tool_choice="required", parallel_tool_calls=parallel, seed=seed,
                max_tokens=200, temperature=1.0, top_k=0,
            )  # fmt: skip
            counts[parallel] += len(completion.tool_calls)
    assert counts[False] == 8 < counts[True]


@pytest.mark.slow
def test_text_may_come_first_and_ends_no_call():
    """A member that likes calls: text, a call and the end of text all have their probability under `auto`."""
    likes = {b"a": 2.0, b"<tool_call>": 3.0}
    toy = engine(ALL_PIECES, seed=3)
    plain = toy.table

    def table(context: tuple[int, ...]) -> np.ndarray:
        logits = plain(context).copy()
        for data, bonus in likes.items():
            logits[ALL_PIECES.index(data)] += bonus
        return logits

    toy.table = table
    ensemble = make_ensemble([toy, engine(ALL_PIECES, seed=4)], unit="token")
    texts = [
        ensemble.generate([{"role": "user", "content": "a"}], tools=TOOLS, seed=seed, max_tokens=400, temperature=1.0)
        for seed in range(40)
    ]
    ended = [completion for completion in texts if completion.finish_reason == "stop"]
    with_calls = [completion for completion in ended if completion.tool_calls]
    assert 0 < len(with_calls) < len(ended)
    assert any(not completion.text.startswith("<tool_call>") for completion in with_calls)
    for completion in with_calls:
        for call in completion.tool_calls:
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])


@pytest.mark.slow
def test_the_distribution_is_the_exact_one():
    """Mixture's first symbols against the enumeration of `ExactReference`, which has masks of its own call."""
    engines = [engine(ALL_PIECES, seed=10 + i) for i in range(2)]
    ensemble = make_ensemble(engines, [0.6, 0.4], unit="token")
    settings = ensemble.settings(tools=TOOLS, tool_choice="auto", temperature=1.0, top_k=5, seed=1)
    prompt = ensemble.encode_prompt([{"role": "user", "content": "a"}], settings)
    reference = ExactReference(ensemble, settings, prompt)
    counts = np.zeros(len(reference.first))
    for seed in range(600):
        generation = ensemble.context(settings.with_sequence_offset(seed)).start(prompt)
        token = next(generation)
        counts[ALL_PIECES.index(token.data)] += 1
    ends = reference.first[-1]
    assert 0.5 * np.abs(counts / 600 - reference.first)[:-1].sum() < 0.08 + ends


def test_stop_strings_are_for_text_and_not_for_arguments():
    parameters = {"type": "object", "properties": {"x": {"const": "a stop b"}}, "required": ["x"]}
    tool = {"name": "say", "parameters": parameters}
    ensemble = load("toy:1")
    completion = ensemble.generate("hello", tools=[tool], tool_choice="required", stop="stop", seed=1, max_tokens=400)
    assert json.loads(completion.tool_calls[0].arguments) == {"x": "a stop b"}


@pytest.mark.slow
def test_min_tokens_hold_back_the_end_and_stop_strings(toys):
    for unit in ("token", "word", "byte"):
        ensemble = toys.with_unit(unit)
        options = {"min_tokens": 40, "max_tokens": 200}
        lengths = [len(ensemble.generate("hello", seed=seed, **options).tokens) for seed in range(6)]
        assert min(lengths) >= 40
        assert min(lengths) < 200
    plain = toys.generate("hello", seed=1, min_tokens=30, max_tokens=60, method="speculative")
    assert plain.text == toys.generate("hello", seed=1, min_tokens=30, max_tokens=60).text
    stopped = toys.generate("hello", seed=1, min_tokens=30, max_tokens=60, stop=" ")
    assert len(stopped.tokens) >= 30


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"tools": [{"name": "a b"}]}, "function name 'a b'"),
        ({"tools": [{"name": "f"}, {"name": "f"}]}, "two functions named f"),
        ({"tools": "f"}, "list of functions"),
        ({"tools": [{"type": "code"}]}, "must be a mixlm.Tool"),
        ({"tools": [{"name": "f", "parameters": {"type": "string"}}]}, "tools has the type 'string'"),
        ({"tools": [{"name": "f", "parameters": {"not": {}}}]}, "tools cannot be enforced"),
        ({"tools": [{"name": "f", "parameters": {"x-guidance": {}}}]}, "tools has the key x-guidance"),
        ({"tools": TOOLS, "tool_choice": "g"}, "must be one of auto, none, required, f, stop"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": TOOLS, "raw": True}, "the prompt is raw"),
        ({"tools": TOOLS, "min_tokens": 3}, "min_tokens goes on"),
        ({"tools": TOOLS, "ignore_end": True}, "ignore_end goes on"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "no member's chat template takes it"),
    ],
)
def test_what_cannot_be_done_is_refused(toys, options, why):
    with pytest.raises((ConfigError, UnsupportedError), match=re.escape(why)):
        toys.generate("hello", **options)


def test_a_choice_of_none_takes_the_tools_away():
    options = GenerationOptions(tools=(Tool("f"),), tool_choice="none")
    assert options.language is None
    assert options.callable_tools == ()
    with_schema = GenerationOptions(tools=(Tool("f"),), json_schema={"type": "object"})
    assert with_schema.language == Language({"type": "object"}, {"f": {}}, 16)


def test_text_may_be_held_to_a_schema_beside_calls(toys):
    for seed in range(4):
        completion = toys.generate(
            "hello", tools=TOOLS, json_schema={"enum": [1, 2]}, seed=seed, max_tokens=400, temperature=1.0, top_k=0
        )
        assert completion.tool_calls or json.loads(completion.text) in (1, 2)


def test_messages_with_calls_are_taken_as_dicts_and_as_records(toys):
    as_dicts = [
        {"role": "user", "content": "hello"},
        {
            "role": "assistant", "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "r", "tool_call_id": "1"},
    ]  # fmt: skip
    from mixlm.types import Message

    as_records = [
        Message("user", "hello"), Message("assistant", "", (ToolCall("f", "{}", "1"),)), Message("tool", "r", (), "1"),
    ]  # fmt: skip
    texts = {toys.generate(messages, seed=1, max_tokens=9).text for messages in (as_dicts, as_records)}
    assert len(texts) == 1


@pytest.mark.models
def test_real_members_write_calls(demo_pair):
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["C", "F"]}},
        "required": ["city", "unit"],
    }
    tool = {"name": "get_weather", "description": "The weather of a city.", "parameters": parameters}
    completion = demo_pair.generate(
        "What is the weather in Oslo?", tools=[tool], tool_choice="required", parallel_tool_calls=False, seed=1,
        max_tokens=150,
    )  # fmt: skip
    assert completion.finish_reason == "stop"
    [call] = completion.tool_calls
    assert call.name == "get_weather"
    jsonschema.validate(json.loads(call.arguments), parameters)
