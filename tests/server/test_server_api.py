"""What the API answers, and what it refuses."""

from __future__ import annotations

import gzip
import json
import math
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from serving import HELLO, endless, events, running
from toys import fixed

import mixlm
from mixlm.binding import LoadedMember
from mixlm.engines.toy import ToyEngine
from mixlm.ensemble import Ensemble
from mixlm.errors import UnsupportedError
from mixlm.loading import load
from mixlm.server import request_schemas
from mixlm.server.api_errors import to_api_error
from mixlm.types import Message

PAIR = load("toy:1", "toy:2")
IMAGE = {"type": "image_url", "image_url": {}}
NO_REQUESTS = [b"", b"{", b"[1]", b"nul", b'"x"', b"\xff", b"[" * 100_000, b'{"messages": "\\ud800"}']


@pytest.mark.slow
def test_models_are_described(toys):
    [model] = toys.client.get("/v1/models").json()["data"]
    assert model["id"] == "toys"
    assert [member["name"] for member in model["mixlm"]["members"]] == ["toy:1", "toy:2"]
    assert toys.client.get("/v1/models/toys").json() == model
    assert toys.client.get("/v1/models/none").status_code == 404


def test_a_chat_completion_is_what_the_ensemble_generates(toys):
    body = toys.chat(seed=3, max_tokens=9, temperature=0.9, logprobs=True).json()
    expected = PAIR.generate(HELLO, seed=3, max_tokens=9, temperature=0.9)
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert choice["finish_reason"] == expected.finish_reason
    assert choice["mixlm"] == {"members": [token.member for token in expected.tokens], "seed": 3}
    logprobs = choice["logprobs"]["content"]
    assert [entry["token"] for entry in logprobs] == [spelled(token.data) for token in expected.tokens]
    assert [entry["logprob"] for entry in logprobs] == pytest.approx([token.logprob for token in expected.tokens])
    assert [bytes(entry["bytes"]) for entry in logprobs] == [token.data for token in expected.tokens]
    usage = body["usage"]
    assert usage["completion_tokens"] == len(expected.tokens)
    assert usage["prompt_tokens"] == max(member.prompt_tokens for member in expected.usage.members.values())
    for name, member in expected.usage.members.items():
        assert usage["mixlm"]["members"][name]["tokens"] == member.tokens
        assert usage["mixlm"]["members"][name]["forwards"] == member.forwards


def test_a_completion_continues_the_text_as_it_stands(toys):
    body = toys.complete("one river", seed=5, max_tokens=6, logprobs=0).json()
    expected = PAIR.generate("one river", seed=5, max_tokens=6, raw=True)
    [choice] = body["choices"]
    assert choice["text"] == expected.text
    assert choice["logprobs"]["tokens"] == [spelled(token.data) for token in expected.tokens]
    assert choice["logprobs"]["text_offset"][0] == 0
    assert body["object"] == "text_completion"


def test_several_prompts_and_several_completions_are_the_ones_of_a_batch(toys):
    body = toys.complete(["a", "b"], n=2, seed=7, max_tokens=4, echo=True).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    for index, prompt in enumerate(["a", "a", "b", "b"]):
        expected = PAIR.generate(prompt, seed=7, sequence=index, max_tokens=4, raw=True)
        assert body["choices"][index]["text"] == prompt + expected.text
    # A prompt with several completions is counted once.
    assert body["usage"]["prompt_tokens"] == 2 * expected.usage.members["toy:1"].prompt_tokens


def test_a_prompt_with_several_completions_is_read_once(monkeypatch):
    pair, encoded = load("toy:1", "toy:2"), []
    plain = type(pair).encode_prompt
    monkeypatch.setattr(
        type(pair),
        "encode_prompt",
        lambda self, prompt, settings: encoded.append(prompt) or plain(self, prompt, settings),
    )
    with running(pair) as server:
        assert len(server.complete(["a", "b", "a"], n=3, max_tokens=1).json()["choices"]) == 9
    assert encoded == ["a", "b", "a"]


