"""A conversation in a member's chat template, with nothing lost.

Templates differ in what they take: some refuse system messages or read only the first, some ignore roles that they do
not know, some want a message's content as a list of parts. `ConversationRenderer` renders a conversation as it stands
and checks that every message is there. Where one is not, it tries the forms that say the same, and else refuses.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import markupsafe

from mixlm.errors import ConfigError, TemplateError
from mixlm.tokenization.chat_template import unused_character
from mixlm.types import ROLES, Message, Role

_THINKING_END = "</think>"
# Roles whose content is a list of parts in place of a string; templates take the one, the other, or both.
_FORMS: tuple[frozenset[Role], ...] = (frozenset(), frozenset(ROLES), frozenset({"user", "assistant"}))
_PRINTED_PARTS = ("'type':'text'", '"type":"text"')
_REFUSED = "drop that message, or give the member another template: template_file = PATH"

Turns = list[dict[str, Any]]
RenderTurns = Callable[[Turns], str]


class ConversationRenderer:
    """Renders conversations up to where the response begins.

    Args:
        render: The chat template.
        name: The member's, for messages.
    """

    def __init__(self, render: RenderTurns, name: str) -> None:
        self._render = render
        self._name = name

    def __call__(self, messages: Sequence[Message]) -> str:
        """Return the prompt, in which the text of every message stands.

        The texts of users and assistants stand in their order; a template may put system text elsewhere. Of what an
        assistant wrote, a template may leave out the thinking that ends in `</think>`.

        Raises:
            TemplateError: The template refuses the messages or fails, or leaves a message out.
            ConfigError: There are no messages.
        """
        if not messages:
            raise ConfigError("the conversation has no messages", "give at least one message of the user")
        first_error: TemplateError | None = None
        for arranged in _arrangements(messages):
            for form in _FORMS:
                try:
                    rendered = self._render(_turns(arranged, form))
                    if (lost := self._lost(arranged, form, rendered)) is None:
                        return rendered
                except TemplateError as error:
                    first_error = first_error or error
                else:
                    first_error = first_error or self._loss(arranged, lost)
        assert first_error is not None
        raise first_error

    def _loss(self, messages: Sequence[Message], number: int) -> TemplateError:
        role = messages[number].role
        return TemplateError(
            f"the chat template of {self._name} leaves out message {number + 1} of {len(messages)} ({role})", _REFUSED
        )

    def _lost(self, messages: Sequence[Message], form: frozenset[Role], rendered: str) -> int | None:
        """Return the index of a message that is not in the prompt; None where all are.

        Each content is looked for twice: as it is, and between marks, so that a short one is not found in the
        template's own text.
        """
        mark = unused_character(rendered + "".join(message.content for message in messages))
        marks = [f"{mark}{number}{mark}" for number in range(len(messages))]
        marked = [
            replace(message, content=border + message.content + border)
            for message, border in zip(messages, marks, strict=True)
        ]
        with_marks = self._render(_turns(marked, form)).replace(json.dumps(mark)[1:-1], mark)
        plain, bordered = _packed(rendered), _packed(with_marks)
        texts = _packed("".join(message.content for message in messages))
        if any(plain.count(part) > texts.count(part) for part in _PRINTED_PARTS):
            return 0  # it prints the list instead of the text in it
        plain_end = bordered_end = 0
        for number, (message, border) in enumerate(zip(messages, marks, strict=True)):
            content = message.content
            if not content.strip():
                continue
            free = message.role == "system"
            position = _find(plain, "{}", message, 0 if free else plain_end)
            position_marked = _find(bordered, border + "{}" + border, message, 0 if free else bordered_end)
            if position is None or position_marked is None:
                return number
            if not free:
                plain_end, bordered_end = position, position_marked
        return None


def _find(rendered: str, pattern: str, message: Message, start: int) -> int | None:
    """Return the end of a message's text in a prompt from an offset on; None where it is not there."""
    before, after = pattern.split("{}")
    for content in _spellings(message.content):
        if (offset := rendered.find(before + content + after, start)) >= 0:
            return offset + len(before + content + after)
    if message.role == "assistant" and _THINKING_END in message.content:
        for content in _spellings(message.content.rpartition(_THINKING_END)[2]):
            if (offset := rendered.find(content + after, start)) >= 0:
                return offset + len(content + after)
    return None


def _spellings(content: str) -> Iterator[str]:
    """Yield the forms in which a template may write a text, without white space, which templates may strip."""
    yield _packed(content)
    yield _packed(json.dumps(content, ensure_ascii=False)[1:-1])
    yield _packed(json.dumps(content)[1:-1])
    yield _packed(html.escape(content))
    yield _packed(str(markupsafe.escape(content)))


def _packed(text: str) -> str:
    return "".join(text.split())


def _turns(messages: Sequence[Message], form: frozenset[Role]) -> Turns:
    """Return messages as templates take them. form: roles whose content is a list of parts."""
    return [
        {
            "role": message.role,
            "content": [{"type": "text", "text": message.content}] if message.role in form else message.content,
        }
        for message in messages
    ]


def _arrangements(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """Yield a conversation as it stands, then with system text in fewer places.

    That is in one message at the beginning, and further system messages in front of the user's next; then all of them
    there. Where there is no user message for a text, there is no such form.
    """
    yield list(messages)
    if not any(message.role == "system" for message in messages):
        return
    count = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    leading = [message.content for message in messages[:count]]
    if leading and (rest := _joined(messages[count:], [])) is not None:
        yield [Message("system", "\n\n".join(leading)), *rest]
    if (joined := _joined(messages[count:], leading)) is not None:
        yield joined


def _joined(messages: Sequence[Message], waiting: list[str]) -> list[Message] | None:
    """Join system messages, and texts that wait, to the next user message; the last ones to a user message before."""
    arranged: list[Message] = []
    waiting = list(waiting)
    for message in messages:
        if message.role == "system":
            waiting.append(message.content)
        elif message.role == "user" and waiting:
            arranged.append(Message("user", "\n\n".join([*waiting, message.content])))
            waiting = []
        else:
            arranged.append(message)
    if waiting:
        if not arranged or arranged[-1].role != "user":
            return None
        arranged[-1] = Message("user", "\n\n".join([arranged[-1].content, *waiting]))
    return arranged
