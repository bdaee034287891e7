"""DSPy, through LiteLLM. It asks models that LiteLLM does not know for `json_object` only, which toys cannot fill."""

import dspy
from features import BASE, report

dspy.configure(lm=dspy.LM("openai/toys", api_base=BASE, api_key="any", cache=False, max_tokens=600))


def chat():
    assert dspy.settings.lm("hello")[0]


report(chat=chat, stream="", structured="", tools="")
