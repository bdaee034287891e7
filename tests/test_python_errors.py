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


def test_messages_are_taken_in_every_form_of_the_api_of_openai():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    empty = {"refusal": None, "audio": None, "tool_calls": None, "annotations": []}
    messages = [
        {"role": "developer", "content": "c"},
        {"role": "user", "content": parts, "name": "bob"},
        {"role": "assistant", "content": "d", **empty},
        {"role": "user", "content": "e"},
    ]
    plain = [mixlm.Message(*turn) for turn in (("system", "c"), ("user", "ab"), ("assistant", "d"), ("user", "e"))]
    assert PAIR.generate(messages, seed=1, max_tokens=4).text == PAIR.generate(plain, seed=1, max_tokens=4).text


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"content": [{"type": "image_url", "image_url": "x"}]}, "no text"),
        ({"content": []}, "no text"),
        ({"content": "a", "text": "b"}, "the key 'text'"),
        ({"content": "a", "audio": np.zeros(2)}, "the key 'audio'"),
        ({"content": "a" * 1000, "role": "bot"}, "no role of these"),
    ],
)
def test_what_is_wrong_with_a_message_is_said(fields, wrong):
    with pytest.raises(ConfigError, match=f"is no message: it has {wrong}") as raised:
        PAIR.generate([{"role": "user", **fields}])
    assert len(str(raised.value)) < 250


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
        ({1, 2}, "it must be a list with one number per member"),
        (iter([1, 2]), "it must be a list with one number per member"),
        (np.array(1.0), "it must be a list with one number per member"),
        (int, "it must be a list with one number per member"),
        ([1, None], "each must be a number"),
        (["1", "2"], "each must be a number"),
        ([1, True], "each must be a number"),
        ([1, float("nan")], "a finite number, 0 or more"),
        ([1], "1 weight (1) for 2 members"),
        ([10**400, 1], "inf, 1; each must be a finite number"),
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