def spelled(data):
    try:
        return data.decode() if data else "<|endoftext|>"
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@pytest.mark.parametrize("of", ["member", "ensemble"])
def test_top_logprobs(toys, of):
    fields = {"seed": 3, "max_tokens": 12, "mixlm": {"logprobs_of": of, "top_k": 0}}
    options = {"seed": 3, "max_tokens": 12, "top_k": 0, "top_logprobs": 4, "logprobs_of": of}
    expected = PAIR.generate(HELLO, **options)
    content = toys.chat(**fields, logprobs=True, top_logprobs=4).json()["choices"][0]["logprobs"]["content"]
    for entry, token in zip(content, expected.tokens, strict=True):
        assert entry["logprob"] == pytest.approx(token.logprob)
        assert [bytes(top["bytes"]) for top in entry["top_logprobs"]] == [top.data for top in token.top_logprobs]
        assert [top["token"] for top in entry["top_logprobs"]] == [spelled(top.data) for top in token.top_logprobs]
        values = [top.logprob for top in token.top_logprobs]
        assert [top["logprob"] for top in entry["top_logprobs"]] == pytest.approx(values)
    expected = PAIR.generate("one", raw=True, **options)
    logprobs = toys.complete("one", **fields, logprobs=4).json()["choices"][0]["logprobs"]
    assert logprobs["text_offset"] == [
        sum(len(token.text) for token in expected.tokens[:i]) for i in range(len(expected.tokens))
    ]
    for by_text, logprob, token in zip(
        logprobs["top_logprobs"], logprobs["token_logprobs"], expected.tokens, strict=True
    ):
        expected_top = {spelled(top.data): top.logprob for top in token.top_logprobs}
        assert by_text == pytest.approx({**expected_top, spelled(token.data): token.logprob})
        assert logprob == pytest.approx(token.logprob)


@pytest.mark.slow
def test_a_completion_conforms_to_a_schema(toys):
    schema = {"enum": ["river", "bird", "stone"]}
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}}
    for unit in ("token", "piece", "word", "byte"):
        options = {"seed": 4, "max_tokens": 40}
        whole = toys.chat(response_format=form, mixlm={"unit": unit}, **options).json()["choices"][0]
        expected = PAIR.with_unit(unit).generate(HELLO, json_schema=schema, **options)
        assert whole["message"]["content"] == expected.text
        assert json.loads(expected.text) in schema["enum"]
        assert whole["finish_reason"] == "stop"
    chunks = events(toys.chat(response_format=form, stream=True, **options))
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == PAIR.generate(HELLO, json_schema=schema, **options).text
    body = toys.complete("one", response_format={"type": "json_object"}, seed=7, max_tokens=200).json()["choices"][0]
    assert body["text"].startswith("{")
    if body["finish_reason"] == "stop":
        assert isinstance(json.loads(body["text"]), dict)


@pytest.mark.parametrize("max_tokens", [0, 1, 30])
def test_a_prompt_is_scored_before_its_completion(toys, max_tokens):
    prompts = ["one river", "two stones sing"]
    choices = toys.complete(prompts, n=2, seed=5, max_tokens=max_tokens, echo=True, logprobs=2).json()["choices"]
    for i, choice in enumerate(choices):
        prompt = prompts[i // 2]
        expected = PAIR.generate(
            prompt, raw=True, seed=5, sequence=i, max_tokens=max_tokens, top_logprobs=2, score_prompt=True
        )
        logprobs = choice["logprobs"]
        end = (expected.end,) if expected.end else ()
        tokens = [*expected.prompt, *expected.tokens, *end]
        assert choice["text"] == prompt + expected.text
        assert logprobs["tokens"] == [spelled(token.data) for token in tokens]
        assert logprobs["token_logprobs"] == pytest.approx([token.logprob for token in tokens])
        texts = [choice["text"][a:b] for a, b in pairwise([*logprobs["text_offset"], None])]
        assert texts == [token.text for token in tokens]
        assert all(len(top) in (2, 3) for top in logprobs["top_logprobs"])
        assert choice["mixlm"]["members"] == [token.member for token in expected.tokens]


def test_biases_are_by_text_or_by_id(toys):
    """The toys share a vocabulary, so ids are taken; 7 is " river"."""
    options = {"seed": 2, "max_tokens": 9}

    def text(**more):
        response = toys.chat(**options, **more)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["message"]["content"]

    expected = PAIR.generate(HELLO, logit_bias={" river": 4}, **options).text
    assert expected != PAIR.generate(HELLO, **options).text
    assert text(logit_bias={" river": 4}) == text(logit_bias={"7": 4.0}) == expected
    assert text(mixlm={"logit_bias": {" river": 4}}) == expected
    digit = PAIR.generate(HELLO, logit_bias={"7": 100}, **options).text
    assert text(mixlm={"logit_bias": {"7": 100}}) == digit
    assert "77" in digit
    pair = load("toy:1", "toy:2", unit="piece")
    with running(pair) as server:
        refused = server.chat(logit_bias={"7": 1})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "logit_bias")
        assert "give the token's text" in refused.json()["error"]["message"]
        refused = server.chat(logit_bias={" fjord": 1})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "logit_bias")
        assert "toy:1 has no token" in refused.json()["error"]["message"]


