"""OpenAI's client: responses."""

import openai
import pydantic
from features import BASE, SCHEMA, check_weather, report

client = openai.OpenAI(base_url=BASE, api_key="any")
TOOLS = [{"type": "function", "name": "get_weather", "description": "x", "parameters": SCHEMA, "strict": True}]


class Weather(pydantic.BaseModel, extra="forbid"):
    """A structure."""

    city: str = pydantic.Field(pattern="^(Oslo|Rome)$")
    days: int = pydantic.Field(ge=1, le=9)


def chat():
    first = client.responses.create(model="toys", input="hello", instructions="Be brief.")
    assert client.responses.create(model="toys", input="why", previous_response_id=first.id).output_text


def stream():
    with client.responses.stream(model="toys", input="hello") as events:
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        assert text == events.get_final_response().output_text != ""


def structured():
    check_weather(client.responses.parse(model="toys", input="hello", text_format=Weather).output_parsed)


def tools():
    options = {"model": "toys", "tools": TOOLS, "parallel_tool_calls": False}
    response = client.responses.create(input="hello", tool_choice="required", **options)
    [call] = response.output
    check_weather(call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "12"}
    client.responses.create(input=[result], previous_response_id=response.id, **options)
    with client.responses.stream(input="hello", tool_choice="required", **options) as events:
        check_weather(events.get_final_response().output[0].arguments)


report(chat=chat, stream=stream, structured=structured, tools=tools)
