"""Responses in the form of Anthropic's /v1/messages: whole ones, and the events of streams."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mixlm.server.api_errors import ApiError
from mixlm.server.completions_format import CompletionsFormat, choice_extras, summed_usage
from mixlm.server.json_encoding import named_events, to_json
from mixlm.server.protocols.messages_body import MessagesBody
from mixlm.server.request_parsing import ParsedRequest
from mixlm.tokenization.call_parser import ArgumentsPart, CallBegin, CompletionPart, ContentPart, split_calls
from mixlm.tokenization.tool_calls import arguments_object
from mixlm.types import Completion, Token

Events = Iterator[dict[str, Any]]
_ERROR_TYPES = {413: "request_too_large", 500: "api_error", 503: "overloaded_error"}


class MessagesFormat(CompletionsFormat):
    """Builds the response to one request, which has one completion."""

    def __init__(self, body: MessagesBody, request: ParsedRequest, request_id: str) -> None:
        super().__init__(request, request_id)
        self._body = body
        self._block: str | None = None  # the type of the block that is open
        self._blocks = 0
        self.response_id = f"msg_{request_id}"

    def response(self, completions: Sequence[Completion]) -> bytes:
        """Return the complete response, as JSON."""
        [completion] = completions
        text, calls = split_calls(completion.text, self._request.tool_names)
        content: list[dict[str, Any]] = [{"type": "text", "text": text}] if text or not calls else []
        for number, call in enumerate(calls):
            arguments = arguments_object(call)
            is_object = isinstance(arguments, dict)  # not if it was cut off
            content.append(self._tool_use(number, call.name, arguments if is_object else {}))
        message = {
            **self._message(content),
            **self._stop(completion),
            "usage": _usage(completion),
            "mixlm": choice_extras(completion),
        }
        return to_json(message)

    def first_chunks(self) -> list[bytes]:
        """Return the event before any token. The prompt is counted at the end."""
        usage = {"input_tokens": 0, "output_tokens": 0}
        message = {**self._message([]), "stop_reason": None, "stop_sequence": None, "usage": usage}
        return named_events([_event("message_start", message=message)])

    def token_chunks(self, index: int, token: Token, forwards: Mapping[str, int]) -> list[bytes]:
        """Return the events of one token."""
        return named_events(self._part_events(self._parsers[index].push(token.text)))

    def final_chunks(self, index: int, completion: Completion, forwards: Mapping[str, int]) -> list[bytes]:
        """Return the events at the end of the completion."""
        ended = _event("message_delta", delta=self._stop(completion), usage=_usage(completion))
        return named_events([*self._part_events(self._parsers[index].finish()), *self._end_block(), ended])

    def last_chunks(self, completions: Sequence[Completion]) -> list[bytes]:
        """Return the event at the end of the stream."""
        return named_events([_event("message_stop")])

    def error_chunks(self, error: ApiError) -> list[bytes]:
        """Return the event of an error in a stream that has begun."""
        return named_events([anthropic_error(error)])

    def _part_events(self, parts: Sequence[CompletionPart]) -> Events:
        for part in parts:
            match part:
                case ContentPart():
                    if self._block != "text":
                        yield from self._begin_block({"type": "text", "text": ""})
                    yield self._text_event(type="text_delta", text=part.text)
                case CallBegin():
                    yield from self._begin_block(self._tool_use(part.index, part.name, {}))
                case ArgumentsPart():
                    yield self._text_event(type="input_json_delta", partial_json=part.text)

    def _begin_block(self, block: dict[str, Any]) -> Events:
        yield from self._end_block()
        self._block = block["type"]
        self._blocks += 1
        yield _event("content_block_start", index=self._blocks - 1, content_block=block)

    def _end_block(self) -> Events:
        if self._block is not None:
            self._block = None
            yield _event("content_block_stop", index=self._blocks - 1)

    def _text_event(self, **delta: str) -> dict[str, Any]:
        return _event("content_block_delta", index=self._blocks - 1, delta=delta)

    def _tool_use(self, number: int, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        call_id = self._call_id(0, number).replace("call_", "toolu_", 1)
        return {"type": "tool_use", "id": call_id, "name": name, "input": arguments}

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        model = self._request.model.name
        return {"id": self.response_id, "type": "message", "role": "assistant", "model": model, "content": content}

    def _stop(self, completion: Completion) -> dict[str, Any]:
        """Return why the completion ended; a stop string of a chat template is the end of the turn."""
        sequence = None
        if completion.finish_reason == "length":
            reason = "max_tokens"
        elif completion.tool_calls:
            reason = "tool_use"
        elif completion.stop_string in (self._body.stop_sequences or ()):
            reason, sequence = "stop_sequence", completion.stop_string
        else:
            reason = "end_turn"
        return {"stop_reason": reason, "stop_sequence": sequence}


def anthropic_error(error: ApiError) -> dict[str, Any]:
    """Return the body of an error response, in Anthropic's form."""
    kind = _ERROR_TYPES.get(error.status, error.type)
    return {"type": "error", "error": {"type": kind, "message": error.message, "param": error.param}}


def _event(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, **fields}


def _usage(completion: Completion) -> dict[str, Any]:
    usage = summed_usage([completion], 1)
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage["completion_tokens"],
        "mixlm": usage["mixlm"],
    }