@pytest.mark.parametrize("path", ["chat", "text"])
def test_a_stream_has_the_top_logprobs_of_the_whole_response(toys, path):
    fields = {"seed": 3, "max_tokens": 12, "n": 2}
    fields |= {"logprobs": True, "top_logprobs": 3} if path == "chat" else {"logprobs": 3}
    post = toys.chat if path == "chat" else toys.complete
    whole = [choice["logprobs"] for choice in post(**fields).json()["choices"]]
    parts = [[], []]
    for chunk in events(post(**fields, stream=True)):
        [choice] = chunk["choices"]
        if choice["logprobs"] is not None:
            parts[choice["index"]].append(choice["logprobs"])
    for expected, streamed in zip(whole, parts, strict=True):
        for name in expected:
            if expected[name] is not None:
                assert [entry for part in streamed for entry in part[name]] == expected[name]


@pytest.mark.parametrize(
    ("path", "method"),
    [("chat", "mixture"), ("text", "mixture"), ("chat", "conventional"), ("chat", "speculative"), ("chat", "greedy")],
)
def test_a_stream_adds_up_to_the_whole_response(toys, path, method):
    post = toys.chat if path == "chat" else toys.complete
    options = {"seed": 11, "max_tokens": 12, "n": 2, "mixlm": {"method": method}}
    whole = post(**options).json()
    response = post(**options, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    texts, members, ends, forwards = ["", ""], [[], []], [None, None], Counter()
    *chunks, last = events(response)
    for chunk in chunks:
        assert chunk["usage"] is None
        [choice] = chunk["choices"]
        i = choice["index"]
        texts[i] += choice["delta"].get("content", "") if path == "chat" else choice["text"]
        members[i] += choice["mixlm"]["members"]
        forwards.update(choice["mixlm"].get("forwards", {}))
        assert len(choice["mixlm"]["members"]) <= 1  # each token in an event of its own
        ends[i] = choice["finish_reason"] or ends[i]
    for i, choice in enumerate(whole["choices"]):
        assert texts[i] == (choice["message"]["content"] if path == "chat" else choice["text"])
        assert members[i] == choice["mixlm"]["members"]
        assert ends[i] == choice["finish_reason"]
    assert last["choices"] == []
    assert forwards == {name: member["forwards"] for name, member in last["usage"]["mixlm"]["members"].items()}
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


def test_a_stop_string_ends_a_completion(toys):
    text = toys.chat(seed=1, max_tokens=20).json()["choices"][0]["message"]["content"]
    word = text.split()[2]
    choice = toys.chat(seed=1, max_tokens=20, stop=[word]).json()["choices"][0]
    assert choice["message"]["content"] == text[: text.index(word)]
    assert choice["finish_reason"] == "stop"


def test_temperature_zero_is_greedy(toys):
    text = toys.chat(temperature=0, max_tokens=8).json()["choices"][0]["message"]["content"]
    assert text == PAIR.generate(HELLO, method="greedy", max_tokens=8).text
    refused = toys.chat(temperature=0, mixlm={"method": "mixture"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "temperature"
    assert 'mixlm.method "greedy"' in refused.json()["error"]["message"]


def test_extras_reach_the_ensemble(toys):
    extras = {"top_k": 2, "min_p": 0.1, "method": "conventional", "repetition_penalty": 1.2, "unit": "token"}
    text = toys.chat(seed=2, max_tokens=8, mixlm=extras).json()["choices"][0]["message"]["content"]
    options = {name: value for name, value in extras.items() if name != "unit"}
    assert text == PAIR.generate(HELLO, seed=2, max_tokens=8, **options).text


def test_weights_are_those_of_the_request_only(toys):
    alone = toys.chat(seed=2, max_tokens=30, mixlm={"weights": [0, 3]}).json()["choices"][0]
    assert set(alone["mixlm"]["members"]) == {"toy:2"}
    assert alone["message"]["content"] == load("toy:1", "toy:2", weights=[0, 1]).generate(
        HELLO, seed=2, max_tokens=30
    ).text  # fmt: skip
    both = toys.chat(seed=2, max_tokens=30).json()["choices"][0]
    assert set(both["mixlm"]["members"]) == {"toy:1", "toy:2"}


def test_speculative_completions_are_those_of_mixture(toys):
    plain = toys.chat(seed=4, max_tokens=12).json()
    quick = toys.chat(seed=4, max_tokens=12, mixlm={"method": "speculative", "draft": "toy:1", "block": 3}).json()
    assert quick["choices"][0]["message"] == plain["choices"][0]["message"]
    assert quick["usage"]["mixlm"]["drafted"] > 0


def test_what_a_request_leaves_out_is_the_ensembles_own():
    pair = load("toy:1", "toy:2")
    pair.defaults = pair.settings(max_tokens=3, top_k=1, system="be brief", method="speculative", draft="toy:2")
    with running(pair) as server:
        body = server.chat().json()
        assert body["usage"]["completion_tokens"] <= 3
        expected = pair.generate(HELLO, method="single", max_tokens=3, draft=None).text
        single = server.chat(mixlm={"method": "single"}).json()["choices"][0]["message"]["content"]
        assert single == expected
        # A system message of the request stands in place of the ensemble's.
        messages = [{"role": "system", "content": "sing"}, *HELLO]
        tokens = server.chat(messages=messages).json()["usage"]["prompt_tokens"]
        assert tokens == len(load("toy:1").members[0].engine.prompts.chat(_messages(messages)))
        assert server.complete("x").status_code == 200


def _messages(messages):
    return [Message(message["role"], message["content"]) for message in messages]


def test_message_parts_and_returned_messages_are_text(toys):
    plain = [{"role": "system", "content": "ab"}, {"role": "assistant", "content": "x"}, *HELLO]
    forms = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None, "annotations": []},
        *HELLO,
    ]
    texts = [
        toys.chat(messages=messages, seed=1, max_tokens=9).json()["choices"][0]["message"]
        for messages in (plain, forms)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "fields",
    [
        {"metadata": {"a": "b"}},
        {"store": True},
        {"service_tier": "flex"},
        {"prompt_cache_key": "k", "prompt_cache_retention": "24h", "safety_identifier": "s", "user": "ada"},
        {"verbosity": "medium", "tool_choice": "auto"},
        {"max_tokens": 8.0, "seed": 3.0, "mixlm": {"top_k": 20.0, "weights": None}},
        {"max_completion_tokens": None, "stop": None, "response_format": None, "stream_options": None},
        {"ignore_eos": False},
        {"stop": ""},
        {"top_k": -1, "mixlm": {"top_k": 0}},
        {"stop": ["", ""]},
        {"messages": [{**HELLO[0], "name": "ada", "cache_control": {"type": "ephemeral"}, "reasoning_content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello", "cache_control": {}}]}]},
    ],
    ids=str,
)
def test_fields_that_cannot_change_the_text_are_ignored(toys, fields):
    plain, other = (toys.chat(**{"max_tokens": 8, "seed": 3, **more}).json() for more in ({}, fields))
    assert other["choices"][0]["message"] == plain["choices"][0]["message"]


