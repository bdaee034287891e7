"""Runs a server: the socket, uvicorn, signals, and the log."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from ipaddress import ip_address
from math import ceil
from types import FrameType

import uvicorn
from prometheus_client import disable_created_metrics

from mixlm.errors import UsageError
from mixlm.server.app import ServerApp
from mixlm.server.http_protocol import LimitedHttpProtocol

_LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")
# How long a connection may be idle between two requests, seconds.
_KEEP_ALIVE_SECONDS = 30
# How long a server may take to stop once its generations have ended, seconds; then the process exits.
_EXIT_SECONDS = 6.0


@dataclass(frozen=True)
class ListenAddress:
    """Where a server listens. extra_hosts: further Host names that requests may have."""

    host: str = "127.0.0.1"
    port: int = 8000
    extra_hosts: tuple[str, ...] = ()

    @property
    def is_loopback(self) -> bool:
        """Whether only programs on this machine can connect."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def allowed_hosts(self) -> Collection[str] | None:
        """The Host names that requests may have; None for any.

        On the loopback address this stops DNS rebinding: a web page that makes a browser call this machine under a
        name of its own. Servers that others can reach have API keys instead.
        """
        return {*_LOOPBACK_HOSTS, self.host, *self.extra_hosts} if self.is_loopback else None

    def bind(self) -> socket.socket:
        """Bind the port, before any model is loaded. Raises UsageError for an address that cannot be bound."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        # asyncio sets TCP_NODELAY only on sockets of this protocol; without it, events would be delayed.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # The system closes connections whose peer vanished or takes no data.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000)
            listener.bind((self.host, self.port))
        except (OSError, OverflowError) as error:
            listener.close()
            why = getattr(error, "strerror", None) or str(error)
            raise UsageError(f"cannot listen on {self.host} port {self.port}: {why}", "see --port") from None
        return listener


def serve(app: ServerApp, listener: socket.socket, *, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT. The first lets generations finish, within the grace period; the second ends them.

    on_ready: called with the URL once requests are accepted.
    """
    disable_created_metrics()  # type: ignore[no-untyped-call]
    GracefulServer(app, listener, on_ready=on_ready).run(sockets=[listener])
    if app.model_thread.is_alive or app.preparer.is_busy:
        # The interpreter would end these threads in the midst of foreign code, which may abort the process.
        os._exit(0)


class GracefulServer(uvicorn.Server):
    """A uvicorn server that lets generations finish before it stops. The arguments are those of `serve`."""

    def __init__(self, app: ServerApp, listener: socket.socket, *, on_ready: Callable[[str], None]) -> None:
        config = uvicorn.Config(
            app.asgi,
            http=LimitedHttpProtocol,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=ceil(app.limits.grace_period) + 2,
            lifespan="on",
            ws="none",
        )
        super().__init__(config)
        self._app = app
        self._on_ready = on_ready
        host, port = listener.getsockname()[:2]
        self._url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._num_signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self._on_ready(self._url)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new requests, let generations finish, and cancel those that exceed the grace period."""
        model_thread, grace_period = self._app.model_thread, self._app.limits.grace_period
        model_thread.draining = True
        asyncio.get_running_loop().call_later(grace_period, model_thread.cancel_all, "shutdown")
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop, within the grace period. The second signal cancels all generations; the third ends the process.

        uvicorn's own method would note the signal, and raise it again at the end: a stop by signal is no failure here.
        """
        self._num_signals += 1
        self.should_exit = True
        if self._num_signals == 1:
            # Nothing that hangs keeps the process alive: a step of a model, a thread, a library.
            _exit_after(self._app.limits.grace_period + _EXIT_SECONDS)
        elif self._num_signals == 2 and self._loop is not None:
            self._loop.call_soon_threadsafe(self._app.model_thread.cancel_all, "shutdown")
            _exit_after(_EXIT_SECONDS)
        else:
            _exit_after(0)


def _exit_after(seconds: float) -> None:
    """End the process after some seconds, whatever it does then."""
    timer = threading.Timer(seconds, os._exit, [0])
    timer.daemon = True
    timer.start()


class JsonLogFormatter(logging.Formatter):
    """Formats a log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        timestamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line = {"time": timestamp, "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to_stderr(level: str) -> None:
    """Write the server's log to stderr. level: a level of `logging`, in lower case."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLogFormatter())
    for name in ("mixlm.server", "uvicorn.error", "opentelemetry"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper() if name == "mixlm.server" else "WARNING")
