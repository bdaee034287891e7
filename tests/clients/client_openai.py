"""OpenAI's client: chat completions."""

import openai
import pydantic
from features import BASE, HELLO, SCHEMA, check_weather, report

client = openai.OpenAI(base_url=BASE, api_key="any")
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "x", "parameters": SCHEMA}}]


class Weather(pydantic.BaseModel, extra="forbid"):
    """A structure."""

    city: str = pydantic.Field(pattern="^(Oslo|Rome)$")
    days: int = pydantic.Field(ge=1, le=9)


def chat():
    assert client.chat.completions.create(model="toys", messages=HELLO).choices[0].message.content


def stream():
    with client.chat.completions.stream(model="toys", messages=HELLO) as events:
        assert events.get_final_completion().choices[0].message.content


def structured():
    parsed = client.chat.completions.parse(model="toys", messages=HELLO, response_format=Weather)
    check_weather(parsed.choices[0].message.parsed)


def tools():
    options = {"model": "toys", "tools": TOOLS, "parallel_tool_calls": False}
    completion = client.chat.completions.create(messages=HELLO, tool_choice="required", **options)
    [call] = completion.choices[0].message.tool_calls
    check_weather(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": "12"}
    client.chat.completions.create(messages=[*HELLO, completion.choices[0].message, result], **options)
    with client.chat.completions.stream(messages=HELLO, tool_choice="required", **options) as events:
        check_weather(events.get_final_completion().choices[0].message.tool_calls[0].function.arguments)


report(chat=chat, stream=stream, structured=structured, tools=tools)
