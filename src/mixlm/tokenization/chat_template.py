"""Messages as a member's prompt: special tokens come from the chat template and from nowhere else.

A chat template renders messages to one string in which special tokens are spelled out. When a user types the same
spelling, it is plain text to every member. Such spellings in messages are therefore broken by a mark, a character that
occurs in none of the messages. After rendering, whatever still spells a special token came from the template.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mixlm.errors import ConfigError
from mixlm.tokenization.incremental import Encoder, TokenizerEncoder
from mixlm.types import Ids, Message

# For models without a template: a base model continues a question and the beginning of an answer best.
PLAIN_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages %}"
    "{%- if message.role == 'system' %}{{ message.content }}{{ '\n\n' }}"
    "{%- elif message.role == 'user' %}Question: {{ message.content }}{{ '\n' }}"
    "{%- elif message.role == 'assistant' %}Answer: {{ message.content }}\n\n{% endif %}"
    "{%- endfor %}Answer:"
)
# A base model that goes on to ask itself the next question has ended its answer.
PLAIN_STOPS = ("\nQuestion:",)

Render = Callable[[Sequence[Message]], str]


class PromptEncoder:
    """Encodes messages, or a raw text, as one member's prompt ids.

    Args:
        encoder: The member's encoder of plain text.
        special_tokens: Spelling and id of every special token.
        render: Renders messages by the chat template, up to where the completion begins.
        begin: Ids in front of a raw text: a BOS token or nothing.

    Attributes:
        system: This member's own system message, in front of that of a conversation.
    """

    system: str | None = None

    def __init__(
        self,
        encoder: Encoder,
        special_tokens: Mapping[str, int],
        render: Render,
        begin: Sequence[int] = (),
    ) -> None:
        self._encoder = encoder
        self._special_tokens = dict(special_tokens)
        self._render = render
        self._begin = list(begin)
        self._pattern = re.compile(_longest_of(self._special_tokens))
        # The rest of a spelling is looked at and not consumed, so that one inside another is found too.
        self._breakable = re.compile(
            f"(?=({_longest_of(spelling for spelling in self._special_tokens if len(spelling) > 1)}))(.)", re.DOTALL
        )

    def chat(self, messages: Sequence[Message]) -> Ids:
        """Return the ids of a conversation, int64 (n,), up to where the completion begins."""
        if self.system is not None:
            systems = [message.content for message in messages[:1] if message.role == "system"]
            messages = [Message("system", "\n\n".join([self.system, *systems])), *messages[len(systems) :]]
        mark = unused_character("".join(message.content for message in messages))
        safe = [replace(message, content=self._escaped(message.content, mark)) for message in messages]
        return self._rendered_ids(self._render(safe), mark)

    def _escaped(self, text: str, mark: str) -> str:
        """Put the mark after the first character of every spelling of a special token, overlapping ones included."""
        escaped = self._breakable.sub(lambda match: match[2] + mark, text)
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
        start = 0
        for match in self._pattern.finditer(rendered):
            ids += self._text_ids(rendered[start : match.start()].replace(mark, ""))
            ids.append(self._special_tokens[match[0]])
            start = match.end()
        ids += self._text_ids(rendered[start:].replace(mark, ""))
        return np.array(ids, dtype=np.int64)

    def _text_ids(self, text: str) -> list[int]:
        if not text:
            return []
        if isinstance(self._encoder, TokenizerEncoder):
            return self._encoder.prompt(text, first=True)
        return self._encoder.encode(text.encode(errors="replace")).ids


def _longest_of(spellings: Iterable[str]) -> str:
    """Return a regular expression for the longest of several spellings: a trie, so that searching takes linear time."""
    root: dict[str, Any] = {}
    for spelling in spellings:
        node = root
        for character in spelling:
            node = node.setdefault(character, {})
        node[""] = {}

    def source(node: dict[str, Any]) -> str:
        options = [re.escape(character) + source(child) for character, child in node.items() if character]
        if not options:
            return ""
        return f"(?:{'|'.join(options)})" + ("?" if "" in node else "")

    return source(root) or "(?!)"


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
