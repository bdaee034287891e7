"""Running a server: the socket, the log, and what a signal does."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from types import FrameType

import uvicorn
from prometheus_client import disable_created_metrics

from mixlm.errors import UsageError
from mixlm.server.app import Server
from mixlm.server.http_protocol import Connection

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
# How long a connection may lie idle between two requests, seconds.
_KEEP = 30


@dataclass(frozen=True)
class Address:
    """Where to listen. names: further names that clients may know this server by."""

    host: str = "127.0.0.1"
    port: int = 8000
    names: tuple[str, ...] = ()

    @property
    def local(self) -> bool:
        """Whether only programs on this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def hosts(self) -> Collection[str] | None:
        """The host names that requests may give; None for any.

        A page from elsewhere can make a browser call this machine under a name of its own. It cannot where that name
        is refused; a server that others can reach has keys for that.
        """
        return {*_LOOPBACK, self.host, *self.names} if self.local else None

    def listen(self) -> socket.socket:
        """Take the port, so that a wrong one is known before models are loaded. Raises UsageError."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        # Of this protocol by name, the event loop sends each event at once; else it would wait for what comes next.
        taken = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # A peer that has vanished, or takes nothing, is given up by the system itself.
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                taken.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000)
            taken.bind((self.host, self.port))
        except (OSError, OverflowError) as error:
            taken.close()
            why = getattr(error, "strerror", None) or str(error)
            raise UsageError(f"{self.host} port {self.port} cannot be listened at: {why}", "see --port") from None
        return taken


def serve(server: Server, listening: socket.socket, *, ready: Callable[[str], None]) -> None:
    """Serve until a signal says to stop. ready: told the address once requests are taken.

    The first SIGTERM or SIGINT lets replies finish, up to the limit for it; the second ends them.
    """
    disable_created_metrics()  # type: ignore[no-untyped-call]
    web_server(server, listening, ready=ready).run(sockets=[listening])


def web_server(server: Server, listening: socket.socket, *, ready: Callable[[str], None]) -> uvicorn.Server:
    """Return what `serve` runs."""
    host, port = listening.getsockname()[:2]
    config = uvicorn.Config(
        server.app,
        http=Connection,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP,
        timeout_graceful_shutdown=int(server.limits.grace) + 5,
        lifespan="on",
        ws="none",
    )
    shown = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    return _Server(config, server, lambda: ready(shown))


class _Server(uvicorn.Server):
    """A server that finishes what it began."""

    def __init__(self, config: uvicorn.Config, server: Server, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._mixlm = server
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, let replies finish, and end those that take too long."""
        worker, grace = self._mixlm.worker, self._mixlm.limits.grace
        worker.draining = True
        asyncio.get_running_loop().call_later(0 if self.force_exit else grace, worker.close_all, "shutdown")
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop; at the second signal at once."""
        self.force_exit = self.should_exit
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Handle signals while serving. To be told to stop is no failure: the process ends with 0."""
        if threading.current_thread() is not threading.main_thread():
            yield  # no other thread may handle signals
            return
        before = {one: signal.signal(one, self.handle_exit) for one in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)


class JsonLines(logging.Formatter):
    """A log record as one JSON object on a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        out = {"time": stamp, "level": record.levelname.lower(), "event": record.getMessage()}
        out |= getattr(record, "fields", {})
        if record.exc_info:
            out["traceback"] = self.formatException(record.exc_info)
        return json.dumps(out)


def log_to_stderr(level: str) -> None:
    """Write this server's log to stderr. level: a name of the library `logging`, in lower case."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("mixlm.server", "uvicorn.error", "opentelemetry"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper() if name == "mixlm.server" else "WARNING")
