"""Simon Willison's llm, with a model of its own configuration file."""

import os
from pathlib import Path

from features import BASE, SCHEMA, check_weather, report

os.environ["LLM_USER_PATH"] = str(Path.cwd() / "llm")
Path("llm").mkdir(exist_ok=True)
Path("llm/extra-openai-models.yaml").write_text(
    f"- model_id: toys\n  model_name: toys\n  api_base: {BASE}\n  api_key_name: any\n  supports_schema: true\n"
    "  supports_tools: true\n",
    encoding="utf-8",
)
import llm  # noqa: E402 - it reads the file

model = llm.get_model("toys")
model.key = "any"


def get_weather(city: str) -> str:
    """Return the weather."""
    return city


def tools():
    assert model.prompt("hello", stream=False, tools=[get_weather]).text() is not None


report(
    chat=lambda: model.prompt("hello", stream=False).text() or 1 / 0,
    stream=lambda: "".join(model.prompt("hello")) or 1 / 0,
    structured=lambda: check_weather(model.prompt("hello", schema=SCHEMA, stream=False).text()),
    tools=tools,
)
