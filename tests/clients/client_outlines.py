"""Outlines."""

from typing import Literal

import openai
import outlines
import pydantic
from features import BASE, check_weather, report

model = outlines.from_openai(openai.OpenAI(base_url=BASE, api_key="any"), "toys")


class Weather(pydantic.BaseModel, extra="forbid"):
    """A structure."""

    city: Literal["Oslo", "Rome"]
    days: int = pydantic.Field(ge=1, le=9)


report(
    chat=lambda: model("hello") or 1 / 0,
    stream=lambda: "".join(model.stream("hello")) or 1 / 0,
    structured=lambda: check_weather(model("hello", Weather)),
    tools="",
)
