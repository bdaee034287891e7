"""Prompts: a text or a conversation, in each member's tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixlm.core.options import GenerationOptions
from mixlm.engines.base import Engine
from mixlm.errors import ConfigError, PromptTooLongError
from mixlm.tokenization.prompt_encoder import PromptForm
from mixlm.types import ROLES, Ids, Message, ToolCall

Prompt = str | Sequence[Message | Mapping[str, Any]]
_FIELDS = ("role", "content", "tool_calls", "tool_call_id")
# Fields of messages that cannot change the text: any value is taken, and has no effect.
IGNORED_MESSAGE_FIELDS = ("annotations", "cache_control", "name", "reasoning", "reasoning_content")
# Variables of chat templates that are not for callers to set.
RESERVED_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"})


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt in each member's tokens, int64 ids, and as its author wrote it, UTF-8."""

    ids: tuple[Ids, ...]
    text: bytes


def encode_prompt(
    prompt: Prompt, options: GenerationOptions, engines: Sequence[Engine], names: Sequence[str]
) -> EncodedPrompt:
    """Return a prompt in the tokens of each engine, in its chat template unless the options say `raw`.

    Raises:
        ConfigError: The prompt is empty, or not a message; or no template takes a variable.
        PromptTooLongError: A context has no room for it and one more token.
    """
    _check_type(prompt)
    if options.raw:
        if not isinstance(prompt, str) or options.system is not None:
            raise ConfigError("a raw prompt is one text, without messages and without a system text")
        text, encoded = prompt, [engine.prompts.raw(prompt) for engine in engines]
    else:
        messages = _messages(prompt)
        if options.system is not None:
            messages.insert(0, Message("system", options.system))
        text = "\n".join(message.content for message in messages)
        for name in unknown_template_variables(options.chat_template_kwargs, engines):
            raise ConfigError(
                f"chat_template_kwargs has {name!r}, and no member's chat template takes it",
                "leave it out: it would change nothing",
            )
        form = PromptForm(
            tools=options.callable_tools,
            variables=options.chat_template_kwargs,
            add_generation_prompt=options.add_generation_prompt,
            continue_final_message=options.continue_final_message,
        )
        encoded = [engine.prompts.chat(messages, form) for engine in engines]
    for engine, name, ids in zip(engines, names, encoded, strict=True):
        if len(ids) == 0:
            raise ConfigError(f"the prompt has no tokens for {name}", "give a prompt that is not empty")
        engine.vocabulary.check_rows(ids, name)
        if len(ids) >= engine.context_length:
            raise PromptTooLongError(
                f"the prompt has {len(ids)} tokens for {name}, whose context holds {engine.context_length}",
                "shorten it; the completion needs room too",
            )
    return EncodedPrompt(tuple(encoded), text.encode(errors="replace"))


def unknown_template_variables(names: Iterable[str], engines: Sequence[Engine]) -> list[str]:
    """Return the names that no member's chat template takes."""
    known = frozenset().union(*(engine.prompts.template_variables for engine in engines)) - RESERVED_VARIABLES
    return [name for name in names if name not in known]


def is_batch(prompt: Prompt | Sequence[Prompt]) -> bool:
    """Return whether these are several prompts, and not one text or one conversation."""
    _check_type(prompt)
    return not isinstance(prompt, str) and any(not isinstance(item, Message | Mapping) for item in prompt)


def _check_type(prompt: Any) -> None:
    """Raise ConfigError for what is no prompt, nor a list of them."""
    if isinstance(prompt, bytes | bytearray):
        raise ConfigError(f"the prompt is {_shown(prompt)}: bytes, and no text", "decode it: prompt.decode()")
    if isinstance(prompt, Mapping | Message):
        raise ConfigError(f"the prompt is one message, {_shown(prompt)}", "a conversation is a list of messages")
    if not isinstance(prompt, str | Sequence):
        raise ConfigError(f"the prompt is {_shown(prompt)}", "give a text, a list of messages, or a list of such")


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]} …"


def _messages(prompt: Prompt) -> list[Message]:
    if isinstance(prompt, str):
        return [Message("user", prompt)]
    messages = [_message(item) for item in prompt]
    if not messages:
        raise ConfigError("the conversation has no messages", "give at least one message of the user")
    return messages


def _message(fields: Any) -> Message:
    """Return a message of any form: `Message`, or a mapping as in OpenAI's API. Raises ConfigError for another."""
    if isinstance(fields, Message):
        fields = {name: value for name in _FIELDS if (value := getattr(fields, name)) or name in ("role", "content")}
    if not isinstance(fields, Mapping):
        raise ConfigError(f"{_shown(fields)} is no message", "give a mixlm.Message, or a dict of role and content")
    role, content, calls = fields.get("role"), _content(fields.get("content")), fields.get("tool_calls") or ()
    role = "system" if role == "developer" else role
    if role == "assistant" and content is None and calls:
        content = ""
    known = (*_FIELDS, *IGNORED_MESSAGE_FIELDS)
    # Libraries leave fields empty when they send back a message.
    empty = [name for name, value in fields.items() if value is None or (isinstance(value, list) and not value)]
    unknown = [name for name in fields if name not in (*known, *empty)]
    if role not in ROLES or not isinstance(content, str) or unknown:
        wrong = f"the key {unknown[0]!r}" if unknown else "no role of these" if role not in ROLES else "no text"
        allowed = ", ".join(ROLES)
        raise ConfigError(
            f"{_shown(dict(fields))} is no message: it has {wrong}",
            f"a message has a role ({allowed}) and a content, a text",
        )
    return Message(role, content, tuple(_call(call) for call in calls), str(fields.get("tool_call_id") or ""))


def _content(content: Any) -> Any:
    """Return a content in parts, all of them texts, as one text; another one as it is."""
    parts = content if isinstance(content, list) else ()
    texts = [
        part["text"]
        for part in parts
        if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
    ]
    return "".join(texts) if parts and len(texts) == len(parts) else content


def _call(call: Any) -> ToolCall:
    if isinstance(call, ToolCall):
        return call
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        raise ConfigError(f"{_shown(call)} is no call of a tool", "give a mixlm.ToolCall, or a dict as in OpenAI's API")
    return ToolCall(str(function.get("name")), function["arguments"], str(call.get("id") or ""))
