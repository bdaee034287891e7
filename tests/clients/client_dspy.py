"""DSPy, through LiteLLM.

LiteLLM has to be told what the model can do: of models that it does not know, DSPy asks for `json_object` only, which
toys cannot fill. Streams are of fields that DSPy finds in the text by marks of its own, which toys do not write.
"""

from typing import Literal

import dspy
import litellm
from features import BASE, check_weather, report
from pydantic import BaseModel, Field

litellm.register_model(
    {
        "openai/toys": {
            "litellm_provider": "openai",
            "mode": "chat",
            "supports_response_schema": True,
            "supports_function_calling": True,
        }
    }
)
OPTIONS = {"model": "openai/toys", "api_base": BASE, "api_key": "any", "cache": False, "max_tokens": 600}


class Weather(BaseModel):
    city: Literal["Oslo", "Rome"]
    days: int = Field(ge=1, le=9)


class Ask(dspy.Signature):
    """Answer."""

    question: str = dspy.InputField()
    weather: Weather = dspy.OutputField()


class Call(dspy.Signature):
    """Call a tool."""

    question: str = dspy.InputField()
    tools: list[dspy.Tool] = dspy.InputField()
    calls: dspy.ToolCalls = dspy.OutputField()


def get_weather(city: Literal["Oslo", "Rome"], days: int) -> str:
    """The weather."""
    return f"{city} {days}"


def chat():
    assert dspy.LM(**OPTIONS)("hello")[0]


def structured():
    with dspy.context(lm=dspy.LM(**OPTIONS), adapter=dspy.JSONAdapter()):
        check_weather(dspy.Predict(Ask)(question="hello").weather)


def tools():
    required = dspy.LM(**OPTIONS, tool_choice="required", parallel_tool_calls=False)
    with dspy.context(lm=required, adapter=dspy.JSONAdapter(use_native_function_calling=True)):
        [call] = dspy.Predict(Call)(question="hello", tools=[dspy.Tool(get_weather)]).calls.tool_calls
    assert call.name == "get_weather"
    assert call.args["city"] in ("Oslo", "Rome")


report(chat=chat, stream="", structured=structured, tools=tools)
