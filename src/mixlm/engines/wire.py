"""JSON over HTTP to one server: kept connections, bounded in number; time limits, one retry, waiting when told to.

The key, if there is one, is sent to the server that the user named and appears nowhere else, in no error and no log.
"""

from __future__ import annotations

import json
import random
import threading
import time
from dataclasses import dataclass
from typing import Any

import httpx

from mixlm.errors import EngineError

_BUSY = (429, 503)


@dataclass(frozen=True)
class Limits:
    """Seconds to wait for a connection, for an answer, and in all while a server says that it is busy; connections."""

    connect: float = 5.0
    answer: float = 120.0
    busy: float = 60.0
    connections: int = 16


@dataclass(frozen=True)
class Answer:
    """What a server said. anew: whether a connection was made for it, so that another server may have said it."""

    status: int
    value: Any
    anew: bool


class Wire:
    """The connections to one server. Raises EngineError, which names the server, when there is no answer."""

    def __init__(self, base: str, key: str | None = None, limits: Limits | None = None) -> None:
        self.base = base
        self._limits = limits or Limits()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = httpx.Timeout(self._limits.answer, connect=self._limits.connect)
        pool = httpx.Limits(max_connections=self._limits.connections)
        # Waiting for a free connection has no limit of its own: requests queue here.
        timeout = httpx.Timeout(timeout.read, connect=timeout.connect, pool=None)
        self._client = httpx.Client(base_url=base, headers=headers, timeout=timeout, limits=pool)
        self._made = threading.local()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def get(self, path: str, *, seconds: float | None = None) -> Answer:
        """Ask for a path. seconds: a shorter limit than usual, with no second try."""
        return self._ask("GET", path, None, seconds)

    def post(self, path: str, body: dict[str, Any]) -> Answer:
        """Send a body and return the answer, whatever its status, except where the server is busy."""
        return self._ask("POST", path, body, None)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None, seconds: float | None) -> Answer:
        patience = time.monotonic() + (0.0 if seconds else self._limits.busy)
        tries = 0
        while True:
            tries += 1
            self._made.anew = False
            try:
                answer = self._once(method, path, body, seconds)
            except httpx.TimeoutException as error:
                limit = self._limits.connect if isinstance(error, httpx.ConnectTimeout) else self._limits.answer
                raise EngineError(f"{self.base} does not answer within {seconds or limit:g} seconds") from error
            except httpx.TransportError as error:
                # Servers close connections that were idle, and nothing was written of an answer that was cut off.
                if tries > 1 or seconds:
                    raise EngineError(f"{self.base} does not answer: {_said(error)}") from error
                continue
            if answer.status_code not in _BUSY:
                return Answer(answer.status_code, _parsed(answer, self.base), self._made.anew)
            wait = _wait(answer, tries)
            if time.monotonic() + wait > patience:
                raise EngineError(
                    f"{self.base} is busy (status {answer.status_code}), for {wait:.0f} more seconds at least"
                )
            time.sleep(wait)

    def _once(self, method: str, path: str, body: dict[str, Any] | None, seconds: float | None) -> httpx.Response:
        more: dict[str, Any] = {} if seconds is None else {"timeout": seconds}
        return self._client.request(method, path, json=body, extensions={"trace": self._trace}, **more)

    def _trace(self, event: str, _info: dict[str, Any]) -> None:
        if event == "connection.connect_tcp.complete":
            self._made.anew = True


def _wait(answer: httpx.Response, tries: int) -> float:
    """Return how long the server asks to wait; else ever longer, and never for all at the same time."""
    try:
        return max(float(answer.headers["Retry-After"]), 0.0)
    except (KeyError, ValueError):
        return float(min(0.25 * 2**tries, 8.0) * random.uniform(0.5, 1.0))


def _parsed(answer: httpx.Response, base: str) -> Any:
    """Return the JSON of an answer; of one that is an error, its text where it is no JSON."""
    try:
        return json.loads(answer.content)
    except ValueError:
        if answer.status_code >= 400:
            return answer.text[:200]
        raise EngineError(f"{base} answers with what is no JSON: {answer.text[:80]!r}") from None


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__
