"""Responses in the forms of the API: whole ones, and the events of streamed ones."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any, cast

from mixlm.server import response_schemas as shapes
from mixlm.server.request_parsing import Asked
from mixlm.types import Completion, Token

DONE = b"data: [DONE]\n\n"
# The least that JSON readers in all languages take for a finite number; -inf is the log of what cannot be drawn.
_LEAST = -9999.0
_END = "<|endoftext|>"


def as_json(value: Any) -> bytes:
    """Return a value as JSON in UTF-8. Lone surrogates, which UTF-8 has no form for, stay escaped."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def event(value: Any) -> bytes:
    """Return a server-sent event."""
    return b"data: " + as_json(value) + b"\n\n"


class Answer:
    """The response to one request. identity: what the request is known by in logs."""

    def __init__(self, asked: Asked, identity: str) -> None:
        self._asked = asked
        self._chat = asked.kind == "chat"
        self._offsets = [len(self._echo(i)) for i in range(len(asked.tasks))]
        self._head = {
            "id": ("chatcmpl-" if self._chat else "cmpl-") + identity,
            "object": "chat.completion" if self._chat else "text_completion",
            "created": int(time.time()),
            "model": asked.served.name,
            "system_fingerprint": asked.served.fingerprint,
        }

    def whole(self, completions: Sequence[Completion]) -> shapes.ChatCompletion | shapes.TextCompletion:
        """Return the response that is sent at once. completions: in the order of the tasks."""
        choices = [
            {
                "index": i,
                **self._content(i, one),
                "finish_reason": one.finish_reason,
                "logprobs": self._logprobs(i, self._shown(i, one)),
                "mixlm": {"members": [token.member for token in one.tokens], "seed": one.seed},
            }
            for i, one in enumerate(completions)
        ]
        whole = {**self._head, "choices": choices, "usage": self.usage(completions)}
        return cast("shapes.ChatCompletion | shapes.TextCompletion", whole)

    def first(self) -> list[bytes]:
        """Return the events in front of any token: each message's role, or the text to repeat."""
        if self._chat:
            return [
                self._chunk(i, {"role": "assistant", "content": ""}, {"members": []})
                for i in range(len(self._asked.tasks))
            ]
        return [self._chunk(i, self._echo(i), {"members": []}) for i in range(len(self._asked.tasks)) if self._echo(i)]

    def token(self, index: int, token: Token, forwards: Mapping[str, Sequence[int]]) -> bytes:
        """Return the event of one token. forwards: those of each member since the event before."""
        content = {"content": token.text} if self._chat else token.text
        return self._chunk(
            index,
            content,
            {"members": [token.member], "forwards": _counts(forwards)},
            logprobs=self._logprobs(index, [token]),
        )

    def last(self, index: int, completion: Completion, forwards: Mapping[str, Sequence[int]]) -> bytes:
        """Return the event of one reply's end."""
        mixlm = {"members": [], "forwards": _counts(forwards), "seed": completion.seed}
        return self._chunk(index, {} if self._chat else "", mixlm, finish_reason=completion.finish_reason)

    def totals(self, completions: Sequence[Completion]) -> bytes:
        """Return the event of the whole request's usage."""
        return event({**self._chunk_head(), "choices": [], "usage": self.usage(completions)})

    def usage(self, completions: Sequence[Completion]) -> shapes.Usage:
        """Add up what replies took. A prompt with several replies is one prompt."""
        members: dict[str, shapes.MemberWork] = {}
        prompts = 0
        for i, completion in enumerate(completions):
            for name, one in completion.usage.members.items():
                sums = members.setdefault(name, _no_work())
                sums["prompt_tokens"] += one.prompt_tokens if i % self._asked.n == 0 else 0
                sums["tokens"] += one.tokens
                sums["forwards"] += one.forwards
                sums["forward_tokens"] += one.forward_tokens
                sums["forward_seconds"] = round(sums["forward_seconds"] + one.forward_seconds, 6)
                sums["dropped"] += one.dropped
            if i % self._asked.n == 0:
                prompts += max(one.prompt_tokens for one in completion.usage.members.values())
        written = sum(one.usage.tokens for one in completions)
        return {
            "prompt_tokens": prompts,
            "completion_tokens": written,
            "total_tokens": prompts + written,
            "mixlm": {
                "members": members,
                "checked": sum(one.usage.drafted for one in completions),
                "accepted": sum(one.usage.accepted for one in completions),
            },
        }

    def attributes(
        self, completions: Sequence[Completion], work: Mapping[tuple[str, str], int], closed: str | None
    ) -> dict[str, Any]:
        """Return what a trace says of the request: its settings and figures, nothing of what was asked or written.

        completions: of finished replies. work: by what and by member, of all replies: `tokens` written, `forwards`,
        `forward_tokens`. closed: why it was given up, if it was. Arrays have an element for each of `mixlm.members`.
        """
        asked, usage, names = self._asked, self.usage(completions), self._asked.ensemble.names
        done = {what: [work.get((what, one), 0) for one in names] for what in ("tokens", "forwards", "forward_tokens")}
        attributes = {
            "gen_ai.operation.name": "chat" if self._chat else "text_completion",
            "gen_ai.request.model": asked.served.name,
            "gen_ai.response.id": self._head["id"],
            "gen_ai.response.finish_reasons": [one.finish_reason for one in completions],
            "gen_ai.usage.input_tokens": usage["prompt_tokens"],
            "gen_ai.usage.output_tokens": sum(done["tokens"]),
            "mixlm.method": asked.tasks[0].settings.method,
            "mixlm.unit": asked.ensemble.unit.name,
            "mixlm.generation.generation": len(asked.tasks),
            "mixlm.stream": asked.stream,
            "mixlm.members": list(names),
            **{f"mixlm.member.{what}": counts for what, counts in done.items()},
            "mixlm.guesses.checked": usage["mixlm"]["checked"],
            "mixlm.guesses.accepted": usage["mixlm"]["accepted"],
        }
        return attributes if closed is None else {**attributes, "mixlm.closed": closed}

    def _chunk_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk"} if self._chat else self._head

    def _chunk(
        self,
        index: int,
        content: Any,
        mixlm: Mapping[str, Any],
        *,
        logprobs: Mapping[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> bytes:
        choice = {
            "index": index,
            "delta" if self._chat else "text": content,
            "finish_reason": finish_reason,
            "logprobs": logprobs,
            "mixlm": mixlm,
        }
        chunk = {**self._chunk_head(), "choices": [choice]}
        if self._asked.include_usage:
            chunk["usage"] = None
        return event(chunk)

    def _content(self, index: int, completion: Completion) -> dict[str, Any]:
        if self._chat:
            return {"message": {"role": "assistant", "content": completion.text, "refusal": None}}
        return {"text": self._echo(index) + completion.text}

    def _echo(self, index: int) -> str:
        return self._asked.echo[index // self._asked.n] if self._asked.echo else ""

    def _shown(self, index: int, completion: Completion) -> Sequence[Token]:
        """Return the tokens whose log-probabilities are told: with a prompt's, also the end, which clients count on."""
        if not completion.prompt:
            return completion.tokens
        self._offsets[index] = 0
        return [*completion.prompt, *completion.tokens, *((completion.end,) if completion.end else ())]

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._asked.logprobs:
            return None
        if self._chat:
            return {"content": [_told(one) for one in tokens], "refusal": None}
        offsets = []
        for one in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(one.text)
        return {
            "tokens": [one.text for one in tokens],
            "token_logprobs": [None if isnan(one.logprob) else _finite(one.logprob) for one in tokens],
            "top_logprobs": [_likeliest(one) for one in tokens] if self._asked.alternatives else None,
            "text_offset": offsets,
        }


def _told(token: Token) -> shapes.TokenLogprob:
    """Return a token and its alternatives as a chat reply has them."""
    others: list[shapes.TopLogprob] = [
        {"token": _spelled(one.data), "logprob": _finite(one.logprob), "bytes": list(one.data)}
        for one in token.top_logprobs
    ]
    own = {"token": token.text, "logprob": _finite(token.logprob), "bytes": list(token.data)}
    return cast("shapes.TokenLogprob", {**own, "top_logprobs": others})


def _likeliest(token: Token) -> dict[str, float] | None:
    """Return a token's alternatives as a continuation has them: by their text, and the token itself."""
    if isnan(token.logprob):
        return None
    # Ids of one vocabulary may have equal bytes: the likelier one is told.
    found = {_spelled(one.data): _finite(one.logprob) for one in reversed(token.top_logprobs)}
    return {**found, _spelled(token.data): _finite(token.logprob)}


def _spelled(data: bytes) -> str:
    """Return a symbol as text, as OpenAI's API spells what is none: end-of-text, and bytes that are no whole character.

    What differs in bytes differs in this too.
    """
    try:
        return data.decode() if data else _END
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{one:02x}" for one in data)


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)


def _no_work() -> shapes.MemberWork:
    return {
        "prompt_tokens": 0,
        "tokens": 0,
        "forwards": 0,
        "forward_tokens": 0,
        "forward_seconds": 0.0,
        "dropped": 0,
    }


def _counts(forwards: Mapping[str, Sequence[int]]) -> dict[str, int]:
    return {name: len(tokens) for name, tokens in forwards.items()}
