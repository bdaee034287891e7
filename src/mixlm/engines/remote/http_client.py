"""JSON over HTTP to one server: kept connections, bounded in number; time limits, one retry, back-off when told to.

An event loop in a thread of its own sends all requests, so that many are in flight at once. The key, if there is one,
is sent to the server that the user named and appears nowhere else, in no error and no log.

A member is asked for every token, so what a request costs here counts. On one core, with 32 requests in flight and 5 kB
of JSON each way, a request takes 0.8 ms of processor time, 0.26 ms of it for JSON; over h11 it took 1.1 to 1.3 ms.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import ssl
import threading
import time
import urllib.request
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import aiohttp
import certifi

from mixlm.errors import EngineError

_BUSY = (429, 503)
_KEEP_IDLE = 24 * 3600.0  # seconds: the server decides when an idle connection is closed
_T = TypeVar("_T")
_time_limit: ContextVar[float | None] = ContextVar("time_limit", default=None)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Give each request of the block a shorter time limit than usual, waiting included, and no retry."""
    token = _time_limit.set(seconds)
    try:
        yield
    finally:
        _time_limit.reset(token)


@dataclass(frozen=True)
class ClientLimits:
    """Limits of an `HttpClient`.

    Args:
        connect: seconds to wait for a connection.
        response: seconds to wait for a response.
        busy: seconds to keep retrying while a server says that it is busy.
        connections: connections at once; further requests wait for one, first come first served.
        first_retry: seconds until a replica that failed is tried again; each further time it is twice as long.
    """

    connect: float = 5.0
    response: float = 120.0
    busy: float = 60.0
    connections: int = 64
    first_retry: float = 0.5


class HttpResponse(NamedTuple):
    """A response: its status and its JSON."""

    status: int
    value: Any


class EventLoopThread:
    """An event loop in a thread of its own, which ends with `close` or with the program."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name="mixlm-http", daemon=True)
        self._thread.start()

    def submit(self, task: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Start a task; the future brings its result."""
        return asyncio.run_coroutine_threadsafe(task, self._loop)

    def run(self, task: Coroutine[Any, Any, _T]) -> _T:
        """Run a task and return its result. Not to be called within the loop."""
        return self.submit(task).result()

    def close(self, last_task: Coroutine[Any, Any, None]) -> None:
        """Run a last task and stop, without waiting for it: the caller may be the loop itself."""

        async def finish() -> None:
            await last_task
            self._loop.stop()

        try:
            asyncio.run_coroutine_threadsafe(finish(), self._loop)
        except RuntimeError:  # it has stopped before
            last_task.close()

    def _run_loop(self) -> None:
        self._loop.run_forever()
        self._loop.close()


