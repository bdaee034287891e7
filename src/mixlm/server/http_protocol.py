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
    # Of the current head: the bytes of the fields that the parser returned, and of the data that is its alone.
    _field_bytes = 0
    _received_bytes = 0
    _in_head = False
    _in_message = False
    _num_heads = 0

    def connection_made(self, transport: Any) -> None:
        """Start the timer for the first request."""
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        """Process data; the timer runs while no complete head has arrived."""
        # The parser holds back an incomplete field, so its fields alone do not bound a head.
        continues, begins, num_heads = self._in_head, not self._in_message, self._num_heads
        super().data_received(data)
        if continues and self._num_heads == num_heads:
            self._received_bytes += len(data)
        else:
            self._received_bytes = len(data) if begins and self._num_heads == num_heads + 1 else 0
        if self._in_head and self._received_bytes > self.max_head_bytes:
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
        self._field_bytes, self._in_head, self._in_message = 0, True, True
        self._num_heads += 1
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Add to the request target. Raises ValueError, which ends the parser, for a head that is too large."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a header. Raises ValueError, which ends the parser, for a head that is too large."""
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """End a head, and start the request."""
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """End a request."""
        self._in_message = False
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse a request that cannot be parsed, with 431 if its head is too large, and close the connection."""
        too_large = self._field_bytes > self.max_head_bytes or (
            self._in_head and self._received_bytes > self.max_head_bytes
        )
        if not too_large:
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