def test_an_assistants_content_may_be_null(toys):
    turns = [[*HELLO, {"role": "assistant", "content": content}, *HELLO] for content in (None, "")]
    texts = [toys.chat(messages=messages, seed=1, max_tokens=9).json()["choices"][0]["message"] for messages in turns]
    assert texts[0] == texts[1]
    items = [{**turn, "cache_control": {}, "reasoning_content": "x"} for turn in turns[0]]
    assert toys.post("/v1/responses", {"input": items, "max_output_tokens": 2}).status_code == 200
    assert toys.post("/v1/messages", {"messages": turns[0], "max_tokens": 2}).status_code == 200


@pytest.mark.slow
def test_ignore_eos_goes_on(toys):
    for seed in range(4):
        response = toys.chat(seed=seed, max_tokens=200, ignore_eos=True).json()
        assert response["usage"]["completion_tokens"] == 200


def test_a_slash_at_the_end_is_answered_without_a_redirect(toys):
    for path in ("/v1/chat/completions/", "/v1/models/", "/health/"):
        body = {"messages": HELLO, "max_tokens": 2}
        response = toys.post(path, body) if "chat" in path else toys.client.get(path)
        assert response.status_code == 200
    stored = toys.post("/v1/responses/", {"input": "hello", "max_output_tokens": 2}).json()
    path = f"/v1/responses/{stored['id']}/"
    assert toys.client.get(path).json() == stored
    assert toys.client.get("/v1/models/toys/").status_code == 200
    assert toys.client.get("/health//").status_code == 404
    assert set(toys.client.put(path).headers["allow"].split(", ")) == {"GET", "HEAD", "DELETE"}


