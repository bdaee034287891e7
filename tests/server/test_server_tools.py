"""Tools over HTTP, by OpenAI's client: chat completions, responses; and Anthropic's messages."""

from __future__ import annotations

import json
from typing import Literal

import jsonschema
import openai
import pydantic
import pytest
from ggufs import write_tiny_gguf
from openai.types import responses
from servers import FakeServer
from serving import HELLO, events, running

from mixlm.binding import LoadedMember
from mixlm.ensemble import Ensemble
from mixlm.loading import load
from mixlm.server.api_keys import hash_key

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
FUNCTION = {"name": "get_weather", "description": "The weather.", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": FUNCTION}]
FLAT = [{"type": "function", **FUNCTION}]
ALLOWED = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_weather"}]}


def allowing(*names, mode="required"):
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


CALLS = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 400}


@pytest.fixture
def sdk(toys):
    with openai.OpenAI(base_url=toys.url + "/v1", api_key="any") as client:
        yield client


def other_functions(*names):
    return [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in names]


def check_call(name, arguments):
    assert name == "get_weather"
    jsonschema.validate(json.loads(arguments), PARAMETERS)


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_parses_and_its_result_goes_back(sdk, choice):
    completion = sdk.chat.completions.create(
        model="toys", messages=HELLO, seed=1, **{**CALLS, "tool_choice": choice}
    ).choices[0]
    assert completion.finish_reason == "tool_calls"
    assert completion.message.content is None
    [call] = completion.message.tool_calls
    check_call(call.function.name, call.function.arguments)
    messages = [*HELLO, completion.message, {"role": "tool", "tool_call_id": call.id, "content": "12 degrees"}]
    final = sdk.chat.completions.create(model="toys", messages=messages, tools=TOOLS, seed=1, max_tokens=300)
    assert final.choices[0].message.content or final.choices[0].message.tool_calls
    without = sdk.chat.completions.create(model="toys", messages=messages, seed=1, max_tokens=9)
    assert without.choices[0].message.content


@pytest.mark.slow
def test_a_streamed_call_comes_in_pieces_and_is_the_whole_one(sdk):
    whole = sdk.chat.completions.create(model="toys", messages=HELLO, seed=2, **CALLS).choices[0]
    with sdk.chat.completions.stream(model="toys", messages=HELLO, seed=2, **CALLS) as stream:
        pieces = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert len(pieces) > 3
    assert [call.function.arguments for call in final.message.tool_calls] == [
        call.function.arguments for call in whole.message.tool_calls
    ]
    check_call("get_weather", "".join(piece.arguments_delta for piece in pieces))


def test_deltas_have_the_name_first_and_then_arguments_alone(toys):
    body = {"messages": HELLO, "seed": 3, "stream": True, **CALLS}
    with toys.client.stream("POST", "/v1/chat/completions", json=body) as response:
        deltas = [chunk["choices"][0]["delta"] for chunk in events(response)]
    parts = [part for delta in deltas for part in delta.get("tool_calls", [])]
    assert parts[0]["function"]["name"] == "get_weather"
    assert parts[0]["type"] == "function"
    assert all("name" not in part["function"] and "id" not in part for part in parts[1:])
    assert not any(delta.get("content") for delta in deltas)


def test_with_auto_the_completion_is_text_or_a_call(toys):
    expected = load("toy:1", "toy:2")
    for seed in range(3):
        choice = toys.chat(tools=TOOLS, seed=seed, max_tokens=100).json()["choices"][0]
        completion = expected.generate(HELLO, tools=TOOLS, seed=seed, max_tokens=100)
        assert choice["message"]["content"] == completion.text
        assert choice["finish_reason"] == completion.finish_reason
    none = toys.chat(tools=TOOLS, tool_choice="none", seed=1, max_tokens=20).json()["choices"][0]["message"]
    assert none == toys.chat(seed=1, max_tokens=20).json()["choices"][0]["message"]


@pytest.mark.parametrize("stop", ["tool_call", "<", '"'])
def test_stop_strings_do_not_cut_calls(toys, stop):
    expected, stopped = (toys.chat(**CALLS, seed=1, **more).json()["choices"][0] for more in ({}, {"stop": [stop]}))
    for choice in (expected, stopped):
        [call] = choice["message"]["tool_calls"]
        del call["id"]
    assert stopped == expected


def test_a_call_that_is_cut_off_says_so(toys):
    for length in (2, 12, 60):
        choice = toys.chat(**{**CALLS, "max_tokens": length}, seed=1).json()["choices"][0]
        assert choice["finish_reason"] in ("length", "tool_calls")


