"""Inspect."""

import asyncio

from features import BASE, SCHEMA, check_weather, report
from inspect_ai.model import GenerateConfig, ResponseSchema, get_model
from inspect_ai.tool import ToolInfo
from inspect_ai.util import JSONSchema

model = get_model("openai-api/toys/toys", base_url=BASE, api_key="any")
run = asyncio.new_event_loop().run_until_complete


def generate(**options):
    return run(model.generate("hello", **options))


def structured():
    config = GenerateConfig(response_schema=ResponseSchema(name="x", json_schema=JSONSchema(**SCHEMA)))
    check_weather(generate(config=config).completion)


def tools():
    tool = ToolInfo(name="get_weather", description="x", parameters=SCHEMA)
    output = generate(tools=[tool], tool_choice="any", config=GenerateConfig(parallel_tool_calls=False))
    check_weather(output.message.tool_calls[0].arguments)


report(chat=lambda: generate().completion or 1 / 0, stream="", structured=structured, tools=tools)
