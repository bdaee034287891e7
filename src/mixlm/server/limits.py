"""What a server allows."""

from __future__ import annotations

from dataclasses import dataclass, fields

from mixlm.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a server allows. Times are seconds.

    at_once: replies written together. queue: replies that may wait beside them. timeout: from a request's arrival to
    the end of its reply. grace: for replies to finish once the server is told to stop. body: bytes of a request.
    prompt: characters of one prompt, or of one conversation. read: for a request's body to arrive. send: for a client
    to take what was sent to it.
    """

    at_once: int = 16
    queue: int = 64
    timeout: float = 300.0
    grace: float = 30.0
    body: int = 1 << 20
    prompt: int = 200_000
    read: float = 10.0
    send: float = 30.0

    def __post_init__(self) -> None:
        for one in fields(self):
            value, least = getattr(self, one.name), 0 if one.name in ("queue", "grace") else 1e-3
            if not least <= value < 2**40:
                raise ConfigError(f"{one.name} is {value}; it must be {'0 or more' if not least else 'more than 0'}")

    @property
    def most(self) -> int:
        """Replies that are in progress or waiting, at most."""
        return self.at_once + self.queue
