"""JSON and server-sent events as bytes."""

from __future__ import annotations

import json
from typing import Any

import pydantic_core


def to_json(value: Any) -> bytes:
    """Return a value as JSON in UTF-8. Lone surrogates, which UTF-8 cannot encode, are escaped."""
    try:
        return pydantic_core.to_json(value, inf_nan_mode="null")
    except pydantic_core.PydanticSerializationError:
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def server_sent_event(value: Any, name: str = "") -> bytes:
    """Return a value as a server-sent event. name: of the event, if it has one."""
    head = b"event: " + name.encode() + b"\n" if name else b""
    return head + b"data: " + to_json(value) + b"\n\n"
