"""Anthropic's client: messages."""

import anthropic
from features import HELLO, SCHEMA, URL, check_weather, report

client = anthropic.Anthropic(base_url=URL, api_key="any")
COMMON = {"model": "toys", "max_tokens": 600, "messages": HELLO}
TOOLS = [{"name": "get_weather", "description": "x", "input_schema": SCHEMA}]


def chat():
    assert client.messages.create(**COMMON, system="Be brief.").content[0].text


def stream():
    with client.messages.stream(**COMMON) as events:
        assert "".join(events.text_stream) == events.get_final_text()


def tools():
    options = {"tools": TOOLS, "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
    message = client.messages.create(**COMMON, **options)
    check_weather(message.content[0].input)
    result = {"type": "tool_result", "tool_use_id": message.content[0].id, "content": "12"}
    turns = [*HELLO, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    client.messages.create(**{**COMMON, "messages": turns}, tools=TOOLS)
    with client.messages.stream(**COMMON, **options) as events:
        check_weather(events.get_final_message().content[0].input)


report(chat=chat, stream=stream, structured="", tools=tools)
