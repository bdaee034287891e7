"""Messages as a member's prompt: special tokens come from the chat template and from nowhere else.

A chat template renders messages to one string in which special tokens are spelled out. When a user types the same
spelling, it is plain text to every member. Such spellings in messages are therefore broken by a mark, a character that
occurs in none of the messages. After rendering, whatever still spells a special token came from the template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from mixlm.errors import ConfigError
from mixlm.tokenization.incremental import Encoder, TokenizerEncoder
from mixlm.tokenization.tool_calls import map_strings, tool_dict
from mixlm.types import Ids, Message, Tool

# For models without a template: a base model continues a question and the beginning of an answer best. An answer that
# goes on stands as it was begun: without a space that it does not have.
PLAIN_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages %}"
    "{%- if message.role == 'system' %}{{ message.content }}{{ '\n\n' }}"
    "{%- elif message.role == 'user' %}Question: {{ message.content }}{{ '\n' }}"
    "{%- elif message.role == 'assistant' %}Answer:"
    "{{ '' if message.content[:1].isspace() or (loop.last and not add_generation_prompt) else ' ' }}"
    "{{ message.content }}\n\n{% endif %}"
    "{%- endfor %}{% if add_generation_prompt %}Answer:{% endif %}"
)
# A base model that goes on to ask itself the next question has ended its answer.
PLAIN_STOPS = ("\nQuestion:",)

Render = Callable[..., str]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptForm:
    """How a conversation becomes a prompt.

    Attributes:
        tools: The functions that the completion may call.
        variables: Further variables of the chat template, such as `enable_thinking`.
        add_generation_prompt: Whether the prompt ends where a response begins, and not after the last message.
        continue_final_message: Whether the prompt ends within the last message, after its content.
    """

    tools: tuple[Tool, ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False


PLAIN_FORM = PromptForm()


class PromptEncoder:
    """Encodes messages, or a raw text, as one member's prompt ids.

    Args:
        encoder: The member's encoder of plain text.
        special_tokens: Spelling and id of every special token.
        render: Renders messages by the chat template, up to where the completion begins. It takes a `PromptForm` too
            where one is given.
        begin: Ids in front of a raw text: a BOS token or nothing.

    Attributes:
        system: This member's own system message, in front of that of a conversation.
    """

    system: str | None = None

    def __init__(
        self, encoder: Encoder, special_tokens: Mapping[str, int], render: Render, begin: Sequence[int] = ()
    ) -> None:
        self._encoder = encoder
        self._special_tokens = dict(special_tokens)
        self._render = render
        self._begin = list(begin)
        self._spellings = _Spellings(self._special_tokens)

    @property
    def template_variables(self) -> frozenset[str]:
        """The names that the chat template takes from outside."""
        return getattr(self._render, "variables", frozenset())

    def chat(self, messages: Sequence[Message], form: PromptForm = PLAIN_FORM) -> Ids:
        """Return the ids of a conversation, int64 (n,), up to where the completion begins."""
        if self.system is not None:
            systems = [message.content for message in messages[:1] if message.role == "system"]
            messages = [Message("system", "\n\n".join([self.system, *systems])), *messages[len(systems) :]]
        calls = [call.arguments for message in messages for call in message.tool_calls]
        tools = [json.dumps(tool_dict(tool), ensure_ascii=False) for tool in form.tools]
        mark = unused_character("".join([*(message.content for message in messages), *calls, *tools]))
        escaped = partial(self._escaped, mark=mark)
        safe = [
            replace(
                message,
                content=escaped(message.content),
                tool_calls=tuple(replace(call, arguments=escaped(call.arguments)) for call in message.tool_calls),
            )
            for message in messages
        ]
        if form == PLAIN_FORM:
            return self._rendered_ids(self._render(safe), mark)
        own = {name: value for name, value in form.variables.items() if name in self.template_variables}
        safe_tools = tuple(
            replace(tool, description=escaped(tool.description), parameters=map_strings(tool.parameters, escaped))
            for tool in form.tools
        )
        rendered = self._render(safe, replace(form, tools=safe_tools, variables=own))
        return self._rendered_ids(rendered.replace(json.dumps(mark)[1:-1], mark), mark)

    def _escaped(self, text: str, mark: str) -> str:
        """Put the mark after the first character of every spelling of a special token, overlapping ones included."""
        starts = [start for start, spelling in self._spellings.find(text) if len(spelling) > 1]
        cuts = [0, *(start + 1 for start in starts), len(text)]
        escaped = mark.join(text[start:end] for start, end in pairwise(cuts))
        if isinstance(self._encoder, TokenizerEncoder) and self._encoder.spells_special(escaped):
            return re.sub(r"(?<=\S)(?=\S)", mark, text)
        return escaped

    def raw(self, text: str) -> Ids:
        """Return the ids of a text to be continued as it stands, int64 (n,); nothing in it is a special token."""
        return np.array([*self._begin, *self._text_ids(text)], dtype=np.int64)

    def prefix(self, end_ids: Collection[int]) -> list[int]:
        """Return the ids in front of a text that is scored without a prompt: BOS, or end-of-text if there is none."""
        return self._begin or sorted(end_ids)[:1]

    def _rendered_ids(self, rendered: str, mark: str) -> Ids:
        if isinstance(self._encoder, TokenizerEncoder):
            return np.array(self._encoder.conversation(rendered, mark), dtype=np.int64)
        ids: list[int] = []
        end = 0
        for start, spelling in self._spellings.find(rendered):
            if start >= end:
                ids += self._text_ids(rendered[end:start].replace(mark, ""))
                ids.append(self._special_tokens[spelling])
                end = start + len(spelling)
        ids += self._text_ids(rendered[end:].replace(mark, ""))
        return np.array(ids, dtype=np.int64)

    def _text_ids(self, text: str) -> list[int]:
        if not text:
            return []
        if isinstance(self._encoder, TokenizerEncoder):
            return self._encoder.prompt(text, first=True)
        return self._encoder.encode(text.encode(errors="replace")).ids


class _Spellings:
    """Finds strings of a set in a text. There may be thousands; a regular expression of them all takes seconds."""

    def __init__(self, spellings: Iterable[str]) -> None:
        self._all = frozenset(spelling for spelling in spellings if spelling)
        self._lengths = sorted({len(spelling) for spelling in self._all}, reverse=True)
        first = {re.escape(spelling[0]) for spelling in self._all}
        self._beginnings = re.compile("|".join(first) or "(?!)")

    def find(self, text: str) -> Iterator[tuple[int, str]]:
        """Yield where spellings begin, with the longest that begins there. They may overlap."""
        for match in self._beginnings.finditer(text):
            start = match.start()
            candidates = (text[start : start + length] for length in self._lengths)
            if (spelling := next((candidate for candidate in candidates if candidate in self._all), None)) is not None:
                yield start, spelling


def unused_character(text: str) -> str:
    """Return a private-use character that the text does not contain.

    Raises:
        ConfigError: the text contains all of them.
    """
    used = set(text)
    for block in (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE)):
        for code in block:
            if chr(code) not in used:
                return chr(code)
    raise ConfigError("the messages contain every private-use character of Unicode", "take some of them out")
