"""The record of one request, from which its log line, its metrics and its trace are made."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mixlm.server.model_thread import CancelReason


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """What the server knows of one request. It never holds the prompt or the generated text.

    Times are values of `time.monotonic`, None for what has not happened.

    Attributes:
        request_id: The client's `X-Request-Id`, or a random one.
        client: Name of the API key, or the client's address.
        path: A path of the API, or "other".
        field_names: What the client calls fields of a chat completion.
        arrived: When the head of the request was read.
        prepared: When its prompts were encoded.
        started: When its first generation left the queue.
        first_token: When its first token was sampled.
        completions: Number of completions requested.
        finished: Number of completions that were finished.
        tokens: Number of tokens generated.
        error: Code of the error in the response.
        trace_id: Of the exported trace, in hexadecimal.
    """

    request_id: str
    client: str
    method: str
    path: str
    field_names: Mapping[str, str] = field(default_factory=dict)
    arrived: float = field(default_factory=time.monotonic)
    prepared: float | None = None
    started: float | None = None
    first_token: float | None = None
    model: str | None = None
    completions: int | None = None
    finished: int | None = None
    tokens: int | None = None
    error: str | None = None
    cancelled: CancelReason | None = None
    trace_id: str | None = None
    trace_attributes: dict[str, Any] = field(default_factory=dict)

    def log_fields(self, status: int) -> dict[str, Any]:
        """Return the fields of the log line; the request is over. status: of the HTTP response."""
        fields = {
            "method": self.method,
            "path": self.path,
            "status": status,
            "seconds": time.monotonic() - self.arrived,
            "request": self.request_id,
            "client": self.client,
            "model": self.model,
            "completions": self.completions,
            "replies": self.completions,
            "queued": _seconds(self.prepared, self.started),
            "first": _seconds(self.arrived, self.first_token),
            "tokens": self.tokens,
            "finished": self.finished,
            "cancelled": self.cancelled,
            "closed": self.cancelled,
            "error": self.error,
            "trace": self.trace_id,
        }
        return {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in fields.items()
            if value is not None
        }


def _seconds(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start