@pytest.mark.slow
def test_the_sdk_parses_tools_of_pydantic(sdk):
    class Weather(pydantic.BaseModel):
        city: Literal["Oslo", "Rome"]
        celsius: bool

    completion = sdk.chat.completions.parse(
        model="toys", messages=HELLO, seed=1, max_tokens=400, tools=[openai.pydantic_function_tool(Weather)],
        tool_choice="required", parallel_tool_calls=False,
    )  # fmt: skip
    assert isinstance(completion.choices[0].message.tool_calls[0].function.parsed_arguments, Weather)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": TOOLS * 2}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "required"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": allowing("get_weather", "g")}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
        ({"tools": TOOLS, "tool_choice": allowing()}, "tool_choice.allowed_tools.tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom", "custom": {"name": "g"}}}, "tool_choice"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, "tools"),
        ({"messages": [*HELLO, {"role": "user", "content": "x", "tool_calls": [{"id": "1"}]}]}, "messages.1"),
        ({"tools": TOOLS, "ignore_eos": True}, "tools"),
        ({"tools": TOOLS, "min_tokens": 3}, "tools"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs.enable_thinking"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"guided_json": "no"}, "guided_json"),
        ({"guided_json": {"not": {}}}, "guided_json"),
        ({"guided_json": {}, "ignore_eos": True}, "guided_json"),
        ({"guided_json": {}, "response_format": {"type": "json_object"}}, "guided_json"),
        ({"top_k": 3, "mixlm": {"top_k": 4}}, "top_k"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ],
    ids=str,
)
def test_what_is_wrong_with_tools_is_named(toys, fields, param):
    response = toys.chat(**fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(param), response.text


@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ({"top_k": 3}, {"mixlm": {"top_k": 3}}),
        ({"top_k": -1}, {"mixlm": {"top_k": 0}}),
        ({"min_p": 0.2, "repetition_penalty": 1.3}, {"mixlm": {"min_p": 0.2, "repetition_penalty": 1.3}}),
        ({"guided_json": {"enum": [1, 2]}}, {"guided_json": '{"enum": [1, 2]}'}),
        ({"tool_choice": "auto", "tools": [], "parallel_tool_calls": True, "reasoning_effort": "none"}, {}),
        ({"max_tokens": None, "max_completion_tokens": 8}, {"max_tokens": 8.0}),
        ({"chat_template_kwargs": {}, "add_generation_prompt": True, "continue_final_message": False}, {}),
    ],
    ids=str,
)
def test_fields_of_vllm_are_those_of_mixlm(toys, fields, same):
    one, other = (
        toys.chat(seed=3, **{"max_tokens": 8, **more}).json()["choices"][0]["message"] for more in (fields, same)
    )
    assert one == other


@pytest.mark.slow
def test_min_tokens_and_continued_messages(toys):
    for seed in range(4):
        assert toys.chat(seed=seed, min_tokens=50, max_tokens=60).json()["usage"]["completion_tokens"] >= 50
    turns = [*HELLO, {"role": "assistant", "content": "the river"}]
    open_end = toys.chat(messages=turns, seed=1, max_tokens=5, continue_final_message=True).json()
    expected = load("toy:1", "toy:2").generate(turns, seed=1, max_tokens=5, continue_final_message=True)
    assert open_end["choices"][0]["message"]["content"] == expected.text
    assert open_end["usage"]["prompt_tokens"] < toys.chat(messages=turns, max_tokens=1).json()["usage"]["prompt_tokens"]


# -- /v1/responses


@pytest.mark.slow
def test_responses_are_those_of_chat_and_go_on(sdk):
    expected = load("toy:1", "toy:2").generate(HELLO, seed=1, max_tokens=9)
    first = sdk.responses.create(model="toys", input="hello", max_output_tokens=9, extra_body={"seed": 1})
    assert first.output_text == expected.text
    assert first.usage.output_tokens == len(expected.tokens)
    assert first.status == ("incomplete" if expected.finish_reason == "length" else "completed")
    second = sdk.responses.create(
        model="toys", input="why", previous_response_id=first.id, instructions="Sing.", max_output_tokens=9,
        extra_body={"seed": 1},
    )  # fmt: skip
    turns = [*HELLO, {"role": "assistant", "content": expected.text}, {"role": "user", "content": "why"}]
    system = [{"role": "system", "content": "Sing."}]
    assert second.output_text == load("toy:1", "toy:2").generate([*system, *turns], seed=1, max_tokens=9).text
    by_items = sdk.responses.create(model="toys", input=turns, max_output_tokens=9, extra_body={"seed": 1})
    third = sdk.responses.create(
        model="toys", input="why", previous_response_id=first.id, max_output_tokens=9, extra_body={"seed": 1}
    )
    assert by_items.output_text == third.output_text
    assert sdk.responses.retrieve(first.id).output_text == first.output_text
    sdk.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        sdk.responses.retrieve(first.id)