@pytest.mark.filterwarnings("error")
def test_weights_whose_sum_is_beyond_a_float():
    assert mixlm.load("toy:1", "toy:2", weights=[1e308, 1e308]).weights.tolist() == [0.5, 0.5]
    routed = mixlm.load("toy:1", "toy:2", router=lambda prompt, text: [1e308, 1e308])
    assert routed.generate("x", seed=1, max_tokens=4).text == PAIR.generate("x", seed=1, max_tokens=4).text


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"dtype": "float8"}, "dtype is 'float8': input should be 'auto'"),
        ({"prefix_cache": "1"}, "prefix_cache is '1': input should be a valid integer"),
        ({"trust_remote_code": "yes"}, "trust_remote_code is 'yes': input should be a valid boolean"),
        ({"top_k": 2.5}, "top_k is 2.5: input should be a valid integer"),
        ({"temperatur": 1}, "unknown option 'temperatur' (did you mean 'temperature'?)"),
        ({"max_tokens": 4}, "it is an option of each generation: ensemble.generate(…, max_tokens=…)"),
        ({"adapter": "x"}, "it is a key of a member: write it into an ensemble file"),
        ({"models": ["toy:1"]}, "models are named first: mixlm.load('MODEL', 'MODEL')"),
        ({"strength": 2}, "strength is given without a rule, and the average has none"),
        ({"strength": 2, "rule": lambda probs, weights: probs[0]}, "strength is given beside a rule that is no name"),
        ({"rule": "geometric", "strength": "2"}, "strength is '2': input should be a valid number"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_are_no_keywords_of_load(keywords, message):
    with pytest.raises(ConfigError) as raised:
        mixlm.load("toy:1", "toy:2", **keywords)
    assert message in str(raised.value)
    assert "members" not in str(raised.value)
    assert "sampling." not in str(raised.value)


def test_numbers_of_numpy_are_those_of_python_everywhere():
    ensemble = mixlm.load("toy:1", "toy:2", top_k=np.int64(5), temperature=np.float32(0.5))
    assert ensemble.members[0].sampling == {"top_k": 5, "temperature": 0.5}
    options = {"logit_bias": {np.int64(3): np.float32(2)}, "raw": np.bool_(True), "seed": 1, "max_tokens": 5}
    plain = {"logit_bias": {3: 2.0}, "raw": True, "seed": 1, "max_tokens": 5}
    assert PAIR.generate("ab", **options).tokens == PAIR.generate("ab", **plain).tokens
    assert [number for number, _ in PAIR.generations(["a"], at_once=np.int8(2), max_tokens=1)] == [0]


@pytest.mark.parametrize("at_once", ["4", None, 2.5, True, 0])
def test_what_is_no_number_of_generations(at_once):
    with pytest.raises(ConfigError, match=r"at_once is .*; it must be a whole number, 1 or more"):
        list(PAIR.generations(["a"], at_once=at_once, max_tokens=1))


@pytest.mark.parametrize("prompts", ["abc", None, 5, {"a": 1}, b"ab"])
def test_what_is_no_list_of_prompts(prompts):
    with pytest.raises(ConfigError, match="it must be a list of prompts"):
        PAIR.generations(prompts)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PAIR.with_unit(None), "unit is None; it must be one of auto, token"),
        (lambda: PAIR.with_unit(3), "unit is 3; it must be one of"),
        (lambda: PAIR.with_logits_processors(None), "processors is None; it must be a dict"),
        (lambda: PAIR.chat(seeed=1), "unknown option 'seeed'"),
    ],
)
def test_arguments_of_other_types(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


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
        {"raw": "no"},
        {"ignore_end": 1},
        {"temperature": 10**400},
        {"temperature": 1e-320},
        {"repetition_penalty": 1e308},
        {"seed": 10**5000},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_other_types(options):
    with pytest.raises(ConfigError, match=f"^{next(iter(options))} is "):
        PAIR.generate("ab", **options)


@pytest.mark.parametrize(("name", "value"), [("weights", [1, 2]), ("unit", "byte"), ("router", len)])
def test_what_belongs_to_the_ensemble_is_no_option_of_a_generation(name, value):
    with pytest.raises(ConfigError, match=re.escape(f"unknown option {name!r} (it belongs to the ensemble: ensemble.")):
        PAIR.generate("ab", **{name: value})
    assert hasattr(PAIR, f"with_{name}")


@pytest.mark.parametrize("name", ["engine", "dtype", "device"])
def test_what_is_chosen_in_loading_is_no_option_of_a_generation(name):
    with pytest.raises(ConfigError, match=re.escape(f"(it belongs to loading: mixlm.load(…, {name}=…)")):
        PAIR.generate("ab", **{name: "x"})


@pytest.mark.parametrize("stop", ["", ["x", ""]])
def test_an_empty_stop_string_is_refused(stop):
    with pytest.raises(ConfigError, match=re.escape("stop has an empty text, which ends nothing (leave it out)")):
        PAIR.generate("ab", stop=stop)


@pytest.mark.parametrize("engine", ["hf", "llamacpp", "remote"])
def test_a_toy_runs_in_no_other_engine(engine):
    with pytest.raises(ConfigError, match=f"engine is '{engine}', and toy:1 is a toy"):
        mixlm.load("toy:1", engine=engine)


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
        ("use --rule mean-then-truncate", "use rule='mean-then-truncate'"),
        ("leave ends out: --no-ends", "leave ends out: ends=False"),
        ("use --alpha 0", "use alpha=0"),
        ("fit its strength, without --router", "fit its strength, without router"),
        ("train one with mixlm fit --rule defer --router", "train one with mixlm fit --rule defer --router"),
        ("use mixlm score with --unit piece", "use mixlm score with unit='piece'"),
        ("use --device-map auto", "use device_map='auto'"),
        ("give a folder: --data DIR", "give a folder: data=DIR"),
        ("for example 0.7,0.3; only", "for example [0.7, 0.3]; only"),
    ],
)
def test_options_of_the_command_line_become_keywords(text, expected):
    assert in_python_words(text) == expected


def test_no_error_in_the_sources_names_an_option_that_stays_as_it_is():
    """A hint with an option that `in_python_words` does not know would reach users of Python as it is."""
    source = Path(mixlm.__file__).parent
    rooms = ["core", "decoding", "generation", "routing", "units", "engines/base.py", "engines/transformers"]
    rooms += ["evaluation", "fitting", "scoring"]
    files = [
        file for room in rooms for file in ([source / room] if room.endswith(".py") else (source / room).glob("*.py"))
    ]
    assert len(files) > 40
    for file in [*files, source / "binding.py", source / "ensemble.py", source / "loading.py"]:
        for string in re.findall(r'"([^"\n]*--[a-z][^"\n]*)"', file.read_text()):
            names_a_command = re.search("mixlm (fit|score|eval)|`--json`", string) is not None
            assert "--" not in in_python_words(string) or names_a_command, (file.name, string)
