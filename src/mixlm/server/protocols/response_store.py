"""Responses that can be continued: the newest ones, in memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mixlm.server.api_errors import ApiError
from mixlm.server.json_encoding import to_json


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response and its conversation.

    Attributes:
        client: Who may read it: the name of an API key, or an address.
        response: As it was sent.
        messages: The conversation with the response, in the form of chat completions, without instructions.
        size: Bytes of both as JSON.
    """

    client: str
    response: Mapping[str, Any]
    messages: list[dict[str, Any]]
    size: int


class ResponseStore:
    """The newest responses, by their ids: at most `max_bytes` of them, as JSON. Its methods are thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._by_id: OrderedDict[str, StoredResponse] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, client: str, response: Mapping[str, Any], messages: list[dict[str, Any]]) -> None:
        """Store a response, whose id is its own."""
        stored = StoredResponse(client, response, messages, len(to_json(response)) + len(to_json(messages)))
        with self._lock:
            self._by_id[response["id"]] = stored
            self._num_bytes += stored.size
            while self._num_bytes > self._max_bytes:
                self._num_bytes -= self._by_id.popitem(last=False)[1].size

    def get(self, response_id: str, client: str, param: str | None = None) -> StoredResponse:
        """Return a client's response. Raises ApiError where there is none. param: the field with the id."""
        stored = self._by_id.get(response_id)
        if stored is None or stored.client != client:
            message = f"there is no response {response_id[:80]!r}; only the newest are kept, and none with store: false"
            raise ApiError(404 if param is None else 400, message, param=param, code="previous_response_not_found")
        return stored

    def remove(self, response_id: str, client: str) -> None:
        """Forget a client's response. Raises ApiError where there is none."""
        with self._lock:
            self._num_bytes -= self.get(response_id, client).size
            del self._by_id[response_id]