@pytest.mark.slow
def test_responses_stream(sdk):
    request = {"model": "toys", "input": "hello", "max_output_tokens": 300, "extra_body": {"seed": 2}}
    whole = sdk.responses.create(**request)
    with sdk.responses.stream(**request) as stream:
        kinds, text = [], ""
        for event in stream:
            kinds.append(event.type)
            text += event.delta if event.type == "response.output_text.delta" else ""
        final = stream.get_final_response()
    assert text == whole.output_text == final.output_text
    assert list(dict.fromkeys(kinds)) == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        "response.output_text.delta", "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.completed",
    ]  # fmt: skip
    numbers = [event.sequence_number for event in sdk.responses.create(**request, stream=True)]
    assert numbers == list(range(len(numbers)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_only_allowed_functions_are_called(sdk, seed):
    tools = [*other_functions("a", "b"), *TOOLS, *other_functions("c")]
    request = {"model": "toys", "messages": HELLO, "max_tokens": 400, "parallel_tool_calls": False, "seed": seed}
    allowed = sdk.chat.completions.create(**request, tools=tools, tool_choice=allowing("get_weather"))
    alone = sdk.chat.completions.create(**request, tools=TOOLS, tool_choice="required")
    [call] = allowed.choices[0].message.tool_calls
    assert call.function == alone.choices[0].message.tool_calls[0].function
    check_call(call.function.name, call.function.arguments)
    flat = [{"type": "function", **tool["function"]} for tool in tools]
    fields = {"max_output_tokens": 400, "parallel_tool_calls": False, "extra_body": {"seed": seed}}
    response = sdk.responses.create(model="toys", input=HELLO[0]["content"], tools=flat, tool_choice=ALLOWED, **fields)
    assert response.output[0].arguments == call.function.arguments
    assert response.tool_choice.mode == "required"


@pytest.mark.slow
def test_responses_call_functions_whole_and_streamed(sdk):
    request = {
        "model": "toys", "input": "hello", "tools": FLAT, "tool_choice": "required", "parallel_tool_calls": False,
        "max_output_tokens": 400, "extra_body": {"seed": 3},
    }  # fmt: skip
    [call] = sdk.responses.create(**request).output
    check_call(call.name, call.arguments)
    streamed = list(sdk.responses.create(**request, stream=True))
    pieces = [event.delta for event in streamed if event.type == "response.function_call_arguments.delta"]
    assert len(pieces) > 3
    assert "".join(pieces) == call.arguments == streamed[-1].response.output[0].arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "12 degrees"}
    final = sdk.responses.create(model="toys", input=["x", result][1:], previous_response_id=streamed[-1].response.id)
    assert final.output_text
    items = [{"role": "user", "content": "hello"}, call.model_dump(exclude_none=True), result]
    assert sdk.responses.create(model="toys", input=items, tools=FLAT, max_output_tokens=50).output


def test_responses_have_all_that_the_types_of_the_client_ask_for(toys):
    request = {"input": "hello", "max_output_tokens": 3, "include": ["message.output_text.logprobs"]}
    responses.Response.model_validate_json(toys.post("/v1/responses", request).content)
    event_type = pydantic.TypeAdapter(responses.ResponseStreamEvent)
    for line in toys.post("/v1/responses", {**request, "stream": True}).text.splitlines():
        if line.startswith("data: "):
            event_type.validate_json(line.removeprefix("data: "))


@pytest.mark.slow
def test_responses_parse_structures(sdk):
    class Thing(pydantic.BaseModel):
        kind: Literal["river", "bird"]
        large: bool

    parsed = sdk.responses.parse(model="toys", input="hello", text_format=Thing, max_output_tokens=400)
    assert isinstance(parsed.output_parsed, Thing)


def test_responses_have_logprobs(sdk):
    response = sdk.responses.create(
        model="toys", input="hello", max_output_tokens=4, top_logprobs=2, include=["message.output_text.logprobs"]
    )
    logprobs = response.output[0].content[0].logprobs
    assert len(logprobs) == response.usage.output_tokens
    assert all(len(entry.top_logprobs) == 2 for entry in logprobs)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"inputs": "x"}, "inputs"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"input": []}, "input"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": FLAT, "tool_choice": {**ALLOWED, "tools": [{"type": "function", "name": "g"}]}}, "tool_choice"),
        ({"tools": FLAT, "tool_choice": {**ALLOWED, "mode": "none"}}, "tool_choice.mode"),
        ({"previous_response_id": "resp_x"}, "previous_response_id"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}}, "text.format"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"mixlm": {"weigths": [1]}}, "mixlm.weigths"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content.0"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "a b", "arguments": "{}"}]}, "input.0.name"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input.0"),
        ({"max_tokens": 3}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"response_format": {}}, "response_format"),
        ({"tools": [{"type": "function", "name": "f", "description": "x" * 30_000}]}, "tools.0.description"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "json_schema": {}}}}, "text.format.json_schema"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_response_is_named(toys, fields, param):
    response = toys.post("/v1/responses", {"input": "x", **fields})
    assert response.status_code == 400, response.text
    assert str(response.json()["error"]["param"]).startswith(param), response.text


