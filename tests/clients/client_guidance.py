"""guidance. Its streams do not run inside the block of a role, where OpenAI's models have to be asked."""

import guidance
from features import BASE, SCHEMA, check_weather, report

MODEL = guidance.models.OpenAI("toys", base_url=BASE, api_key="any", echo=False)


def ask(answer):
    with guidance.user():
        state = MODEL + "hello"
    with guidance.assistant():
        state += answer
    return state["answer"]


def chat():
    assert ask(guidance.gen("answer", max_tokens=20))


def structured():
    check_weather(ask(guidance.json("answer", schema=SCHEMA)))


report(chat=chat, stream="", structured=structured, tools="")
