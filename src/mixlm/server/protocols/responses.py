"""Responses in the form of OpenAI's /v1/responses: whole ones, and the events of streams."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from mixlm.server.api_errors import ApiError
from mixlm.server.completions_format import CompletionsFormat, choice_extras, summed_usage, token_logprob
from mixlm.server.json_encoding import named_events, to_json
from mixlm.server.protocols.responses_body import ResponsesBody, call_dict
from mixlm.server.request_parsing import ParsedRequest
from mixlm.tokenization.call_parser import ArgumentsPart, CallBegin, CompletionPart, ContentPart
from mixlm.types import Completion, Token

Store = Callable[[Mapping[str, Any], list[dict[str, Any]]], None]
Events = Iterator[dict[str, Any]]


class ResponsesFormat(CompletionsFormat):
    """Builds the response to one request, which has one completion.

    earlier: messages of the conversation that goes on. store: takes the response and the messages of the conversation,
    if they are to be kept.
    """

    def __init__(
        self,
        body: ResponsesBody,
        earlier: Sequence[Mapping[str, Any]],
        store: Store | None,
        request: ParsedRequest,
        request_id: str,
    ) -> None:
        super().__init__(request, request_id)
        self._body = body
        self._earlier = earlier
        self._store = store
        self._created = time.time()
        self._number = 0
        self._output: list[dict[str, Any]] = []
        # Of the tokens since the last event with text.
        self._unsent_logprobs: list[Any] = []
        self._unsent_members: list[str] = []
        self._unsent_forwards: dict[str, int] = {}
        # Not the request's id, which a client may choose: others could replace what is stored.
        self.response_id = f"resp_{secrets.token_hex(16)}"

    def response(self, completions: Sequence[Completion]) -> bytes:
        """Return the complete response, as JSON."""
        [completion] = completions
        for token in completion.tokens:
            self._add(token)
        for _ in (*self._part_events(self._parsers[0].push(completion.text)), *self._last_events(completion)):
            pass  # the events of a stream make the items
        return to_json(self._finished(completion))

    def first_chunks(self) -> list[bytes]:
        """Return the events before any token."""
        response = self._response("in_progress")
        return named_events(self._event(f"response.{kind}", response=response) for kind in ("created", "in_progress"))

    def token_chunks(self, index: int, token: Token, forwards: Mapping[str, int]) -> list[bytes]:
        """Return the events of one token."""
        self._add(token)
        self._count(forwards)
        return named_events(self._part_events(self._parsers[index].push(token.text)))

    def final_chunks(self, index: int, completion: Completion, forwards: Mapping[str, int]) -> list[bytes]:
        """Return the events at the end of the completion."""
        self._count(forwards)
        return named_events(self._last_events(completion))

    def last_chunks(self, completions: Sequence[Completion]) -> list[bytes]:
        """Return the event with the whole response."""
        response = self._finished(completions[0])
        return named_events([self._event(f"response.{response['status']}", response=response)])

    def error_chunks(self, error: ApiError) -> list[bytes]:
        """Return the events of an error in a stream that has begun."""
        details = {"code": error.code or error.type, "message": error.message}
        response = {**self._response("failed"), "error": details}
        failed = [self._event("error", **details, param=error.param), self._event("response.failed", response=response)]
        return named_events(failed)

    def _count(self, forwards: Mapping[str, int]) -> None:
        for member, passes in forwards.items():
            self._unsent_forwards[member] = self._unsent_forwards.get(member, 0) + passes

    def _add(self, token: Token) -> None:
        self._unsent_members.append(token.member)
        if self._request.logprobs:
            self._unsent_logprobs.append(token_logprob(token))

    def _part_events(self, parts: Iterable[CompletionPart]) -> Events:
        for part in parts:
            match part:
                case ContentPart():
                    if not self._output:
                        yield from self._begin_message()
                    [content] = self._output[-1]["content"]
                    logprobs, self._unsent_logprobs = self._unsent_logprobs, []
                    content["text"] += part.text
                    content["logprobs"] += logprobs
                    yield self._text_event("response.output_text", part.text, content_index=0, logprobs=logprobs)
                case CallBegin():
                    yield from self._end_item("completed")
                    yield from self._begin_item(self._call_item(part.index, part.name))
                case ArgumentsPart():
                    self._output[-1]["arguments"] += part.text
                    yield self._text_event("response.function_call_arguments", part.text)

    def _last_events(self, completion: Completion) -> Events:
        yield from self._part_events(self._parsers[0].finish())
        if not self._output:
            yield from self._begin_message()
        if self._output[-1]["type"] == "message":
            self._output[-1]["content"][0]["logprobs"] += self._unsent_logprobs
        yield from self._end_item("incomplete" if completion.finish_reason == "length" else "completed")

    def _begin_message(self) -> Events:
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item = {"id": f"msg_{self._request_id}_0", "type": "message", "status": "in_progress", "role": "assistant"}
        yield from self._begin_item({**item, "content": []})
        self._output[-1]["content"] = [part]
        yield self._item_event("response.content_part.added", content_index=0, part=part)

    def _begin_item(self, item: dict[str, Any]) -> Events:
        self._output.append(item)
        yield self._event("response.output_item.added", output_index=len(self._output) - 1, item=item)

    def _end_item(self, status: str) -> Events:
        """Yield the events at the end of the last item, if there is one."""
        if not self._output:
            return
        item = self._output[-1]
        item["status"] = status
        if item["type"] == "message":
            [part] = item["content"]
            text = {"content_index": 0, "text": part["text"], "logprobs": part["logprobs"]}
            yield self._item_event("response.output_text.done", **text)
            yield self._item_event("response.content_part.done", content_index=0, part=part)
        else:
            done = {"arguments": item["arguments"], "name": item["name"]}
            yield self._item_event("response.function_call_arguments.done", **done)
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)

    def _text_event(self, kind: str, text: str, **fields: Any) -> dict[str, Any]:
        """Return the event of further text of the last item."""
        extras = {"members": self._unsent_members, "forwards": self._unsent_forwards}
        self._unsent_members, self._unsent_forwards = [], {}
        return self._item_event(f"{kind}.delta", delta=text, **fields, mixlm=extras)

    def _item_event(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Return an event of the last item."""
        return self._event(kind, item_id=self._output[-1]["id"], output_index=len(self._output) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}

    def _call_item(self, number: int, name: str) -> dict[str, Any]:
        return {
            "id": f"fc_{self._request_id}_{number}",
            "type": "function_call",
            "status": "in_progress",
            "call_id": self._call_id(0, number),
            "name": name,
            "arguments": "",
        }

    def _finished(self, completion: Completion) -> dict[str, Any]:
        """Return the whole response, and store it."""
        is_cut = completion.finish_reason == "length"
        response = self._response("incomplete" if is_cut else "completed")
        if is_cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            response["completed_at"] = time.time()
        usage = summed_usage([completion], 1)
        response["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
            "mixlm": usage["mixlm"],
        }
        response["mixlm"] = choice_extras(completion)
        if self._store is not None:
            self._store(response, [*map(dict, self._earlier), *self._body.messages(), *_as_messages(self._output)])
        return response

    def _response(self, status: str) -> dict[str, Any]:
        body, settings = self._body, self._request.settings
        text_format = body.text.format if body.text is not None else None
        sampling = settings.sampling
        return {
            "id": self.response_id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._request.model.name,
            "output": self._output,
            "parallel_tool_calls": settings.parallel_tool_calls,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
            "service_tier": "default",
            "store": self._store is not None,
            "temperature": sampling.get("temperature"),
            "text": {
                "format": {"type": "text"} if text_format is None else text_format.model_dump(by_alias=True),
                "verbosity": body.text and body.text.verbosity,
            },
            "tool_choice": (
                body.tool_choice if isinstance(body.tool_choice, str | None) else body.tool_choice.model_dump()
            )
            or "auto",
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": sampling.get("top_p"),
            "truncation": "disabled",
            "usage": None,
            "user": None,
        }


def _as_messages(output: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the items of a response as one message of a chat completion."""
    texts = [item["content"][0]["text"] for item in output if item["type"] == "message"]
    calls = [
        call_dict(item["call_id"], item["name"], item["arguments"]) for item in output if item["type"] != "message"
    ]
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts) or None}
    return [{**message, "tool_calls": calls} if calls else message]
