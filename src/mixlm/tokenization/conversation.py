"""A conversation in a member's chat template, with nothing lost.

Templates differ in what they take: some refuse system messages or read only the first, some ignore roles that they do
not know, some want a message's content as a list of parts. `ConversationRenderer` renders a conversation as it stands
and checks that every message is there. Where one is not, it tries the forms that say the same, and else refuses.

Tools are given to the template, and stated as text where it leaves them out. A template that has a form of its own for
calls is told the common one too (`tool_calls`).
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

import markupsafe

from mixlm.errors import ConfigError, TemplateError
from mixlm.tokenization.chat_template import ChatTemplate
from mixlm.tokenization.prompt_encoder import PLAIN_FORM, PromptForm, unused_character
from mixlm.tokenization.tool_calls import (
    CALL_BEGIN,
    HOW_TO_CALL,
    arguments_object,
    map_strings,
    plain_messages,
    tool_dict,
    with_instruction,
)
from mixlm.types import ROLES, Message, Role, Tool, ToolCall

_THINKING_END = "</think>"
# Roles whose content is a list of parts in place of a string; templates take the one, the other, or both.
_FORMS: tuple[frozenset[Role], ...] = (frozenset(), frozenset(ROLES), frozenset({"user", "assistant"}))
_PRINTED_PARTS = ("'type':'text'", '"type":"text"')
_REFUSED = "drop that message, or give the member another template: template_file = PATH"


class ConversationRenderer:
    """Renders conversations up to where the response begins.

    Args:
        template: The chat template.
        name: The member's, for messages.

    Attributes:
        variables: The names that the template takes from outside.
    """

    def __init__(self, template: ChatTemplate, name: str) -> None:
        self._template = template
        self._name = name
        self.variables = template.variables

    def __call__(self, messages: Sequence[Message], form: PromptForm = PLAIN_FORM) -> str:
        """Return the prompt, in which the text of every message stands, and every tool.

        The texts of users and assistants stand in their order; a template may put system text elsewhere. Of what an
        assistant wrote, a template may leave out the thinking that ends in `</think>`.

        Raises:
            TemplateError: The template refuses the messages or fails, or leaves a message out.
            ConfigError: There are no messages.
        """
        if not messages:
            raise ConfigError("the conversation has no messages", "give at least one message of the user")
        try:
            rendered = self._first_complete(messages, form)
            if not form.tools or (CALL_BEGIN in rendered and '"arguments"' in rendered):
                return rendered
            return self._first_complete(with_instruction(messages, HOW_TO_CALL), form)
        except TemplateError:
            if not form.tools and all(message.role != "tool" and not message.tool_calls for message in messages):
                raise
            return self._first_complete(plain_messages(messages, form.tools), replace(form, tools=()))

    def _first_complete(self, messages: Sequence[Message], form: PromptForm) -> str:
        """Return the prompt in the first form in which nothing is lost. Raises TemplateError where there is none."""
        first_error: TemplateError | None = None
        for arranged in _arrangements(messages):
            for parts in _FORMS:
                try:
                    rendered = self._rendered(arranged, parts, form)
                    if (lost := self._lost(arranged, parts, form, rendered)) is None:
                        return self._unfinished(arranged, parts, form) if form.continue_final_message else rendered
                    number, count = lost + 1, len(arranged)
                    what = "the tools" if lost == count else f"message {number} of {count} ({arranged[lost].role})"
                    raise TemplateError(f"the chat template of {self._name} leaves out {what}", _REFUSED)
                except TemplateError as error:
                    first_error = first_error or error
        assert first_error is not None
        raise first_error

    def _rendered(self, messages: Sequence[Message], parts: frozenset[Role], form: PromptForm) -> str:
        return self._template.render(
            _turns(messages, parts),
            add_generation_prompt=form.add_generation_prompt and not form.continue_final_message,
            tools=[tool_dict(tool) for tool in form.tools] or None,
            variables=form.variables,
        )

    def _unfinished(self, messages: Sequence[Message], parts: frozenset[Role], form: PromptForm) -> str:
        """Return the prompt up to the end of the last message's content."""
        *earlier, last = messages
        mark = unused_character("".join(message.content for message in messages))
        marked = self._rendered([*earlier, replace(last, content=last.content + mark)], parts, form)
        before, separator, _ = marked.rpartition(mark)
        if not separator:
            raise TemplateError(f"the chat template of {self._name} cannot continue the last message", _REFUSED)
        return before

    def _lost(self, messages: Sequence[Message], parts: frozenset[Role], form: PromptForm, rendered: str) -> int | None:
        """Return the index of a message that is not in the prompt, their number for tools; None where all are.

        Each content is looked for twice: as it is, and between marks, so that a short one is not found in the
        template's own text.
        """
        mark = unused_character(rendered + "".join(message.content for message in messages))
        marks = [f"{mark}{number}{mark}" for number in range(len(messages))]
        marked = [
            replace(message, content=border + message.content + border)
            for message, border in zip(messages, marks, strict=True)
        ]
        tools = tuple(
            replace(tool, name=mark + tool.name + mark, description=mark + tool.description + mark)
            for tool in form.tools
        )
        with_marks = self._rendered(marked, parts, replace(form, tools=tools)).replace(json.dumps(mark)[1:-1], mark)
        plain, bordered = _packed(rendered), _packed(with_marks)
        unmarked = re.sub(f"{mark}[0-9]+{mark}", "", bordered)
        if not all(_has_tool(bordered, tool) for tool in tools):
            return len(messages)
        texts = _packed("".join(message.content for message in messages))
        if any(plain.count(part) > texts.count(part) for part in _PRINTED_PARTS):
            return 0  # it prints the list instead of the text in it
        plain_end = bordered_end = 0
        for number, (message, border) in enumerate(zip(messages, marks, strict=True)):
            content = message.content
            if not all(_is_in(plain, text) for call in message.tool_calls for text in _call_texts(call)):
                return number
            if not content.strip():
                continue
            free = message.role == "system"
            position = _find(plain, "", message, 0 if free else plain_end)
            position_marked = _find(bordered, border, message, 0 if free else bordered_end)
            if position is None or position_marked is None:
                return number
            if plain.count(_packed(content)) < unmarked.count(_packed(content)) and not _has_thinking(message):
                return number  # what was found is the template's own text
            if not free:
                plain_end, bordered_end = position, position_marked
        return None


