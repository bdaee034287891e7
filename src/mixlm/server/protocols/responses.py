"""Responses in the form of OpenAI's /v1/responses: whole ones, and the events of streams."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mixlm.server.api_errors import ApiError
from mixlm.server.completions_format import CallIds, choice_extras, summed_usage, token_logprob
from mixlm.server.json_encoding import server_sent_event, to_json
from mixlm.server.protocols import FIELD_NAMES
from mixlm.server.protocols.responses_body import ResponsesBody, call_dict
from mixlm.server.request_parsing import ParsedRequest
from mixlm.tokenization.call_parser import (
    ArgumentsPart,
    CallBegin,
    CompletionPart,
    ContentPart,
    ToolCallParser,
    split_calls,
)
from mixlm.types import Completion, Token

Store = Callable[[Mapping[str, Any], list[dict[str, Any]]], None]


class ResponsesFormat:
    """Builds the response to one request.

    Args:
        body: The request.
        earlier: Messages of the conversation that goes on.
        store: Takes the response and the messages of the conversation, if they are to be kept.
        request: The request as a chat completion.
        request_id: Becomes part of all ids.
    """

    def __init__(
        self,
        body: ResponsesBody,
        earlier: Sequence[Mapping[str, Any]],
        store: Store | None,
        request: ParsedRequest,
        request_id: str,
    ) -> None:
        self._body = body
        self._earlier = earlier
        self._store = store
        self._request = request
        self._request_id = request_id
        self._call_ids = CallIds(request_id)
        self._created = time.time()
        self._number = 0
        self._parser = ToolCallParser(request.tool_names)
        self._output: list[dict[str, Any]] = []
        self._members: list[str] = []
        self._forwards: dict[str, int] = {}
        # Not the request's id, which a client may choose: others could replace what is stored.
        self.response_id = f"resp_{secrets.token_hex(16)}"

    def response(self, completions: Sequence[Completion]) -> bytes:
        """Return the complete response, as JSON."""
        [completion] = completions
        content, calls = split_calls(completion.text, self._request.tool_names)
        output: list[dict[str, Any]] = []
        status = "incomplete" if completion.finish_reason == "length" else "completed"
        if content or not calls:
            output.append(self._message_item(0, content, completion.tokens, status))
        for number, call in enumerate(calls):
            last = number == len(calls) - 1
            item = self._call_item(number, call.name, call.arguments, status if last else "completed")
            output.append(item)
        return to_json(self._finished(completion, output))

    def first_chunks(self) -> list[bytes]:
        """Return the events before any token."""
        response = self._response("in_progress", [])
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
        ]

    def token_chunks(self, index: int, token: Token, forwards: Mapping[str, Sequence[int]]) -> list[bytes]:
        """Return the events of one token."""
        del index
        self._members.append(token.member)
        extras = {"members": [token.member], "forwards": {name: len(passes) for name, passes in forwards.items()}}
        logprobs = [token_logprob(token)] if self._request.logprobs else []
        return self._part_chunks(self._parser.push(token.text), logprobs, extras)

    def final_chunks(self, index: int, completion: Completion, forwards: Mapping[str, Sequence[int]]) -> list[bytes]:
        """Return the events at the end of the completion."""
        del index
        extras = {"members": [], "forwards": {name: len(passes) for name, passes in forwards.items()}}
        chunks = self._part_chunks(self._parser.finish(), [], extras)
        if not self._output:
            chunks += self._begin_message()
        status = "incomplete" if completion.finish_reason == "length" else "completed"
        return chunks + self._end_item(status)

    def last_chunks(self, completions: Sequence[Completion]) -> list[bytes]:
        """Return the event with the whole response."""
        response = self._finished(completions[0], self._output)
        return [self._event(f"response.{response['status']}", response=response)]

    def error_chunks(self, error: ApiError) -> list[bytes]:
        """Return the events of an error in a stream that has begun."""
        error = error.renamed(FIELD_NAMES["/v1/responses"])
        details = {"code": error.code or error.type, "message": error.message}
        response = {**self._response("failed", self._output), "error": details}
        return [
            self._event("error", **details, param=error.param),
            self._event("response.failed", response=response),
        ]

    def _part_chunks(
        self, parts: Sequence[CompletionPart], logprobs: list[Any], extras: Mapping[str, Any]
    ) -> list[bytes]:
        chunks: list[bytes] = []
        for part in parts:
            match part:
                case ContentPart():
                    if not self._output:
                        chunks += self._begin_message()
                    [content] = self._output[-1]["content"]
                    content["text"] += part.text
                    content["logprobs"] += logprobs
                    chunks.append(
                        self._item_event(
                            "response.output_text.delta",
                            content_index=0,
                            delta=part.text,
                            logprobs=logprobs,
                            mixlm=extras,
                        )
                    )
                    logprobs = []
                case CallBegin():
                    chunks += self._end_item("completed")
                    chunks += self._begin_item(self._call_item(part.index, part.name, "", "in_progress"))
                case ArgumentsPart():
                    self._output[-1]["arguments"] += part.text
                    chunks.append(
                        self._item_event("response.function_call_arguments.delta", delta=part.text, mixlm=extras)
                    )
        return chunks

    def _begin_message(self) -> list[bytes]:
        item = self._message_item(len(self._output), "", (), "in_progress")
        empty, item["content"] = item["content"], []
        chunks = self._begin_item(item)
        self._output[-1]["content"] = empty
        part = {**empty[0], "logprobs": []}
        return [*chunks, self._item_event("response.content_part.added", content_index=0, part=part)]

    def _begin_item(self, item: dict[str, Any]) -> list[bytes]:
        self._output.append(item)
        return [self._event("response.output_item.added", output_index=len(self._output) - 1, item=dict(item))]

    def _end_item(self, status: str) -> list[bytes]:
        """Return the events at the end of the last item, if there is one."""
        if not self._output:
            return []
        item = self._output[-1]
        item["status"] = status
        if item["type"] == "message":
            [part] = item["content"]
            text = {"content_index": 0, "text": part["text"], "logprobs": part["logprobs"]}
            chunks = [
                self._item_event("response.output_text.done", **text),
                self._item_event("response.content_part.done", content_index=0, part=part),
            ]
        else:
            done = {"arguments": item["arguments"], "name": item["name"]}
            chunks = [self._item_event("response.function_call_arguments.done", **done)]
        return [*chunks, self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)]

    def _item_event(self, kind: str, **fields: Any) -> bytes:
        """Return an event of the last item."""
        return self._event(kind, item_id=self._output[-1]["id"], output_index=len(self._output) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return server_sent_event(event, kind)

    def _message_item(self, number: int, text: str, tokens: Sequence[Token], status: str) -> dict[str, Any]:
        logprobs = [token_logprob(token) for token in tokens] if self._request.logprobs else []
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
        item_id = f"msg_{self._request_id}_{number}"
        return {"id": item_id, "type": "message", "status": status, "role": "assistant", "content": [part]}

    def _call_item(self, number: int, name: str, arguments: str, status: str) -> dict[str, Any]:
        return {
            "id": f"fc_{self._request_id}_{number}",
            "type": "function_call",
            "status": status,
            "call_id": self._call_ids(0, number),
            "name": name,
            "arguments": arguments,
        }

    def _finished(self, completion: Completion, output: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the whole response, and store it."""
        is_cut = completion.finish_reason == "length"
        response = self._response("incomplete" if is_cut else "completed", output)
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
            self._store(response, [*map(dict, self._earlier), *self._body.messages(), *_as_messages(output)])
        return response

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        body, settings = self._body, self._request.tasks[0].settings
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
            "output": output,
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