@pytest.mark.slow
def test_what_is_too_long_is_named():
    with running(load("toy:1"), max_prompt_chars=100) as server:
        long = "x" * 200
        for path, body, param in (
            ("/v1/responses", {"input": "x", "instructions": long}, "instructions"),
            ("/v1/responses", {"input": long}, "input"),
            ("/v1/messages", {"messages": HELLO, "max_tokens": 3, "system": long}, "system"),
        ):
            error = server.post(path, body).json()["error"]
            assert (error["param"], error["message"].split()[0]) == (param, param)


@pytest.mark.slow
def test_stored_responses_are_bounded_and_the_clients_own():
    keys = {hash_key("a-long-and-random-key"): "ada", hash_key("another-random-key-of-bo"): "bo"}
    with running(load("toy:1"), keys, max_stored_bytes=6000) as server:

        def create(key="a-long-and-random-key", **fields):
            headers = {"authorization": f"Bearer {key}"}
            return server.post("/v1/responses", {"input": "hello", "max_output_tokens": 3, **fields}, headers=headers)

        first = create().json()["id"]
        assert create(previous_response_id=first).status_code == 200
        key = {"authorization": "Bearer a-long-and-random-key"}
        for stream, status in (("false", 200), ("true", 400)):
            url = f"/v1/responses/{first}?stream={stream}"
            assert server.client.get(url, headers=key).status_code == status
        assert create("another-random-key-of-bo", previous_response_id=first).status_code == 400
        mine = {**key, "x-request-id": first.removeprefix("resp_")}
        assert server.post("/v1/responses", {"input": "x", "max_output_tokens": 1}, headers=mine).json()["id"] != first
        unstored = create(store=False).json()["id"]
        assert create(previous_response_id=unstored).status_code == 400
        for _ in range(8):
            create()
        assert create(previous_response_id=first).status_code == 400


# -- /v1/messages


def test_messages_are_those_of_chat(toys):
    options = {"method": "greedy", "top_k": 5}
    system = [{"role": "system", "content": "sing"}]
    expected = load("toy:1", "toy:2").generate([*system, *HELLO], max_tokens=9, **options)
    body = {"messages": HELLO, "system": "sing", "max_tokens": 9, "mixlm": options}
    response = toys.post("/v1/messages", body, headers={"anthropic-version": "2023-06-01"}).json()
    assert response["content"] == [{"type": "text", "text": expected.text}]
    assert response["usage"]["output_tokens"] == len(expected.tokens)
    assert response["stop_reason"] == {"length": "max_tokens", "stop": "end_turn"}[expected.finish_reason]
    with toys.client.stream("POST", "/v1/messages", json={**body, "stream": True}) as stream:
        received = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
    deltas = [event["delta"]["text"] for event in received if event["type"] == "content_block_delta"]
    assert "".join(deltas) == expected.text
    stopped = toys.post("/v1/messages", {**body, "stop_sequences": [expected.tokens[2].text]}).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", expected.tokens[2].text)
    two = toys.post("/v1/messages", {**body, "stop_sequences": ["zzz", expected.tokens[2].text]}).json()
    assert two["stop_sequence"] == expected.tokens[2].text


def test_a_stop_string_of_a_template_is_no_stop_sequence(monkeypatch):
    ensemble = load("toy:1")
    text = ensemble.generate(HELLO, max_tokens=9, method="greedy", top_k=5).tokens[2].text
    monkeypatch.setattr(ensemble.members[0].engine, "stops", (text,))
    with running(ensemble) as server:
        body = {"messages": HELLO, "max_tokens": 9, "mixlm": {"method": "greedy", "top_k": 5}}
        stopped = server.post("/v1/messages", {**body, "stop_sequences": ["zzz"]}).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("end_turn", None)