def _has_tool(rendered: str, tool: Tool) -> bool:
    """Whether a tool's name, description and parameters stand in a prompt."""
    names = tool.parameters.get("properties")
    return all(
        _is_in(rendered, text) for text in (tool.name, tool.description, *(names if isinstance(names, Mapping) else ()))
    )


def _call_texts(call: ToolCall) -> list[str]:
    """Return the texts of a call that its prompt has whatever the form: the name, and the strings of the arguments."""
    texts = [call.name]
    map_strings(arguments_object(call), texts.append)
    return texts


def _is_in(rendered: str, text: str) -> bool:
    return any(spelling in rendered for spelling in _spellings(text))


def _find(rendered: str, border: str, message: Message, start: int) -> int | None:
    """Return the end of a message's text in a prompt from an offset on; None where it is not there."""
    texts = [border + content + border for content in _spellings(message.content)]
    if _has_thinking(message):
        texts += [content + border for content in _spellings(message.content.rpartition(_THINKING_END)[2])]
    return next((offset + len(text) for text in texts if (offset := rendered.find(text, start)) >= 0), None)


def _has_thinking(message: Message) -> bool:
    return message.role == "assistant" and _THINKING_END in message.content


def _spellings(content: str) -> Iterator[str]:
    """Yield the forms in which a template may write a text, without white space, which templates may strip."""
    yield _packed(content)
    yield _packed(json.dumps(content, ensure_ascii=False)[1:-1])
    yield _packed(json.dumps(content)[1:-1])
    yield _packed(html.escape(content))
    yield _packed(str(markupsafe.escape(content)))


def _packed(text: str) -> str:
    return "".join(text.split())


def _turns(messages: Sequence[Message], parts: frozenset[Role]) -> list[dict[str, Any]]:
    """Return messages as templates take them. parts: roles whose content is a list of parts."""
    names = {call.id: call.name for message in messages for call in message.tool_calls}
    turns = []
    for message in messages:
        in_parts = message.role in parts and not (message.tool_calls and not message.content)
        content = [{"type": "text", "text": message.content}] if in_parts else message.content
        turn: dict[str, Any] = {"role": message.role, "content": content}
        if message.tool_calls:
            turn["tool_calls"] = [
                {
                    "type": "function",
                    "id": _short_id(call.id),
                    "function": {"name": call.name, "arguments": arguments_object(call)},
                }
                for call in message.tool_calls
            ]
        if message.role == "tool":
            turn["tool_call_id"] = _short_id(message.tool_call_id)
            turn["name"] = names.get(message.tool_call_id, "")
        turns.append(turn)
    return turns


def _short_id(name: str) -> str:
    """Return the id of a call in nine letters and digits: some templates take no other."""
    return name if re.fullmatch("[a-zA-Z0-9]{9}", name) else sha256(name.encode(errors="replace")).hexdigest()[:9]


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
