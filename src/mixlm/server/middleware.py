"""What every request passes: host and API key checks, the request id, error responses, security headers, the log.

The log never holds prompts or generated text.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mixlm.server.api_errors import ApiError, to_api_error
from mixlm.server.api_keys import key_holder
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
_TRACED_PATHS = ("/v1/", "other")
_QUIET_PATHS = ("/health", "/ready", "/metrics")
# The status in the log when the client left before a response was sent; nginx uses the same.
_CLIENT_CLOSED_REQUEST = 499
_SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
}


@dataclass(frozen=True)
class RequestMiddleware:
    """ASGI middleware around the application, whose errors become responses.

    routes: other paths count as "other" in metrics and logs. keys: names by hashes; without any, anyone may ask. hosts:
    names that a Host header may have; None for any.
    """

    app: ASGIApp
    routes: Collection[str]
    keys: Mapping[str, str]
    metrics: ServerMetrics
    hosts: Collection[str] | None
    tracer: RequestTracer | None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; scopes other than HTTP pass through."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        if path.endswith("/") and path != "/":
            scope = {**scope, "path": path[:-1]}  # answered at once: clients do not follow redirects of a POST
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        record = RequestRecord(
            request_id=request_id if _REQUEST_ID.fullmatch(request_id) else secrets.token_hex(12),
            client=scope["client"][0] if scope.get("client") else "unknown",
            method=scope["method"],
            path=scope["path"] if scope["path"] in self.routes else "other",
            field_names=FIELD_NAMES.get(scope["path"], {}),
        )
        scope.update({"mixlm.record": record, "app": self})  # without an app, the router answers unknown paths itself
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update({"x-request-id": record.request_id, **_SECURITY_HEADERS})
            await send(message)

        try:
            self._authorize(scope, headers, record)
            await self.app(scope, receive, send_with_headers)
        except Exception as error:
            api_error = to_api_error(error, record.request_id)
            api_error.rename(record.field_names)
            record.error = api_error.code
            self.metrics.count_error(api_error.status, api_error.code)
            if status == 0:
                form = anthropic_error if scope["path"] == MESSAGES_PATH else ApiError.body
                # Of a body that is too slow or too large, the rest is not read.
                close = {"connection": "close"} if api_error.status in (408, 413) else {}
                response = Response(
                    to_json(form(api_error)), api_error.status, {**api_error.headers, **close}, "application/json"
                )
                await response(scope, receive, send_with_headers)
        finally:
            self._finish(record, headers, status or _CLIENT_CLOSED_REQUEST)

    def _authorize(self, scope: Scope, headers: Headers, record: RequestRecord) -> None:
        """Identify the client. Raises ApiError for a foreign Host header, and for an unknown key."""
        if self.hosts is not None and _host_name(headers.get("host", "")) not in self.hosts:
            raise ApiError(403, "this server does not answer under that host name", code="unknown_host")
        if not self.keys or scope["path"] in OPEN_PATHS:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if not key and scope["path"] == MESSAGES_PATH:
            scheme, key = "bearer", headers.get("x-api-key", "")
        holder = key_holder(self.keys, key.strip()) if scheme.lower() == "bearer" else None
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
        self.metrics.responses.labels(record.path, str(status)).inc()
        self.metrics.response_seconds.labels(record.path).observe(time.monotonic() - record.arrived)
        if self.tracer is not None and record.path.startswith(_TRACED_PATHS):
            record.trace_id = self.tracer.record(record, status, headers)
        level = logging.DEBUG if record.path in _QUIET_PATHS and status < 400 else logging.INFO
        _log.log(level, "request", extra={"fields": record.log_fields(status)})


def _host_name(header: str) -> str:
    """Return a Host header without its port, in lower case."""
    name = header[1:].partition("]")[0] if header.startswith("[") else header.partition(":")[0]
    return name.lower()