class HttpClient:
    """The connections to one server. To be created and used in the event loop that sends its requests.

    connections_made: how many so far; behind each may be another server. unchecked: by number, the tasks that made
    those that no `ModelServer.check` counts for yet.

    Args:
        base_url: the server's URL, without the path of a request.
        key: sent as a bearer token, None for none.
    """

    def __init__(self, base_url: str, key: str | None, limits: ClientLimits) -> None:
        self.base_url = base_url
        self.key = key
        self.limits = limits
        self.connections_made = 0
        self.unchecked: dict[int, asyncio.Task[Any]] = {}
        self._proxy = _proxy_of(base_url)
        # Responses are short, and decompressing them would cost more than it saves.
        self._headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._capacity = asyncio.Semaphore(limits.connections)  # waiting for it has no time limit
        tls = _tls_context() if base_url.startswith("https:") else True
        self._session = self._open_session(tls)
        # A server closes connections that were idle, and others are as old as one that it closed: a retry makes one.
        self._retry_session = self._open_session(tls, force_close=True)

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()
        await self._retry_session.close()

    async def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> HttpResponse:
        """Send a request; retry once, over a new connection, if the connection drops; wait while the server is busy.

        Args:
            body: sent as JSON.

        Returns:
            The response, whatever its status, except 429 and 503.

        Raises:
            EngineError: there is no response, the server stays busy, or what it sends is not JSON. It names the server.
        """
        seconds = _time_limit.get()
        retry_until = time.monotonic() + (0.0 if seconds else self.limits.busy)
        attempts = 0
        session = self._session
        while True:
            attempts += 1
            try:
                status, headers, content = await self._send(session, method, path, body, seconds)
            except TimeoutError as error:
                is_connecting = isinstance(error, aiohttp.ConnectionTimeoutError)
                limit = self.limits.connect if is_connecting else self.limits.response
                raise EngineError(f"{self.base_url} does not answer within {seconds or limit:g} seconds") from error
            except (aiohttp.ClientError, OSError) as error:
                if attempts > 1 or seconds:
                    raise EngineError(f"{self.base_url} does not answer: {_reason(error)}") from error
                session = self._retry_session
                continue
            if status not in _BUSY:
                return HttpResponse(status, _parse(status, content, self.base_url))
            wait = _back_off(headers.get("Retry-After"), attempts)
            if time.monotonic() + wait > retry_until:
                raise EngineError(f"{self.base_url} is busy (status {status}), for {wait:.0f} more seconds at least")
            await asyncio.sleep(wait)

    async def _send(
        self, session: aiohttp.ClientSession, method: str, path: str, body: dict[str, Any] | None, seconds: float | None
    ) -> tuple[int, Any, bytes]:
        """Return status, headers and content of the response."""
        data = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        async with (
            asyncio.timeout(seconds),
            self._capacity,
            session.request(
                method,
                self.base_url + path,
                headers=self._headers,
                proxy=self._proxy,
                allow_redirects=False,
                data=data,
            ) as response,
        ):
            content = await response.read()
        return response.status, response.headers, content

    def count_connection(self) -> None:
        """Note that the current task made a connection."""
        self.connections_made += 1
        task = asyncio.current_task()
        assert task is not None
        self.unchecked[self.connections_made] = task

    async def _on_connection(self, *_: Any) -> None:
        self.count_connection()

    def _open_session(self, tls: ssl.SSLContext | bool, force_close: bool = False) -> aiohttp.ClientSession:
        trace = aiohttp.TraceConfig()
        trace.on_connection_create_end.append(self._on_connection)
        timeout = aiohttp.ClientTimeout(
            total=self.limits.connect + self.limits.response,
            connect=self.limits.connect,
            sock_read=self.limits.response,
        )
        keep_alive = {"force_close": True} if force_close else {"keepalive_timeout": _KEEP_IDLE}
        connector = aiohttp.TCPConnector(
            limit=0, ssl=tls, use_dns_cache=False, resolver=aiohttp.ThreadedResolver(), **keep_alive
        )
        return aiohttp.ClientSession(
            connector=connector, timeout=timeout, cookie_jar=aiohttp.DummyCookieJar(), trace_configs=[trace]
        )


def _proxy_of(base_url: str) -> str | None:
    """Return the URL of the proxy that the environment has in front of a server."""
    url = urlsplit(base_url)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    return proxy if proxy and not urllib.request.proxy_bypass(url.hostname or "") else None


def _tls_context() -> ssl.SSLContext:
    """Return what certificates are verified with: what the environment names, else the usual authorities."""
    if file := os.environ.get("SSL_CERT_FILE"):
        return ssl.create_default_context(cafile=file)
    if folder := os.environ.get("SSL_CERT_DIR"):
        return ssl.create_default_context(capath=folder)
    return ssl.create_default_context(cafile=certifi.where())


def _reason(error: Exception) -> str:
    """Return what went wrong, without aiohttp's description of the connection."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return str(error.certificate_error)
    if isinstance(error, aiohttp.ClientConnectorError):
        return str(error.os_error)
    return str(error) or type(error).__name__


def _back_off(retry_after: str | None, attempts: int) -> float:
    """Return how many seconds the server asks to wait; else ever more, and never the same for all clients."""
    try:
        return max(float(retry_after or ""), 0.0)
    except ValueError:
        return float(min(0.25 * 2**attempts, 8.0) * random.uniform(0.5, 1.0))


def _parse(status: int, content: bytes, base_url: str) -> Any:
    """Return the JSON of a response; of an error that is no JSON, its text."""
    try:
        return json.loads(content)
    except ValueError:
        text = content.decode(errors="replace")
        if status >= 400:
            return text[:200]
        raise EngineError(f"{base_url} sends a response that is not JSON: {text[:80]!r}") from None