def test_bodies_may_be_compressed(toys):
    def post(data, encoding="gzip"):
        headers = {"content-encoding": encoding, "content-type": "application/json"}
        response = toys.client.post("/v1/chat/completions", content=data, headers=headers)
        return response.status_code, response.json().get("error", {}).get("code")

    body = json.dumps({"messages": HELLO, "max_tokens": 2}).encode()
    assert post(gzip.compress(body)) == (200, None)
    assert post(gzip.compress(body), "x-gzip") == (200, None)
    assert post(body, "identity") == (200, None)
    assert post(gzip.compress(body) * 2) == (400, "invalid_encoding")
    assert post(gzip.compress(body)[:-9]) == (400, "invalid_encoding")
    assert post(body) == (400, "invalid_encoding")
    assert post(gzip.compress(b" " * (1 << 24) + body)) == (413, "body_too_large")
    assert post(body, "br") == (415, "unsupported_encoding")


WRONG_TURNS = [{"role": "user", "content": [1] * 1000}] * 50


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"messages": WRONG_TURNS}, "messages.0.content.0"),
        ("/v1/chat/completions", {"messages": HELLO, "logit_bias": {str(i): "x" for i in range(50_000)}}, "logit_bias"),
        ("/v1/chat/completions", {"messages": HELLO, **{str(i): "x" for i in range(50_000)}}, None),
        ("/v1/responses", {"input": WRONG_TURNS}, "input.0.content.0"),
        ("/v1/responses", {"input": "x", "metadata": {str(i): 1 for i in range(50_000)}}, "metadata"),
        ("/v1/messages", {"max_tokens": 1, "messages": WRONG_TURNS}, "messages.0.content.0"),
    ],
)
def test_only_the_first_faults_of_a_body_are_looked_at(toys, monkeypatch, path, body, param):
    numbers = []
    validation_error = request_schemas.validation_error
    monkeypatch.setattr(
        request_schemas,
        "validation_error",
        lambda error, *rest: [numbers.append(error.error_count()), validation_error(error, *rest)][1],
    )
    response = toys.post(path, body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert max(numbers) < 5


def test_negative_seeds_are_seeds(toys):
    first, second = (toys.chat(seed=-5, max_tokens=9).json()["choices"][0]["message"] for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", [{}]),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}),
        ("top_logprobs", 2),  # without logprobs
        ("modalities", ["audio"]),
        ("tool_choice", "required"),
        ("verbosity", "high"),
        ("best_of", 3),
        ("best_of", True),
        ("suffix", "end"),
        ("reasoning_effort", "high"),
    ],
)
def test_fields_that_cannot_be_honoured_are_named(toys, field, value):
    response = toys.chat(**{field: value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert field in response.json()["error"]["message"]


def test_fields_that_ask_for_nothing_are_taken(toys):
    nothing = {
        "tools": [], "tool_choice": None, "logit_bias": {}, "response_format": {"type": "text"}, "store": False,
        "user": "ada", "n": 1, "stop": None, "seed": None, "stream": False, "logprobs": False, "top_logprobs": 0,
        "mixlm": None, "modalities": ["text"],
    }  # fmt: skip
    assert toys.chat(**nothing, max_tokens=2).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temprature": 1}, "temprature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e-300}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"seed": 2**64}, "seed"),
        ({"stop": 5}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "messages.0.role"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"maxTokens": 5}, "maxTokens"),
        ({"a name": 5}, "a name"),
        ({"mixlm": {"topK": 5}}, "mixlm.topK"),
        ({"max_tokens": 8.5}, "max_tokens"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0.type"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"mixlm": {"weigths": [1]}}, "mixlm.weigths"),
        ({"mixlm": {"weights": [1]}}, "mixlm.weights"),
        ({"mixlm": {"weights": [1, -1]}}, "mixlm.weights.1"),
        ({"mixlm": {"weights": [0, 0]}}, "mixlm.weights"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": "json"}, "response_format"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {" river ": 1}}, "logit_bias"),
        ({"mixlm": {"unit": "letter"}}, "mixlm.unit"),
        ({"mixlm": {"unit": "word", "method": "conventional"}}, "mixlm.method"),
        ({"mixlm": {"unit": "byte"}, "temperature": 0}, "temperature"),
        ({"mixlm": {"method": "best"}}, "mixlm.method"),
        ({"mixlm": {"draft": "toy:1"}}, "mixlm.draft"),
        ({"mixlm": {"mix_then_truncate": True, "method": "mixture"}}, "mixlm.method"),
        ({"mixlm": {"rule": "best"}}, "mixlm.rule"),
        ({"mixlm": {"rule": "geometric", "strength": -1}}, "mixlm.strength"),
        ({"mixlm": {"rule": "max", "strength": 2}}, "mixlm.strength"),
        ({"mixlm": {"rule": "max", "method": "single"}}, "mixlm.rule"),
        ({"mixlm": {"rule": "max", "unit": "byte"}}, "mixlm.unit"),
        ({"prompt": "x"}, "prompt"),
    ],
)  # fmt: skip
def test_an_invalid_field_is_named(toys, body, param):
    response = toys.chat(**body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param, response.text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": [[1, 2]]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 0, "echo": True, "stream": True}, "stream"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "echo": True}, "max_tokens"),
        ({"messages": HELLO}, "messages"),
    ],
)
def test_what_a_completion_refuses_is_named(toys, body, param):
    response = toys.post("/v1/completions", {"prompt": "x", **body})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


