"""OpenAI's agents, whose default are responses."""

import asyncio
from typing import Literal

import agents
import openai
import pydantic
from features import BASE, check_weather, report

client = openai.AsyncOpenAI(base_url=BASE, api_key="any")
called = []
run = asyncio.new_event_loop().run_until_complete


class Weather(pydantic.BaseModel, extra="forbid"):
    """A structure."""

    city: Literal["Oslo", "Rome"]
    days: int = pydantic.Field(ge=1, le=9)


@agents.function_tool
def get_weather(city: Literal["Oslo", "Rome"]) -> str:
    """Return the weather."""
    called.append(city)
    return "12"


def agent(kind, **options):
    return agents.Agent(name="a", instructions="Be brief.", model=kind(model="toys", openai_client=client), **options)


KINDS = (agents.OpenAIResponsesModel, agents.OpenAIChatCompletionsModel)


def chat():
    for kind in KINDS:
        assert run(agents.Runner.run(agent(kind), "hello")).final_output


def stream():
    async def stream_with(kind):
        result = agents.Runner.run_streamed(agent(kind), "hello")
        assert [event async for event in result.stream_events()]
        assert result.final_output

    for kind in KINDS:
        run(stream_with(kind))


def structured():
    for kind in KINDS:
        check_weather(run(agents.Runner.run(agent(kind, output_type=Weather), "hello")).final_output)


def tools():
    for kind in KINDS:
        called.clear()
        settings = agents.ModelSettings(tool_choice="required", parallel_tool_calls=False)
        options = {"tools": [get_weather], "model_settings": settings, "tool_use_behavior": "stop_on_first_tool"}
        run(agents.Runner.run(agent(kind, **options), "hello"))
        assert called


report(chat=chat, stream=stream, structured=structured, tools=tools)
