"""LlamaIndex."""

from typing import Literal

import pydantic
from features import BASE, check_weather, report
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

model = OpenAILike(
    model="toys", api_base=BASE, api_key="any", is_chat_model=True, is_function_calling_model=True,
    should_use_structured_outputs=True,
)  # fmt: skip


class Weather(pydantic.BaseModel, extra="forbid"):
    """A structure."""

    city: Literal["Oslo", "Rome"]
    days: int = pydantic.Field(ge=1, le=9)


def get_weather(city: Literal["Oslo", "Rome"], days: int) -> str:
    """Return the weather."""
    return f"{city} {days}"


def chat():
    assert model.chat([ChatMessage("hello")]).message.content


def stream():
    assert "".join(part.delta or "" for part in model.stream_chat([ChatMessage("hello")]))


def structured():
    check_weather(model.as_structured_llm(Weather).chat([ChatMessage("hello")]).raw)


def tools():
    response = model.chat_with_tools(
        [FunctionTool.from_defaults(get_weather)], "hello", tool_required=True, allow_parallel_tool_calls=False
    )
    [call] = model.get_tool_calls_from_response(response)
    assert call.tool_kwargs["city"] in ("Oslo", "Rome")


report(chat=chat, stream=stream, structured=structured, tools=tools)
