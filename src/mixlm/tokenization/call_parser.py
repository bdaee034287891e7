"""The text and the calls of a completion in the common form, which `tool_calls` describes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mixlm.tokenization.tool_calls import CALL_BEGIN, CALL_END, call_head, overlap
from mixlm.types import ToolCall


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
            length = len(before) - overlap(before, mark)
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
