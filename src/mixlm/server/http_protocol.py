"""uvicorn's HTTP protocol, with limits for the time and the size of a request's head."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mixlm.server.api_errors import ApiError
from mixlm.server.json_encoding import to_json


class LimitedHttpProtocol(HttpToolsProtocol):
    """Closes connections whose request head is too slow or too large; uvicorn's own protocol has no such limits.

    Attributes:
        head_timeout: Seconds for a request head to arrive.
        max_head_bytes: Size of a request head, and of a body's trailers.
    """

    head_timeout = 10.0
    max_head_bytes = 1 << 16
    _timer: asyncio.TimerHandle | None = None
    # Of the current head: of the fields that the parser returned, and of all data. It holds back incomplete fields.
    _field_bytes = _received_bytes = 0
    _message_ended = False

    @property
    def _head_bytes(self) -> int:
        in_head = self.scope is not None and "path" not in self.scope
        return max(self._field_bytes, self._received_bytes if in_head else 0)

    def connection_made(self, transport: Any) -> None:
        """Start the timer for the first request."""
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        """Process data; the timer runs while no complete head has arrived."""
        self._message_ended = False
        super().data_received(data)
        if not self._message_ended:  # else not all of it is the current head
            self._received_bytes += len(data)
        if self._head_bytes > self.max_head_bytes and not self.transport.is_closing():
            self.send_400_response("")
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self._timer is None:
            self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._stop_timer()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Start a head."""
        self._field_bytes = self._received_bytes = 0
        super().on_message_begin()

    def on_message_complete(self) -> None:
        """End a request."""
        self._message_ended = True
        super().on_message_complete()

    def on_url(self, url: bytes) -> None:
        """Add to the request target. Raises ValueError, which ends the parser, for a head that is too large."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a header. Raises ValueError, which ends the parser, for a head that is too large."""
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def send_400_response(self, msg: str) -> None:
        """Refuse a request that cannot be parsed, with 431 if its head is too large, and close the connection."""
        if self._head_bytes <= self.max_head_bytes:
            super().send_400_response(msg)
            return
        if self.cycle is None or self.cycle.response_complete:
            error = ApiError(431, f"the head has more than {self.max_head_bytes} bytes", code="head_too_large")
            body = to_json(error.body())
            head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\n" + head.encode() + body)
        self.transport.close()

    def _count(self, size: int) -> None:
        self._field_bytes += size
        if self._field_bytes > self.max_head_bytes:
            raise ValueError("the head is too large")

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self.head_timeout, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