def test_what_an_engine_cannot_do_is_named_and_hints_are_for_clients():
    hint = "use a top_k from 1 to 64 and no penalties, or --engine hf (engine='hf')"
    error = to_api_error(UnsupportedError("presence_penalty moves tokens from anywhere in the vocabulary", hint))
    assert (error.status, error.param) == (400, "presence_penalty")
    assert error.message.endswith("(use a top_k from 1 to 64 and no penalties)")
    error = to_api_error(UnsupportedError("temperature is 0, and mixture samples", "use --method greedy"))
    assert error.message.endswith('(use mixlm.method "greedy")')


@pytest.mark.parametrize(
    ("hint", "expected"),
    [
        ("use --engine hf (engine='hf')", ""),
        ("use --unit piece, or --engine hf", ' (use mixlm.unit "piece")'),
        ("let its server report more, or use --engine hf (engine='hf')", ""),
        ("use --engine hf (engine='hf'), or a router of the text", " (use a router of the text)"),
        ("use --engine hf (engine='hf'), llama.cpp, SGLang, or vLLM whose logprobs mode is processed_logprobs", ""),
        ("use it with --method speculative or greedy", ' (use it with mixlm.method "speculative" or greedy)'),
    ],
)
def test_hints_leave_out_what_only_the_operator_can_do(hint, expected):
    assert to_api_error(UnsupportedError("it cannot be", hint)).message == f"it cannot be{expected}"


def test_no_hint_in_the_sources_names_an_option_of_the_command_line_to_a_client():
    source = Path(mixlm.__file__).parent
    rooms = ("core", "decoding", "generation", "units", "engines", "engines/transformers", "engines/remote", "server")
    files = [source / "binding.py", source / "ensemble.py"]
    files += [file for room in rooms for file in (source / room).glob("*.py")]
    for file in files:
        for string in re.findall(r'^ +"(use [^"\n]*--[a-z][^"\n]*)"', file.read_text(), re.MULTILINE):
            shown = to_api_error(UnsupportedError("it cannot be", string)).message
            assert "--" not in shown, (file.name, string, shown)
            assert "engine=" not in shown, (file.name, string, shown)


def test_an_unknown_model_is_not_found(toys):
    response = toys.chat(model="gpt-5")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "toys" in response.json()["error"]["message"]


def test_a_prompt_that_is_too_long_is_refused_before_anything_streams(toys):
    response = toys.chat(messages=[{"role": "user", "content": "Q" * 5000}], stream=True)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("body", NO_REQUESTS)
def test_bodies_that_are_no_request(toys, body):
    response = toys.client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_paths_and_methods_that_there_are_not(toys):
    for method, path, status in [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("PUT", "/health", 405)]:
        response = toys.client.request(method, path)
        assert response.status_code == status
        assert response.json()["error"]["code"]
    assert "POST" in toys.client.get("/v1/completions").headers["allow"]


