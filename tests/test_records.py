from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields

import pytest

from mixlm.errors import ConfigError
from mixlm.types import Completion, MemberUsage, Sampling, Token, Usage


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("repetition_penalty", value) for value in (0, -1.0, float("inf"), float("nan"))),
        *((name, value) for name in ("presence_penalty", "frequency_penalty") for value in (101, -100.5, float("nan"))),
        *(("temperature", value) for value in (-0.1, float("inf"), float("nan"))),
        *(("top_k", value) for value in (-1, 1.5, True)),
        *(("top_p", value) for value in (0, 1.1, float("nan"))),
        *(("min_p", value) for value in (-0.1, 1.1, float("nan"))),
    ],
)
def test_a_value_out_of_range_is_named_with_the_range(option, value):
    with pytest.raises(ConfigError, match=f"^{option} is .*; it must be "):
        Sampling(**{option: value})


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"top_k": 0}, {"top_p": 1}, {"min_p": 1}, {"presence_penalty": -100}]
)
def test_the_ends_of_the_ranges_are_allowed(options):
    assert all(getattr(Sampling(**options), name) == value for name, value in options.items())


def test_only_penalties_look_at_the_tokens_written():
    assert not Sampling(temperature=0.2, top_k=3, top_p=0.5, min_p=0.1).has_penalties
    for name, value in (("repetition_penalty", 1.1), ("presence_penalty", 0.1), ("frequency_penalty", -0.1)):
        assert Sampling(**{name: value}).has_penalties


def test_the_fields_stand_in_the_order_in_which_they_are_applied():
    assert [field.name for field in fields(Sampling)] == [
        *("repetition_penalty", "presence_penalty", "frequency_penalty", "temperature", "top_k", "top_p", "min_p"),
    ]


def test_records_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        Token("a", b"a", "m", 0.0).text = "b"  # type: ignore[misc]


def test_speed_leaves_out_the_first_token():
    usage = Usage(tokens=11, bytes=44, seconds=3.0, seconds_to_first_token=1.0)
    assert usage.tokens_per_second == 5
    assert usage.bytes_per_second == 20


@pytest.mark.parametrize("tokens", [0, 1])
def test_speed_of_a_completion_too_short_to_tell_is_zero(tokens):
    usage = Usage(tokens, tokens, 0.0, 0.0)
    assert usage.tokens_per_second == usage.bytes_per_second == 0


def test_a_completion_as_a_dictionary_is_json():
    usage = Usage(1, 2, 0.5, 0.25, {"m": MemberUsage(3, 1, 1, 4, 0.1)})
    completion = Completion("é", (Token("é", "é".encode(), "m", -0.5),), "stop", 7, usage)
    record = json.loads(json.dumps(completion.as_dict()))
    assert record["text"] == "é"
    assert record["finish_reason"] == "stop"
    assert record["seed"] == 7
    assert record["tokens"] == [{"text": "é", "member": "m", "logprob": -0.5}]
    assert record["usage"]["members"]["m"]["forward_tokens"] == 4
    assert set(record["usage"]) == {
        *("tokens", "bytes", "seconds", "seconds_to_first_token", "tokens_per_second", "bytes_per_second", "members"),
        *("drafted", "checked", "accepted", "chosen"),
    }
