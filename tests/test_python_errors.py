"""Mistakes in calls from Python are mixlm's errors, in the words of Python."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import mixlm
from mixlm.errors import ConfigError, UnsupportedError, in_python_words

PAIR = mixlm.load("toy:1", "toy:2")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "the prompt is None"),
        (b"ab", "bytes, and no text (decode it"),
        (5, "the prompt is 5"),
        ({"role": "user", "content": "a"}, "a conversation is a list of messages"),
        (mixlm.Message("user", "a"), "a conversation is a list of messages"),
        ([None], "the prompt is None"),
        ([b"ab", "a"], "bytes, and no text"),
        ([["a"]], "'a' is no message"),
        ([], "the conversation has no messages"),
        ([mixlm.Message("user", None)], "is no message"),
        ([mixlm.Message("robot", "a")], "is no message"),
        ([{"role": "user", "content": b"a"}], "is no message"),
        ((text for text in ["a"]), "the prompt is <generator"),
    ],
    ids=lambda value: repr(value).partition(" at 0x")[0],
)
@pytest.mark.parametrize("call", ["generate", "stream"])
def test_what_is_no_prompt(call, prompt, message):
    if call == "stream" and prompt == [["a"]]:
        prompt = ["a"]
    elif call == "stream" and isinstance(prompt, list) and prompt and not isinstance(prompt[0], dict | mixlm.Message):
        message = "is no message"
    with pytest.raises(ConfigError, match=re.escape(message)):
        getattr(PAIR, call)(prompt, max_tokens=2)


@pytest.mark.parametrize("value", [None, b"ab", 5, ["a"]], ids=lambda value: repr(value).partition(" at 0x")[0])
def test_what_is_no_turn_of_a_chat(value):
    chat = PAIR.chat(max_tokens=2)
    with pytest.raises(ConfigError):
        chat.send(value)
    assert chat.messages == []


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"toy:1": 1, "toy:2": 2}, "it must be a list with one number per member"),
        ("1,2", "it must be a list with one number per member"),
        (0.5, "it must be a list with one number per member"),
        ([1, None], "each must be a number"),
        (["1", "2"], "each must be a number"),
        ([1, True], "each must be a number"),
        ([1, float("nan")], "a finite number, 0 or more"),
        ([1], "1 weight (1) for 2 members"),
    ],
    ids=lambda value: repr(value).partition(" at 0x")[0],
)
def test_what_are_no_weights(weights, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        mixlm.load("toy:1", "toy:2", weights=weights)
    with pytest.raises(ConfigError, match=re.escape(message)):
        PAIR.with_weights(weights)


@pytest.mark.parametrize(
    "weights",
    [(1, 3), np.array([1, 3]), [np.float32(1), np.int64(3)]],
    ids=lambda value: repr(value).partition(" at 0x")[0],
)
def test_weights_of_any_sequence_and_numbers(weights):
    assert mixlm.load("toy:1", "toy:2", weights=weights).weights.tolist() == [0.25, 0.75]


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([["toy:1", "toy:2"]], "mixlm.load('toy:1', 'toy:2')"),
        ([("toy:1",)], "mixlm.load('toy:1')"),
        ([None], "the model is None; it must be a name or a path"),
        ([b"toy:1"], "it must be a name or a path"),
        ([], "no model was named"),
    ],
    ids=lambda value: repr(value).partition(" at 0x")[0],
)
def test_what_are_no_models(models, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        mixlm.load(*models)


def test_a_function_routes_a_loaded_ensemble():
    def last(prompt: bytes, text: bytes) -> list[float]:
        return [0, 1]

    routed = mixlm.load("toy:1", "toy:2", router=last).generate("x", seed=1, max_tokens=6)
    assert {token.member for token in routed.tokens} == {"toy:2"}
    for wrong in (3, lambda prompt, text: [1, 1, 1]):
        with pytest.raises(ConfigError, match="router"):
            mixlm.load("toy:1", "toy:2", router=wrong).generate("x")


@pytest.mark.parametrize("kind", [np.int64, np.uint64, np.int8, np.uint8])
def test_seeds_of_numpy_are_those_of_python(kind):
    expected = PAIR.generate("ab", seed=7, sequence=3, max_tokens=9)
    completion = PAIR.generate("ab", seed=kind(7), sequence=kind(3), max_tokens=kind(9), temperature=np.float32(0.7))
    assert type(completion.seed) is int
    assert len(completion.tokens) == len(expected.tokens)
    completion = PAIR.generate("ab", seed=kind(7), sequence=kind(3), max_tokens=kind(9))
    assert (completion.text, completion.seed) == (expected.text, 7)


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        (2**64, "seed is 18446744073709551616; it must be less than 2**64: a number of 64 bits"),
        (10**30, "it must be less than 2**64"),
        (-1, "seed is -1; it must be a whole number, 0 or more"),
        (np.int64(-1), "it must be a whole number, 0 or more"),
        (1.5, "it must be a whole number, 0 or more"),
        (True, "it must be a whole number, 0 or more"),
        (None, "it must be a whole number, 0 or more"),
        ("7", "seed is '7'; it must be a whole number, 0 or more"),
    ],
    ids=lambda value: repr(value).partition(" at 0x")[0],
)
def test_seeds_that_are_none(seed, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        PAIR.generate("ab", seed=seed)
    assert PAIR.generate("ab", seed=2**64 - 1, max_tokens=1).seed == 2**64 - 1


@pytest.mark.parametrize(
    "options",
    [
        {"stop": 3},
        {"stop": [b"a"]},
        {"stop": b"a"},
        {"stop": ["a", None]},
        {"system": 3},
        {"draft": 3, "method": "speculative"},
        {"logit_bias": [1]},
        {"logit_bias": None},
        {"json_schema": "x"},
        {"temperature": "warm"},
        {"top_k": None},
        {"method": None},
    ],
    ids=str,
)
def test_options_of_other_types(options):
    with pytest.raises(ConfigError, match=f"^{next(iter(options))} is "):
        PAIR.generate("ab", **options)


def test_hints_have_the_words_of_python():
    with pytest.raises(UnsupportedError) as raised:
        PAIR.generate("ab", temperature=0)
    assert str(raised.value).endswith("(use method='greedy')")
    assert raised.value.hint == "use --method greedy"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("use --method mixture, or --unit piece with greedy", "use method='mixture', or unit='piece' with greedy"),
        ("give --top-k 10, as published", "give top_k=10, as published"),
        ("or --engine hf (engine='hf')", "or engine='hf'"),
        ("see mixlm fit --router", "see mixlm fit --router"),
    ],
)
def test_options_of_the_command_line_become_keywords(text, expected):
    assert in_python_words(text) == expected


def test_no_error_in_the_sources_names_an_option_that_stays_as_it_is():
    """A hint with an option that `in_python_words` does not know would reach users of Python as it is."""
    source = Path(mixlm.__file__).parent
    rooms = ["core", "decoding", "generation", "routing", "units", "engines/base.py", "engines/transformers"]
    files = [
        file for room in rooms for file in ([source / room] if room.endswith(".py") else (source / room).glob("*.py"))
    ]
    assert len(files) > 40
    for file in [*files, source / "binding.py", source / "ensemble.py", source / "loading.py"]:
        for string in re.findall(r'"([^"\n]*--[a-z][^"\n]*)"', file.read_text()):
            names_a_command = re.search("mixlm (fit|score)", string) is not None
            assert "--" not in in_python_words(string) or names_a_command, (file.name, string)