def test_a_character_of_several_tokens_arrives_whole():
    """A toy that writes an umlaut byte by byte; the first event of the two has no text."""
    tokens = [b"a", b"\xc3", b"\xbc", b" "]
    umlaut = fixed({b"a": 1.0}, tokens)

    def table(context):
        logits = np.full(6, -np.inf)
        logits[2 if context[-1] == 1 else 1] = 0
        return logits

    umlaut.table = table
    with running(Ensemble([LoadedMember(umlaut, "m")])) as server:
        chunks = list(events(server.complete("a", max_tokens=4, stream=True)))
        assert [chunk["choices"][0]["text"] for chunk in chunks] == ["", "ü", "", "ü", ""]
        assert [len(chunk["choices"][0]["mixlm"]["members"]) for chunk in chunks] == [1, 1, 1, 1, 0]
        umlaut.prompts.chat = lambda *_: np.zeros(1, dtype=np.int64)
        body = {"input": "a", "max_output_tokens": 4, "include": ["message.output_text.logprobs"], "stream": True}
        lines = server.post("/v1/responses", body).text.splitlines()
        received = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
        deltas = [event for event in received if event["type"] == "response.output_text.delta"]
        assert [(event["delta"], len(event["mixlm"]["members"]), len(event["logprobs"])) for event in deltas] == [
            ("ü", 2, 2)
        ] * 2
        assert len(received[-1]["response"]["output"][0]["content"][0]["logprobs"]) == 4


def test_several_ensembles_by_name():
    alone, pair = load("toy:1"), load("toy:1", "toy:2")
    with running({"alone": alone, "pair": pair}) as server:
        assert [model["id"] for model in server.client.get("/v1/models").json()["data"]] == ["alone", "pair"]
        missing = server.chat().json()["error"]
        assert (missing["param"], missing["code"]) == ("model", "missing")
        body = server.chat(model="alone", max_tokens=3).json()
        assert body["model"] == "alone"
        assert set(body["usage"]["mixlm"]["members"]) == {"toy:1"}


@pytest.mark.parametrize(
    ("extras", "param"),
    [
        ({"unit": "byte", "method": "speculative"}, "mixlm.method"),
        ({"unit": "byte", "rule": "max"}, "mixlm.unit"),
        ({"unit": "byte"}, "temperature"),
    ],
)
def test_what_a_unit_does_not_take_is_an_unsupported_field(toys, extras, param):
    error = toys.chat(temperature=0 if param == "temperature" else 1, mixlm=extras).json()["error"]
    assert (error["param"], error["code"]) == (param, "unsupported_field")


def test_the_description_knows_the_events_of_streams(toys):
    document = toys.client.get("/openapi.json").json()
    for path, event in (("chat/completions", "ChatChunk"), ("completions", "TextCompletion")):
        content = document["paths"][f"/v1/{path}"]["post"]["responses"]["200"]["content"]["text/event-stream"]
        assert content["schema"]["contentSchema"] == {"$ref": f"#/components/schemas/{event}"}
    schemas = document["components"]["schemas"]
    assert set(schemas["Delta"]["properties"]) == {"role", "content", "tool_calls"}
    assert set(schemas["ToolCallDelta"]["required"]) == {"index", "function"}
    assert set(schemas["MessageCall"]["required"]) == {"id", "type", "function"}


def test_the_description_knows_every_path_and_field(toys):
    document = toys.client.get("/openapi.json").json()
    assert set(document["paths"]["/v1/chat/completions"]) == {"post"}
    fields = document["components"]["schemas"]["ChatBody"]["properties"]
    assert {"messages", "temperature", "mixlm", "stream_options", "max_completion_tokens"} <= set(fields)
    assert document["components"]["schemas"]["ChatBody"]["additionalProperties"] is False


def test_log_probabilities_are_finite_numbers():
    """JSON has no infinity."""
    with running(endless()) as server:
        for choice in server.chat(max_tokens=30, logprobs=True, mixlm={"top_k": 0}).json()["choices"]:
            assert all(math.isfinite(token["logprob"]) for token in choice["logprobs"]["content"])


PARTS = "é🦉".encode()


