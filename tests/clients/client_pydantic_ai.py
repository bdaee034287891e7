"""Pydantic AI."""

import asyncio
from typing import Literal

import pydantic
from features import BASE, check_weather, report
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=BASE, api_key="any")
MODELS = [OpenAIChatModel("toys", provider=provider), OpenAIResponsesModel("toys", provider=provider)]


class Weather(pydantic.BaseModel, extra="forbid"):
    """A structure."""

    city: Literal["Oslo", "Rome"]
    days: int = pydantic.Field(ge=1, le=9)


def chat():
    for model in MODELS:
        assert Agent(model, instructions="Be brief.").run_sync("hello").output


def stream():
    async def run(model):
        async with Agent(model).run_stream("hello") as result:
            assert await result.get_output()

    for model in MODELS:
        asyncio.run(run(model))


def structured():
    for model in MODELS:
        check_weather(Agent(model, output_type=NativeOutput(Weather)).run_sync("hello").output)


def tools():
    for model in MODELS:
        check_weather(Agent(model, output_type=ToolOutput(Weather)).run_sync("hello").output)


report(chat=chat, stream=stream, structured=structured, tools=tools)
