"""LangChain."""

from typing import Literal

import pydantic
from features import BASE, check_weather, report
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

model = ChatOpenAI(model="toys", base_url=BASE, api_key="any")


class Weather(pydantic.BaseModel, extra="forbid"):
    """A structure."""

    city: Literal["Oslo", "Rome"]
    days: int = pydantic.Field(ge=1, le=9)


@tool
def get_weather(city: Literal["Oslo", "Rome"]) -> str:
    """Return the weather."""
    return city


def chat():
    assert model.invoke("hello").content


def stream():
    assert "".join(chunk.content for chunk in model.stream("hello"))


def structured():
    check_weather(model.with_structured_output(Weather).invoke("hello"))
    check_weather(model.with_structured_output(Weather, method="function_calling").invoke("hello"))


def tools():
    bound = model.bind_tools([get_weather], tool_choice="any", parallel_tool_calls=False)
    message = bound.invoke("hello")
    [call] = message.tool_calls
    assert call["args"]["city"] in ("Oslo", "Rome")
    model.bind_tools([get_weather]).invoke([HumanMessage("hello"), message, ToolMessage("12", tool_call_id=call["id"])])
    streamed = None
    for chunk in bound.stream("hello"):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed.tool_calls[0]["args"]["city"] in ("Oslo", "Rome")


report(chat=chat, stream=stream, structured=structured, tools=tools)
