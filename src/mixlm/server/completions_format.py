"""Responses to chat and text completions, in the format of OpenAI's API: whole ones, and the events of streams."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from itertools import accumulate
from math import isnan
from typing import Any

from mixlm.server.api_errors import ApiError
from mixlm.server.json_encoding import server_sent_event, to_json
from mixlm.server.request_parsing import ParsedRequest
from mixlm.tokenization.call_parser import (
    ArgumentsPart,
    CallBegin,
    CompletionPart,
    ContentPart,
    ToolCallParser,
)
from mixlm.types import Completion, Token, TopLogprob

DONE = b"data: [DONE]\n\n"
# JSON has no infinities; this stands for the log-probability of what cannot be sampled, as in OpenAI's API.
_MIN_LOGPROB = -9999.0
_END_OF_TEXT = "<|endoftext|>"
_OF_PROMPTS = ("prompt_tokens", "cached_tokens")


class CompletionsFormat:
    """Builds the response to one request; events are bytes, as they are sent. request_id: becomes part of all ids."""

    def __init__(self, request: ParsedRequest, request_id: str) -> None:
        self._request = request
        self._request_id = request_id
        self._is_chat = request.kind == "chat"
        self._parsers = [ToolCallParser(request.tool_names) for _ in range(request.num_completions)]
        # Characters of each completion before its next token.
        self._text_offsets = [len(self._echo(i)) for i in range(request.num_completions)]
        self.response_id = ("chatcmpl-" if self._is_chat else "cmpl-") + request_id
        self._head = {
            "id": self.response_id,
            "object": "chat.completion" if self._is_chat else "text_completion",
            "created": int(time.time()),
            "model": request.model.name,
            "system_fingerprint": request.model.fingerprint,
        }
        chunk = {"object": "chat.completion.chunk"} if self._is_chat else {}
        self._chunk_head = {**self._head, **chunk, **({"usage": None} if request.include_usage else {})}

    def response(self, completions: Sequence[Completion]) -> bytes:
        """Return the complete response, as JSON. completions: in order."""
        # The log-probabilities of all choices together would be millions of objects, which garbage collection visits
        # again and again, while no other thread runs.
        choices = b",".join(to_json(self._choice(i, completion)) for i, completion in enumerate(completions))
        usage = to_json(summed_usage(completions, self._request.n))
        return b'%b,"choices":[%b],"usage":%b}' % (to_json(self._head)[:-1], choices, usage)

    def _choice(self, index: int, completion: Completion) -> dict[str, Any]:
        tokens: Sequence[Token] = completion.tokens
        if completion.prompt:  # with the prompt's log-probabilities, also end-of-text, which clients expect
            self._text_offsets[index] = 0
            tokens = [*completion.prompt, *tokens, *((completion.end,) if completion.end else ())]
        return {
            "index": index,
            **self._content(index, completion),
            "finish_reason": finish_reason(completion),
            "logprobs": self._logprobs(index, tokens),
            "mixlm": choice_extras(completion),
        }

    def first_chunks(self) -> list[bytes]:
        """Return the events before any token: the role of each message, or the prompts to echo."""
        contents = [
            {"role": "assistant", "content": ""} if self._is_chat else self._echo(i)
            for i in range(self._request.num_completions)
        ]
        return [self._chunk(i, content, {"members": []}) for i, content in enumerate(contents) if content]

    def token_chunks(self, index: int, token: Token, forwards: Mapping[str, int]) -> list[bytes]:
        """Return the events of one token. forwards: each member's passes since the previous event."""
        content = self._delta(index, self._parsers[index].push(token.text)) if self._is_chat else token.text
        extras = {"members": [token.member], "forwards": forwards}
        return [self._chunk(index, content, extras, logprobs=self._logprobs(index, [token]))]

    def final_chunks(self, index: int, completion: Completion, forwards: Mapping[str, int]) -> list[bytes]:
        """Return the events at the end of one completion."""
        extras = {"members": [], "forwards": forwards, "seed": completion.seed}
        content = self._delta(index, self._parsers[index].finish()) if self._is_chat else ""
        return [self._chunk(index, content, extras, end=finish_reason(completion))]

    def last_chunks(self, completions: Sequence[Completion]) -> list[bytes]:
        """Return the events at the end of a stream: the usage of the whole request, if it is wanted, and the mark."""
        if not self._request.include_usage:
            return [DONE]
        usage = summed_usage(completions, self._request.n)
        return [server_sent_event({**self._chunk_head, "choices": [], "usage": usage}), DONE]

    def error_chunks(self, error: ApiError) -> list[bytes]:
        """Return the events of an error in a stream that has begun."""
        return [server_sent_event(error.body()), DONE]

    def _delta(self, index: int, parts: Sequence[CompletionPart]) -> dict[str, Any]:
        """Return what parts of a completion add to its message."""
        delta: dict[str, Any] = {}
        calls: list[dict[str, Any]] = []
        for part in parts:
            match part:
                case ContentPart():
                    delta["content"] = delta.get("content", "") + part.text
                case CallBegin():
                    function = {"name": part.name, "arguments": ""}
                    call_id = self._call_id(index, part.index)
                    calls.append({"index": part.index, "id": call_id, "type": "function", "function": function})
                case ArgumentsPart():
                    if calls and calls[-1]["index"] == part.index:
                        calls[-1]["function"]["arguments"] += part.text
                    else:
                        calls.append({"index": part.index, "function": {"arguments": part.text}})
        return {**delta, "tool_calls": calls} if calls else delta

    def _call_id(self, index: int, number: int) -> str:
        """Return the id of a completion's call."""
        return "call_" + sha256(f"{self._request_id} {index} {number}".encode()).hexdigest()[:24]

    def _chunk(
        self,
        index: int,
        content: Any,
        extras: Mapping[str, Any],
        *,
        logprobs: Mapping[str, Any] | None = None,
        end: str | None = None,
    ) -> bytes:
        choice = {
            "index": index,
            "delta" if self._is_chat else "text": content,
            "finish_reason": end,
            "logprobs": logprobs,
            "mixlm": extras,
        }
        return server_sent_event({**self._chunk_head, "choices": [choice]})

    def _content(self, index: int, completion: Completion) -> dict[str, Any]:
        if not self._is_chat:
            return {"text": self._echo(index) + completion.text}
        parser = self._parsers[index]
        delta = self._delta(index, [*parser.push(completion.text), *parser.finish()])
        calls = [{name: call[name] for name in ("id", "type", "function")} for call in delta.get("tool_calls", ())]
        message = {"role": "assistant", "content": delta.get("content", None if calls else ""), "refusal": None}
        return {"message": {**message, "tool_calls": calls} if calls else message}

    def _echo(self, index: int) -> str:
        """Return the prompt that is repeated in front of a completion."""
        return str(self._request.prompts[index // self._request.n]) if self._request.echo else ""

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._request.logprobs:
            return None
        if self._is_chat:
            return {"content": [token_logprob(token) for token in tokens], "refusal": None}
        offsets = list(accumulate((len(token.text) for token in tokens), initial=self._text_offsets[index]))
        self._text_offsets[index] = offsets.pop()
        return {
            "tokens": [_symbol_text(token.data) for token in tokens],
            "token_logprobs": [None if isnan(token.logprob) else _finite(token.logprob) for token in tokens],
            "top_logprobs": [_top_logprobs(token) for token in tokens] if self._request.settings.top_logprobs else None,
            "text_offset": offsets,
        }


def choice_extras(completion: Completion) -> dict[str, Any]:
    """Return mixlm's part of a whole choice."""
    return {"members": [token.member for token in completion.tokens], "seed": completion.seed}


def summed_usage(completions: Sequence[Completion], n: int) -> dict[str, Any]:
    """Return the summed usage of completions. A prompt with several, `n`, counts once."""
    members: dict[str, dict[str, float]] = {}
    prompt_tokens = cached_tokens = 0
    for i, completion in enumerate(completions):
        first_of_prompt = i % n == 0
        for name, usage in completion.usage.members.items():
            total = members.setdefault(name, {})
            for quantity, number in asdict(usage).items():
                is_counted = first_of_prompt or quantity not in _OF_PROMPTS
                total[quantity] = round(total.get(quantity, 0) + number * is_counted, 6)
        if first_of_prompt:
            counts = ((usage.prompt_tokens, usage.cached_tokens) for usage in completion.usage.members.values())
            prompt, cached = max(counts)
            prompt_tokens, cached_tokens = prompt_tokens + prompt, cached_tokens + cached
    completion_tokens = sum(completion.usage.tokens for completion in completions)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
        "mixlm": {
            "members": members,
            "drafted": (drafted := sum(completion.usage.drafted for completion in completions)),
            "checked": drafted,  # the older name of drafted
            "accepted": sum(completion.usage.accepted for completion in completions),
        },
    }


def finish_reason(completion: Completion) -> str:
    """Return why a completion ended, as OpenAI's API names it."""
    return "tool_calls" if completion.tool_calls and completion.finish_reason == "stop" else completion.finish_reason


def token_logprob(token: Token) -> dict[str, Any]:
    """Return the log-probabilities at a token's position, in the format of chat completions."""
    return {**_entry(token), "top_logprobs": [_entry(top) for top in token.top_logprobs]}


def _entry(symbol: Token | TopLogprob) -> dict[str, Any]:
    return {"token": _symbol_text(symbol.data), "logprob": _finite(symbol.logprob), "bytes": list(symbol.data)}


def _top_logprobs(token: Token) -> dict[str, float] | None:
    """Return the log-probabilities at a token's position, in the format of text completions: by text."""
    if isnan(token.logprob):
        return None
    # Several ids may have equal bytes; the most likely one counts.
    by_text = {_symbol_text(top.data): _finite(top.logprob) for top in reversed(token.top_logprobs)}
    return {**by_text, _symbol_text(token.data): _finite(token.logprob)}


def _symbol_text(data: bytes) -> str:
    """Return a symbol as text. End-of-text, and bytes that are no whole character, are spelled as in OpenAI's API.

    Symbols that differ in bytes differ in text.
    """
    try:
        return data.decode() if data else _END_OF_TEXT
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    return max(logprob, _MIN_LOGPROB)
