"""Instructor."""

from typing import Literal

import instructor
import openai
import pydantic
from features import BASE, HELLO, check_weather, report

client = openai.OpenAI(base_url=BASE, api_key="any")


class Weather(pydantic.BaseModel, extra="forbid"):
    """A structure."""

    city: Literal["Oslo", "Rome"]
    days: int = pydantic.Field(ge=1, le=9)


def create(mode, **options):
    made = instructor.from_openai(client, mode=mode)
    return made.chat.completions.create(model="toys", messages=HELLO, response_model=Weather, max_retries=0, **options)


def stream():
    made = instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA)
    parts = list(made.chat.completions.create_partial(model="toys", messages=HELLO, response_model=Weather))
    check_weather(parts[-1])


report(
    chat="",
    stream=stream,
    structured=lambda: check_weather(create(instructor.Mode.JSON_SCHEMA)),
    tools=lambda: check_weather(create(instructor.Mode.TOOLS)),
)
