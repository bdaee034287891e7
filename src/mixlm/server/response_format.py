"""What an API makes of completions: whole responses, and the events of streams."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from mixlm.server.api_errors import ApiError
from mixlm.server.request_parsing import ParsedRequest
from mixlm.types import Completion, Token


class ResponseFormat(Protocol):
    """Builds the response to one request. Events are bytes, as they are sent.

    Attributes:
        response_id: Of the response.
    """

    response_id: str

    def response(self, completions: Sequence[Completion]) -> bytes:
        """Return the complete response, as JSON. completions: in the order of the tasks."""
        ...

    def first_chunks(self) -> list[bytes]:
        """Return the events before any token."""
        ...

    def token_chunks(self, index: int, token: Token, forwards: Mapping[str, Sequence[int]]) -> list[bytes]:
        """Return the events of one token.

        Args:
            index: Of the completion.
            token: The token.
            forwards: Each member's passes since the previous event, with the tokens of each.
        """
        ...

    def final_chunks(self, index: int, completion: Completion, forwards: Mapping[str, Sequence[int]]) -> list[bytes]:
        """Return the events at the end of one completion."""
        ...

    def last_chunks(self, completions: Sequence[Completion]) -> list[bytes]:
        """Return the events at the end of the stream."""
        ...

    def error_chunks(self, error: ApiError) -> list[bytes]:
        """Return the events of an error in a stream that has begun."""
        ...


FormatFactory = Callable[[ParsedRequest, str], ResponseFormat]
