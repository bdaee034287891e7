"""What every request passes: who may ask, what it is known by, how errors look, and a line in the log.

The log never holds what was asked or written.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Collection
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mixlm.errors import MixlmError
from mixlm.server.api_errors import ApiError, of_error
from mixlm.server.api_keys import Keys
from mixlm.server.metrics import Metrics
from mixlm.server.responses import as_json
from mixlm.server.tracing import Ended, Traces

_log = logging.getLogger("mixlm.server")
_REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
# Files of the page, and what a supervisor asks.
OPEN = ("/", "/page.css", "/page.js", "/icon.svg", "/health", "/ready")
TRACED = ("/v1/models", "/v1/chat/completions", "/v1/completions", "other")
_QUIET = ("/health", "/ready", "/metrics")
# What logs say of a response that nobody was there for any more, as other servers do.
_NOBODY = 499
_SAFE = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
}


class Guard:
    """ASGI middleware. hosts: names that a Host header may have; None for any."""

    def __init__(
        self, app: ASGIApp, keys: Keys, metrics: Metrics, hosts: Collection[str] | None, traces: Traces | None = None
    ) -> None:
        self._app = app
        self._keys = keys
        self._metrics = metrics
        self._hosts = hosts
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; anything that is none goes through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        wanted = headers.get("x-request-id", "")
        identity = wanted if _REQUEST_ID.fullmatch(wanted) else secrets.token_hex(12)
        note: dict[str, Any] = {"request": identity, "arrived": time.monotonic(), "client": _address(scope)}
        scope["mixlm.note"] = note
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                sent = MutableHeaders(scope=message)
                sent["x-request-id"] = identity
                for name, value in _SAFE.items():
                    sent[name] = value
            await send(message)

        try:
            self._check(scope, headers, note)
            await self._app(scope, receive, sending)
        except Exception as error:
            problem = _not_there(error) if isinstance(error, HTTPException) else of_error(error)
            if problem.status >= 500 and not isinstance(error, MixlmError | ApiError):
                _log.exception("a request failed", extra={"fields": {"request": identity}})
            note["error"] = problem.code
            self._metrics.problem(problem.status, problem.code)
            if status == 0:
                await _respond(problem, sending)
        finally:
            self._write_down(scope, headers, note, status)

    def _check(self, scope: Scope, headers: Headers, note: dict[str, Any]) -> None:
        """Say who asks. Raises ApiError for a host that is not ours, and for a key that is not known."""
        if self._hosts is not None and _host(headers.get("host", "")) not in self._hosts:
            raise ApiError(403, "this server does not answer under that host name", code="unknown_host")
        if not self._keys or scope["path"] in OPEN:
            return
        scheme, _, presented = headers.get("authorization", "").partition(" ")
        holder = self._keys.holder(presented.strip()) if scheme.lower() == "bearer" else None
        if holder is None:
            why = "this API key is not known" if presented else "an API key is needed"
            raise ApiError(
                401,
                f"{why}: send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        note["client"] = holder

    def _write_down(self, scope: Scope, headers: Headers, note: dict[str, Any], status: int) -> None:
        status = status or _NOBODY
        arrived, steps = note.pop("arrived"), note.pop("steps", None)
        seconds = time.monotonic() - arrived
        # A path that is no route is the client's invention: counting by it would let anyone fill the memory.
        path = scope["path"] if scope["path"] in scope.get("mixlm.paths", ()) else "other"
        self._metrics.response(path, status, seconds)
        if self._traces is not None and path in TRACED:
            ended = Ended(scope["method"], path, status, arrived, note["request"], note.get("error"), steps)
            note["trace"] = self._traces.request(ended, headers)
        level = logging.DEBUG if path in _QUIET and status < 400 else logging.INFO
        fields = {"method": scope["method"], "path": path, "status": status, "seconds": round(seconds, 4), **note}
        _log.log(level, "request", extra={"fields": fields})


def _not_there(error: HTTPException) -> ApiError:
    """Return the answer to a path or a method that there is not."""
    words = str(error.detail).lower()
    return ApiError(error.status_code, words, code=words.replace(" ", "_"), headers=error.headers)


async def _respond(problem: ApiError, send: Send) -> None:
    body = as_json(problem.body())
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in problem.headers.items()]
    if problem.status in (408, 413):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _address(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else "unknown"


def _host(header: str) -> str:
    """Return a Host header without its port, in lower case."""
    name = header[1:].partition("]")[0] if header.startswith("[") else header.partition(":")[0]
    return name.lower()
