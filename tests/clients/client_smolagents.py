"""Smolagents."""

from features import BASE, report
from smolagents import ChatMessage, OpenAIServerModel, Tool
from smolagents.models import MessageRole

model = OpenAIServerModel("toys", api_base=BASE, api_key="any")
HELLO = [ChatMessage(role=MessageRole.USER, content=[{"type": "text", "text": "hello"}])]


class Weather(Tool):
    """A tool."""

    name = "get_weather"
    description = "Return the weather."
    inputs = {"city": {"type": "string", "description": "where", "enum": ["Oslo", "Rome"]}}  # noqa: RUF012 - so declared
    output_type = "string"

    def forward(self, city: str) -> str:
        """Return the weather."""
        return city


def stream():
    assert "".join(part.content or "" for part in model.generate_stream(HELLO))


def structured():
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert '"n"' in model.generate(HELLO, response_format=response_format).content


def tools():
    message = model.generate(HELLO, tools_to_call_from=[Weather()])
    assert message.tool_calls[0].function.name == "get_weather"


report(chat=lambda: model.generate(HELLO).content or 1 / 0, stream=stream, structured=structured, tools=tools)
