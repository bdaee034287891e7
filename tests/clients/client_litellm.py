"""LiteLLM, as a library."""

import litellm
from features import BASE, HELLO, SCHEMA, check_weather, report

COMMON = {"model": "openai/toys", "api_base": BASE, "api_key": "any", "messages": HELLO}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "x", "parameters": SCHEMA}}]


def structured():
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    completion = litellm.completion(**COMMON, response_format=response_format)
    check_weather(completion.choices[0].message.content)


def tools():
    options = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    completion = litellm.completion(**COMMON, **options)
    check_weather(completion.choices[0].message.tool_calls[0].function.arguments)
    chunks = list(litellm.completion(**COMMON, **options, stream=True))
    message = litellm.stream_chunk_builder(chunks).choices[0].message
    check_weather(message.tool_calls[0].function.arguments)


def stream():
    assert "".join(part.choices[0].delta.content or "" for part in litellm.completion(**COMMON, stream=True))


def chat():
    assert litellm.completion(**COMMON).choices[0].message.content


report(chat=chat, stream=stream, structured=structured, tools=tools)