@pytest.mark.slow
def test_parts_of_characters_have_one_spelling():
    """A client finds each token among its own alternatives, in chat and in completions."""
    bytewise = ToyEngine([bytes([byte]) for byte in PARTS], lambda context: np.array([0.0] * len(PARTS) + [-9.0, -9.0]))
    with running(Ensemble([LoadedMember(bytewise, "m0")])) as server:
        bytewise.prompts.chat = bytewise.prompts.raw = lambda *_: np.zeros(1, dtype=np.int64)
        fields = {"seed": 1, "max_tokens": 40, "mixlm": {"top_k": 0}, "logit_bias": {}}
        for stream in (False, True):
            content = server.chat(**fields, stream=stream, logprobs=True, top_logprobs=8)
            bodies = events(content) if stream else [content.json()]
            choices = [choice for body in bodies for choice in body["choices"] if choice["logprobs"]]
            entries = [entry for choice in choices for entry in choice["logprobs"]["content"]]
            assert len(entries) > 3
            for entry in entries:
                assert entry["token"] in [top["token"] for top in entry["top_logprobs"]]
                assert entry["token"] == spelled(bytes(entry["bytes"])) == f"bytes:\\x{entry['bytes'][0]:02x}"
        logprobs = server.complete("x", **fields, logprobs=8).json()["choices"][0]["logprobs"]
        assert len(logprobs["tokens"]) > 3
        for token, logprob, top in zip(
            logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
        ):
            assert top[token] == logprob


PATTERN = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(("}}}
BROKEN_TOOL = {"type": "function", "function": {"name": "g", "parameters": PATTERN}}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"temperature": 0.0001}, "temperature", "temperature: it must be 0, or 0.001 or more"),
        ({"mixlm": {"topk": 3}}, "mixlm.topk", "there is no field mixlm.topk: did you mean 'top_k'?"),
        ({"block": 3}, "block", "there is no field block: did you mean 'mixlm.block'?"),
        ({"mixlm": {"stop": "x"}}, "mixlm.stop", "there is no field mixlm.stop: did you mean 'stop'?"),
        ({"mixlm": {"stpo": "x"}}, "mixlm.stpo", "there is no field mixlm.stpo"),
        ({"stream_options": {"include_usages": True}}, "stream_options.include_usages", "'include_usage'"),
        ({"messages": [{"role": "user", "contents": "x"}]}, "messages.0.contents", "did you mean 'content'?"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "scheme": {}, "schema": {}}}},
            "response_format.json_schema.scheme",
            "did you mean 'schema'?",
        ),
        (
            {"mixlm": {"rule": "min", "unit": "byte"}},
            "mixlm.unit",
            "rule min combines the members' distributions over whole tokens",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}, BROKEN_TOOL]},
            "tools",
            "tools cannot be enforced for g: at 5(9): failed to compile JSON schema: regex parse error: unclosed group",
        ),
        ({"mixlm": {"strength": 2}}, "mixlm.strength", "(name a rule too)"),
        ({"mixlm": {"rule": "union-top-k", "top_k": 0}}, "mixlm.top_k", "(give mixlm.top_k 10, as published)"),
        ({"mixlm": {"rule": "power", "strength": 0}}, "mixlm.strength", '(use mixlm.rule "geometric")'),
        ({"service_tiers": "auto"}, "service_tiers", "did you mean 'service_tier'?"),
        ({"": 1}, "", "there is no field ''"),
        ({"tools": [{"type": "function", "name": "f"}]}, "tools.0.name", "did you mean 'function.name'?"),
        ({"messages": [{**HELLO[0], "id": "x"}]}, "messages.0.id", "there is no field messages.0.id"),
        (
            {"response_format": {"type": "json_schema", "schema": {}, "json_schema": {"name": "x", "schema": {}}}},
            "response_format.schema",
            "there is no field response_format.schema: did you mean 'json_schema.schema'?",
        ),
        ({"messages": [{"role": "user", "content": "x " * 9000}]}, "messages", "whose context holds 4096"),
        ({"guided_json": "no"}, "guided_json", "guided_json: it must be a JSON schema, or its text"),
        ({"guided_json": 1}, "guided_json", "guided_json: it must be a JSON schema, or its text"),
        ({"suffix": "end", "best_of": 3}, "suffix", "suffix cannot be honoured"),
        ({"mixlm": {"unit": "byte", "method": "speculative"}}, "mixlm.method", "(mixture, single, auto do)"),
    ],
    ids=str,
)
def test_hints_come_from_the_level_of_the_field(toys, fields, param, message):
    response = toys.chat(**{"messages": HELLO, **fields})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert message in error["message"]
    assert "stpo" not in param or "did you mean" not in error["message"]
