"""JSON and server-sent events as bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import pydantic_core


def to_json(value: Any) -> bytes:
    """Return a value as JSON in UTF-8. Lone surrogates, which UTF-8 cannot encode, are escaped."""
    try:
        return pydantic_core.to_json(value, inf_nan_mode="null")
    except pydantic_core.PydanticSerializationError:
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def server_sent_event(value: Any) -> bytes:
    """Return a value as a server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


def named_events(values: Iterable[Mapping[str, Any]]) -> list[bytes]:
    """Return values as server-sent events, each named by its type."""
    return [b"event: " + value["type"].encode() + b"\n" + server_sent_event(value) for value in values]
