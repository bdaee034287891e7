"""Messages as a member's prompt: its template writes the control tokens, and nothing else can.

A chat template renders messages to one string in which control tokens are spelled out. A user may type the same
spelling; to every member that is plain text. So such spellings in messages are first broken by a mark, a character that
occurs in none of them; after rendering, whatever still spells a control token came from the template.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mixlm.errors import ConfigError
from mixlm.tokenization.incremental import Encoder, LeadingSpace
from mixlm.types import Ids, Message

# For models without a template: what a base model continues best is a question and the beginning of an answer.
PLAIN_TEMPLATE = (
    "{{ bos_token }}"
    "{%- if messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' %}Question: {{ message.content }}{{ '\n' }}"
    "{%- elif message.role == 'assistant' %}Answer: {{ message.content }}\n\n{% endif %}"
    "{%- endfor %}Answer:"
)
# Where a base model goes on to ask itself the next question, its answer has ended.
PLAIN_STOPS = ("\nQuestion:",)

Render = Callable[[Sequence[Message]], str]


class PromptEncoder:
    """Turns messages, or a raw text, into one member's prompt ids.

    control: spelling and id of every control token. render: messages to the template's text, up to where the reply
    begins. begin: ids in front of a raw text, a BOS token or nothing. leading_space: the tokenizer's rule.
    system: this member's own text in front of every conversation; one that is given too follows it.
    """

    system: str | None = None

    def __init__(
        self,
        encoder: Encoder,
        control: Mapping[str, int],
        render: Render,
        begin: Sequence[int] = (),
        leading_space: LeadingSpace = "never",
    ) -> None:
        self._encoder = encoder
        self._control = dict(control)
        self._render = render
        self._begin = list(begin)
        self._leading_space = leading_space
        self._pattern = re.compile(_longest_of(self._control))
        # The rest of a spelling is looked at and not consumed, so that one inside another is found too.
        self._breakable = re.compile(f"(?=({_longest_of(one for one in self._control if len(one) > 1)}))(.)", re.DOTALL)

    def chat(self, messages: Sequence[Message]) -> Ids:
        """Return the ids of a conversation, up to where the reply begins."""
        if self.system is not None:
            given = [one.content for one in messages[:1] if one.role == "system"]
            messages = [Message("system", "\n\n".join([self.system, *given])), *messages[len(given) :]]
        mark = _unused_character("".join(one.content for one in messages))
        safe = [replace(one, content=self._broken(one.content, mark)) for one in messages]
        return self._ids(self._render(safe), mark)

    def _broken(self, text: str, mark: str) -> str:
        """Put the mark behind the first character of every spelling of a control token, overlapping ones included."""
        return self._breakable.sub(lambda match: match[2] + mark, text)

    def raw(self, text: str) -> Ids:
        """Return the ids of a text to be continued as it stands; nothing in it is a control token."""
        return np.array([*self._begin, *self._text(text, first=True)], dtype=np.int64)

    def prefix(self, end_ids: Collection[int]) -> list[int]:
        """Return the ids that a bare text is scored behind: BOS, or an end-of-text where there is no BOS."""
        return self._begin or sorted(end_ids)[:1]

    def _ids(self, rendered: str, mark: str) -> Ids:
        ids: list[int] = []
        at = 0
        for found in self._pattern.finditer(rendered):
            ids += self._text(rendered[at : found.start()].replace(mark, ""), first=at == 0)
            ids.append(self._control[found[0]])
            at = found.end()
        ids += self._text(rendered[at:].replace(mark, ""), first=at == 0)
        return np.array(ids, dtype=np.int64)

    def _text(self, text: str, *, first: bool) -> list[int]:
        if not text:
            return []
        rule = self._leading_space
        behind_this = rule in ("always", "doubled") or (rule == "first" and first)
        if behind_this and (rule == "doubled" or not text.startswith(" ")):
            text = " " + text
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


def _unused_character(text: str) -> str:
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
