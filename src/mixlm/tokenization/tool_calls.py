"""Calls of functions as text: the common form, in which an ensemble's completion has them, and its parser.

All members share one text, so there is one form of calls in it, that of Hermes and Qwen, which many models are trained
on and many templates describe:

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Oslo"}}
    </tool_call>

Further calls follow on the next line. The grammar fixes every character but the arguments (`core/grammar`), and JSON
holds line breaks in strings as `\\n` only. So a completion is split at fixed strings, without ambiguity.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class ContentPart:
    """Text outside of calls."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A call begins. index: of the call in its completion."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsPart:
    """The next characters of a call's arguments, which are JSON."""

    index: int
    text: str


CompletionPart = ContentPart | CallBegin | ArgumentsPart


class ToolCallParser:
    """Splits a completion into text and calls while it is generated.

    White space in front of a call, where no other text is, belongs to neither.

    Args:
        names: Of the functions that may be called; without any, all is text.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._heads = {call_head(name): name for name in names}
        self._buffer = ""
        self._state = "text"
        self._has_content = False
        self._index = -1

    def push(self, text: str) -> list[CompletionPart]:
        """Add text that was generated; return the parts that are decided now."""
        self._buffer += text
        parts: list[CompletionPart] = []
        while (part := self._next()) is not None:
            parts.append(part)
        return parts

    def finish(self) -> list[CompletionPart]:
        """Return the part that was held back, at the end of the completion: text that might have begun a call."""
        rest, self._buffer = self._buffer, ""
        return [ContentPart(rest)] if self._state == "text" and rest else []

    @property
    def calls(self) -> int:
        """How many calls have begun."""
        return self._index + 1

    def _next(self) -> CompletionPart | None:  # noqa: PLR0911 - a state machine
        if not self._heads:
            text, self._buffer = self._buffer, ""
            return ContentPart(text) if text else None
        if self._state == "head":
            head = next((head for head in self._heads if self._buffer.startswith(head)), None)
            if head is None:
                return None
            self._buffer = self._buffer[len(head) :]
            self._state, self._index = "arguments", self._index + 1
            return CallBegin(self._index, self._heads[head])
        mark = CALL_END if self._state == "arguments" else CALL_BEGIN
        before, separator, after = self._buffer.partition(mark)
        if not separator:
            length = len(before) - _overlap(before, mark)
            before, after = before[:length], before[length:]
        if self._state == "text" and not self._has_content and not before.strip():
            if not separator:
                return None  # white space, which may be in front of a call
            before = ""
        self._buffer = after
        state = self._state
        if separator:
            self._state = "between" if state == "arguments" else "head"
        if before and state == "arguments":
            return ArgumentsPart(self._index, before)
        if before and state == "text":
            self._has_content = True
            return ContentPart(before)
        return self._next() if separator else None


def split_calls(text: str, names: Iterable[str]) -> tuple[str, tuple[ToolCall, ...]]:
    """Return the text outside of calls, and the calls, of a completion. A last one may be incomplete."""
    parser = ToolCallParser(names)
    content, calls = "", []
    for part in [*parser.push(text), *parser.finish()]:
        match part:
            case ContentPart():
                content += part.text
            case CallBegin():
                calls.append(ToolCall(part.name, ""))
            case ArgumentsPart():
                calls[-1] = ToolCall(calls[-1].name, calls[-1].arguments + part.text)
    return content, tuple(calls)


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


def _overlap(text: str, mark: str) -> int:
    """Return the length of the longest end of a text that is a beginning of a mark."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
