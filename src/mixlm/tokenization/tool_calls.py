"""Calls of functions as text: the common form, in which an ensemble's completion has them.

All members share one text, so there is one form of calls in it, that of Hermes and Qwen, which many models are trained
on and many templates describe:

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Oslo"}}
    </tool_call>

Further calls follow on the next line. The grammar fixes every character but the arguments (`core/grammar`), and JSON
holds line breaks in strings as `\\n` only. So `call_parser` splits a completion at fixed strings, without ambiguity.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mixlm.errors import ConfigError
from mixlm.types import Message, Tool, ToolCall

CALL_BEGIN = "<tool_call>"
CALL_END = "}\n</tool_call>"
HOW_TO_CALL = (
    f"To call a function, answer with its name and its arguments in JSON, as here:\n{CALL_BEGIN}\n"
    '{"name": NAME, "arguments": {…}}\n</tool_call>'
)


def call_head(name: str) -> str:
    """Return what stands between `CALL_BEGIN` and the arguments of a call."""
    return f'\n{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '


def call_text(call: ToolCall) -> str:
    """Return a call in the common form."""
    return f"{CALL_BEGIN}{call_head(call.name)}{call.arguments}{CALL_END}"


def overlap(text: str, mark: str) -> int:
    """Return the length of the longest suffix of a text that is a proper prefix of a mark."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)


def tool_dict(tool: Tool) -> dict[str, Any]:
    """Return a tool as chat templates and OpenAI's API have it."""
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


def with_instruction(messages: Sequence[Message], text: str) -> list[Message]:
    """Return messages with a text at the end of the system message in front, or with such a message."""
    first = messages[0] if messages else None
    if first is None or first.role != "system":
        return [Message("system", text), *messages]
    return [Message("system", f"{first.content}\n\n{text}"), *messages[1:]]


def plain_messages(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """Return a conversation with tools, calls and results as plain text, for a template that has no form for them."""
    if tools:
        listed = "\n".join(json.dumps(tool_dict(tool)["function"], ensure_ascii=False) for tool in tools)
        messages = with_instruction(messages, f"These functions can be called:\n{listed}\n\n{HOW_TO_CALL}")
    plain: list[Message] = []
    for message in messages:
        if message.role == "tool":
            result = f"<tool_response>\n{message.content}\n</tool_response>"
            if plain and plain[-1].role == "user" and plain[-1].content.endswith("</tool_response>"):
                plain[-1] = Message("user", f"{plain[-1].content}\n{result}")
            else:
                plain.append(Message("user", result))
        elif message.tool_calls:
            parts = [message.content] if message.content else []
            plain.append(Message("assistant", "\n".join([*parts, *map(call_text, message.tool_calls)])))
        else:
            plain.append(Message(message.role, message.content))
    return plain


def arguments_object(call: ToolCall) -> Any:
    """Return the arguments of a call as templates take them: an object, or the text where it is no JSON."""
    try:
        return json.loads(call.arguments)
    except (ValueError, RecursionError):
        return call.arguments


def map_strings(value: Any, function: Any) -> Any:
    """Return JSON with a function applied to every string in it, keys too. Raises ConfigError where it is too deep."""
    try:
        if isinstance(value, str):
            return function(value)
        if isinstance(value, Mapping):
            return {function(key): map_strings(item, function) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [map_strings(item, function) for item in value]
    except RecursionError:
        raise ConfigError("a call's arguments, or a tool's parameters, are nested too deeply") from None
    return value
