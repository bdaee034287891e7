"""Inspect, which leaves out bounds of numbers."""

import asyncio
import json

from features import BASE, SCHEMA, report
from inspect_ai.model import GenerateConfig, ResponseSchema, get_model
from inspect_ai.tool import ToolInfo
from inspect_ai.util import JSONSchema

model = get_model("openai-api/toys/toys", base_url=BASE, api_key="any")
run = asyncio.new_event_loop().run_until_complete


def generate(**options):
    return run(model.generate("hello", **options))


def structured():
    config = GenerateConfig(response_schema=ResponseSchema(name="x", json_schema=JSONSchema(**SCHEMA)))
    assert json.loads(generate(config=config).completion)["city"] in ("Oslo", "Rome")


def tools():
    tool = ToolInfo(name="get_weather", description="x", parameters=SCHEMA)
    output = generate(tools=[tool], tool_choice="any", config=GenerateConfig(parallel_tool_calls=False))
    assert output.message.tool_calls[0].arguments["city"] in ("Oslo", "Rome")


report(chat=lambda: generate().completion or 1 / 0, stream="", structured=structured, tools=tools)
