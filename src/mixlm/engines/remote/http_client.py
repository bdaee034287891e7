"""JSON over HTTP to one server: kept connections, bounded in number; time limits, one retry, waiting when told to.

An event loop in a thread of its own sends what is asked, so that many requests are on their way at once.
The key, if there is one, is sent to the server that the user named and appears nowhere else, in no error and no log.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
import urllib.request
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx

from mixlm.engines.remote.http_transport import HttpTransport
from mixlm.errors import EngineError

_BUSY = (429, 503)
_T = TypeVar("_T")


@dataclass(frozen=True)
class ClientLimits:
    """Seconds to wait for a connection, for an answer, and in all while a server says that it is busy; connections."""

    connect: float = 5.0
    answer: float = 120.0
    busy: float = 60.0
    connections: int = 64


@dataclass(frozen=True)
class ApiKey:
    """A server's key, if there is one; it is not shown."""

    value: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class HttpResponse:
    """What a server said. anew: whether a connection was made for it, so that another server may have said it."""

    status: int
    value: Any
    anew: bool


class EventLoopThread:
    """An event loop in a thread of its own, which ends with `close` or with the program."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="mixlm-wire", daemon=True)
        self._thread.start()

    def start(self, task: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Begin a task; its result comes with the future."""
        return asyncio.run_coroutine_threadsafe(task, self._loop)

    def wait(self, task: Coroutine[Any, Any, _T]) -> _T:
        """Run a task and return its result. Not from within the loop."""
        return self.start(task).result()

    def close(self, last: Coroutine[Any, Any, None]) -> None:
        """Run a last task and end, without waiting for it: whoever drops the last reference may be the loop itself."""

        async def ending() -> None:
            await last
            self._loop.stop()

        try:
            asyncio.run_coroutine_threadsafe(ending(), self._loop)
        except RuntimeError:  # ended before
            last.close()

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.close()


class HttpClient:
    """The connections to one server. Raises EngineError, which names the server, when there is no answer.

    loop: where the requests are sent from; several wires may share one. closing: what else is to be closed with it.
    """

    def __init__(
        self, base: str, loop: EventLoopThread, key: str | None = None, limits: ClientLimits | None = None
    ) -> None:
        self.base = base
        self.loop = loop
        self.limits = limits or ClientLimits()
        self.key = ApiKey(key)
        self.closing: list[Callable[[], None]] = []
        # Answers are short, and unpacking them would cost more than they weigh.
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
        # Waiting for a free connection has no limit of its own: requests queue there.
        timeout = httpx.Timeout(self.limits.answer, connect=self.limits.connect, pool=None)
        tls = httpx.create_ssl_context() if base.startswith("https:") else None
        self._own = None if _proxied(base) else HttpTransport(self.limits.connections, tls)
        pool = httpx.Limits(max_connections=self.limits.connections)
        self._client = httpx.AsyncClient(
            base_url=base, headers=headers, timeout=timeout, transport=self._own, limits=pool
        )

    async def close(self) -> None:
        """Close the connections."""
        for one in self.closing:
            one()
        await self._client.aclose()

    def get(self, path: str) -> HttpResponse:
        """Ask for a path, and wait for the answer."""
        return self.loop.wait(self.ask("GET", path))

    def post(self, path: str, body: dict[str, Any]) -> HttpResponse:
        """Send a body and return the answer, whatever its status, except where the server is busy."""
        return self.loop.wait(self.ask("POST", path, body))

    async def ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, seconds: float | None = None
    ) -> HttpResponse:
        """Send a request and return the answer. seconds: a shorter limit than usual, with no second try."""
        patience = time.monotonic() + (0.0 if seconds else self.limits.busy)
        tries = 0
        extensions: dict[str, Any] = {}
        more: dict[str, Any] = {} if seconds is None else {"timeout": seconds}
        while True:
            tries += 1
            try:
                request = self._client.build_request(method, path, json=body, extensions=dict(extensions), **more)
                # Sending by the client costs as much again: it looks for redirects, cookies and log-ins.
                send = self._client.send if self._own is None else self._own.handle_async_request
                answer = await send(request)
            except httpx.TimeoutException as error:
                limit = self.limits.connect if isinstance(error, httpx.ConnectTimeout) else self.limits.answer
                raise EngineError(f"{self.base} does not answer within {seconds or limit:g} seconds") from error
            except httpx.TransportError as error:
                # Servers close connections that were idle, and nothing was written of an answer that was cut off. Other
                # kept connections are as old, so the second try makes one.
                if tries > 1 or seconds:
                    raise EngineError(f"{self.base} does not answer: {_said(error)}") from error
                extensions = {"anew": True}
                continue
            if answer.status_code not in _BUSY:
                anew = bool(answer.extensions.get("anew", True))
                return HttpResponse(answer.status_code, _parsed(answer, self.base), anew)
            wait = _wait(answer, tries)
            if time.monotonic() + wait > patience:
                raise EngineError(
                    f"{self.base} is busy (status {answer.status_code}), for {wait:.0f} more seconds at least"
                )
            await asyncio.sleep(wait)


def _proxied(base: str) -> bool:
    """Whether the environment has a proxy stand in front of the server; httpx's own connections then go through it."""
    url = httpx.URL(base)
    proxies = urllib.request.getproxies()
    return bool(proxies.get(url.scheme) or proxies.get("all")) and not urllib.request.proxy_bypass(url.host)


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
