"""DSPy, through LiteLLM."""

from typing import Literal

import dspy
from features import BASE, report

dspy.configure(lm=dspy.LM("openai/toys", api_base=BASE, api_key="any", cache=False, max_tokens=600))


class Weather(dspy.Signature):
    """Say where the weather is."""

    question: str = dspy.InputField()
    city: Literal["Oslo", "Rome"] = dspy.OutputField()


def chat():
    assert dspy.settings.lm("hello")[0]


def structured():
    assert dspy.Predict(Weather, adapter=dspy.JSONAdapter())(question="where?").city in ("Oslo", "Rome")


report(chat=chat, stream="", structured=structured, tools="")