def test_messages_call_functions_whole_and_streamed(toys):
    tool = {"name": "get_weather", "description": "x", "input_schema": PARAMETERS}
    choice = {"type": "any", "disable_parallel_tool_use": True}
    body = {"messages": HELLO, "max_tokens": 400, "tools": [tool], "tool_choice": choice}
    response = toys.post("/v1/messages", body).json()
    assert response["stop_reason"] == "tool_use"
    [call] = response["content"]
    jsonschema.validate(call["input"], PARAMETERS)
    with toys.client.stream("POST", "/v1/messages", json={**body, "stream": True}) as stream:
        received = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
    kinds = list(dict.fromkeys(event["type"] for event in received))
    assert kinds == [
        "message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta",
        "message_stop",
    ]  # fmt: skip
    pieces = [event["delta"]["partial_json"] for event in received if event["type"] == "content_block_delta"]
    check_call("get_weather", "".join(pieces))
    turns = [
        *HELLO,
        {"role": "assistant", "content": response["content"]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call["id"], "content": "12"}]},
    ]
    final = toys.post("/v1/messages", {"messages": turns, "max_tokens": 20, "tools": [tool]})
    assert final.status_code == 200, final.text


def test_messages_go_on_with_the_last_turn_of_the_assistant(toys):
    turns = [*HELLO, {"role": "assistant", "content": "the river"}]
    options = {"method": "greedy", "top_k": 5}
    expected = load("toy:1", "toy:2").generate(turns, max_tokens=5, continue_final_message=True, **options)
    for content in ("the river", [{"type": "text", "text": "the river"}]):
        body = {"messages": [*HELLO, {"role": "assistant", "content": content}], "max_tokens": 5, "mixlm": options}
        assert toys.post("/v1/messages", body).json()["content"] == [{"type": "text", "text": expected.text}]


RESULT = [{"type": "tool_result", "tool_use_id": "a", "content": "x"}]
TOOL_USE = [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [*HELLO, {"role": "assistant", "content": RESULT}]}, "messages.1"),
        ({"messages": [{"role": "user", "content": TOOL_USE}]}, "messages.0"),
        ({"tools": [{"name": "f", "input_schema": {}}], "tool_choice": {"type": "auto", "name": "f"}}, "tool_choice"),
        ({"tools": [{"name": "f", "input_schema": {}}], "tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "txt": "x"}]}]}, "messages.0.content.0.txt"),
    ],
    ids=str,
)
def test_what_is_wrong_with_messages_is_named(toys, fields, param):
    response = toys.post("/v1/messages", {"messages": HELLO, "max_tokens": 3, **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param, response.text


def test_errors_of_messages_have_their_form(toys):
    response = toys.post("/v1/messages", {"messages": HELLO})
    assert response.status_code == 400
    error = response.json()
    assert (error["type"], error["error"]["type"]) == ("error", "invalid_request_error")
    assert "max_tokens" in error["error"]["message"]
    with running(load("toy:1"), {hash_key("a-long-and-random-key"): "ada"}) as server:
        body = {"messages": HELLO, "max_tokens": 3, "stop_sequences": ["zzz"], "system": "x"}
        assert server.post("/v1/messages", body).status_code == 401
        assert server.post("/v1/messages", body, headers={"x-api-key": "a-long-and-random-key"}).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("processed", [True, False])
def test_a_member_behind_a_server_calls_tools_too_or_refuses_by_name(processed, tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    from mixlm.engines import EngineSpec
    from mixlm.engines.remote.engine import RemoteEngine
    from mixlm.models.gguf import find_gguf, tokenizer_folder

    monkeypatch.setenv("MIXLM_CACHE", str(tmp_path))
    fake = FakeServer()
    fake.samples, fake.processed, fake.models = True, processed, [{"id": "fake", "max_model_len": 4096}]
    folder = tokenizer_folder(find_gguf(str(write_tiny_gguf(tmp_path / "tiny.gguf"))))
    try:
        member = LoadedMember(RemoteEngine(EngineSpec(fake.start().url, ""), folder), "behind")
        with running({"mixed": Ensemble([member, *load("toy:1").members])}) as server:
            response = server.chat(seed=1, **CALLS)
    finally:
        fake.stop()
    if not processed:
        assert response.status_code == 400
        assert "tools allows tokens" in response.json()["error"]["message"]
        return
    [choice] = response.json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    [call] = choice["message"]["tool_calls"]
    check_call(call["function"]["name"], call["function"]["arguments"])
    assert set(choice["mixlm"]["members"]) == {"behind", "toy:1"}
