"""What every request passes: host and API key checks, the request id, error responses, security headers, the log.

The log never holds prompts or generated text.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Collection, Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mixlm.errors import MixlmError
from mixlm.server.api_errors import ApiError, to_api_error
from mixlm.server.api_keys import ApiKeys
from mixlm.server.json_encoding import to_json
from mixlm.server.metrics import ServerMetrics
from mixlm.server.page_files import PAGE_FILES
from mixlm.server.protocols import FIELD_NAMES, MESSAGES_PATH
from mixlm.server.protocols.messages import anthropic_error
from mixlm.server.request_record import RequestRecord
from mixlm.server.tracing import RequestTracer

_log = logging.getLogger("mixlm.server")
_REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
# Paths that need no API key: the files of the page, and health checks.
OPEN_PATHS = frozenset((*PAGE_FILES, "/health", "/ready"))
TRACED_PATHS = ("/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "other")
_QUIET_PATHS = ("/health", "/ready", "/metrics")
# The status in the log when the client left before a response was sent; nginx uses the same.
_CLIENT_CLOSED_REQUEST = 499
_SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
}


class RequestMiddleware:
    """ASGI middleware around the application.

    Args:
        app: The application. Errors that it raises become responses.
        routes: The paths of the application; all others count as "other" in metrics and logs.
        keys: The accepted API keys.
        metrics: Where responses and errors are counted.
        hosts: Names that a Host header may have; None for any.
        tracer: Where requests are traced; None for no traces.
    """

    def __init__(
        self,
        app: ASGIApp,
        routes: Collection[str],
        keys: ApiKeys,
        metrics: ServerMetrics,
        hosts: Collection[str] | None,
        tracer: RequestTracer | None,
    ) -> None:
        self._app = app
        self._routes = routes
        self._keys = keys
        self._metrics = metrics
        self._hosts = hosts
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; scopes other than HTTP pass through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        if path.endswith("/") and path != "/":
            scope = {**scope, "path": path[:-1]}  # answered at once: clients do not follow redirects of a POST
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        record = RequestRecord(
            request_id=request_id if _REQUEST_ID.fullmatch(request_id) else secrets.token_hex(12),
            client=_address(scope),
            method=scope["method"],
            path=scope["path"] if scope["path"] in self._routes else "other",
        )
        scope["mixlm.record"] = record
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                response_headers = MutableHeaders(scope=message)
                response_headers["x-request-id"] = record.request_id
                for name, value in _SECURITY_HEADERS.items():
                    response_headers[name] = value
            await send(message)

        try:
            self._authorize(scope, headers, record)
            await self._app(scope, receive, send_with_headers)
        except Exception as error:
            api_error = _routing_error(error) if isinstance(error, HTTPException) else to_api_error(error)
            api_error = api_error.renamed(FIELD_NAMES.get(scope["path"], {}))
            if api_error.status >= 500 and not isinstance(error, MixlmError | ApiError):
                _log.exception("a request failed", extra={"fields": {"request": record.request_id}})
            record.error = api_error.code
            self._metrics.count_error(api_error.status, api_error.code)
            if status == 0:
                form = anthropic_error if scope["path"] == MESSAGES_PATH else ApiError.body
                await _send_error(api_error, form(api_error), send_with_headers)
        finally:
            self._finish(record, headers, status or _CLIENT_CLOSED_REQUEST)

    def _authorize(self, scope: Scope, headers: Headers, record: RequestRecord) -> None:
        """Identify the client. Raises ApiError for a foreign Host header, and for an unknown key."""
        if self._hosts is not None and _host_name(headers.get("host", "")) not in self._hosts:
            raise ApiError(403, "this server does not answer under that host name", code="unknown_host")
        if not self._keys or scope["path"] in OPEN_PATHS:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if not key and scope["path"] == MESSAGES_PATH:
            scheme, key = "bearer", headers.get("x-api-key", "")
        holder = self._keys.holder(key.strip()) if scheme.lower() == "bearer" else None
        if holder is None:
            why = "this API key is not known" if key else "an API key is needed"
            raise ApiError(
                401,
                f"{why}: send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        record.client = holder

    def _finish(self, record: RequestRecord, headers: Headers, status: int) -> None:
        """Count, trace and log a request that is over."""
        self._metrics.count_response(record.path, status, time.monotonic() - record.arrived)
        if self._tracer is not None and record.path in TRACED_PATHS:
            record.trace_id = self._tracer.record(record, status, headers)
        level = logging.DEBUG if record.path in _QUIET_PATHS and status < 400 else logging.INFO
        _log.log(level, "request", extra={"fields": record.log_fields(status)})


def _routing_error(error: HTTPException) -> ApiError:
    """Return the response to an unknown path or method."""
    detail = str(error.detail).lower()
    return ApiError(error.status_code, detail, code=detail.replace(" ", "_"), headers=error.headers)


async def _send_error(error: ApiError, content: Mapping[str, Any], send: Send) -> None:
    body = to_json(content)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in error.headers.items()]
    if error.status in (408, 413):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _address(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else "unknown"


def _host_name(header: str) -> str:
    """Return a Host header without its port, in lower case."""
    name = header[1:].partition("]")[0] if header.startswith("[") else header.partition(":")[0]
    return name.lower()
