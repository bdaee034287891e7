"""Servers for tests: in this process, or in a process of their own."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np

from mixlm.binding import LoadedMember
from mixlm.core.options import GenerationOptions
from mixlm.engines.toy import WORD_TOKENS, ToyEngine, wordy_table
from mixlm.ensemble import Ensemble
from mixlm.server.app import ServerApp
from mixlm.server.http_server import GracefulServer, ListenAddress
from mixlm.server.limits import ServerLimits
from mixlm.server.model_registry import ModelRegistry
from mixlm.server.tracing import RequestTracer

MAIN = "import sys; from mixlm.cli import main; sys.exit(main())"
HELLO = [{"role": "user", "content": "hello"}]


class EndlessToy(ToyEngine):
    """A toy that never samples end-of-text. seconds: how long each forward takes."""

    def __init__(self, seed: int, seconds: float = 0.0) -> None:
        wordy = wordy_table(seed)

        def table(context: tuple[int, ...]) -> np.ndarray:
            logits = wordy(context)
            logits[len(WORD_TOKENS) + 1] = -np.inf
            return logits

        super().__init__(table=table, name=f"toy:{seed}")
        self.seconds = seconds
        self.forwards = 0
        self.on_forward = self.count_and_wait

    def count_and_wait(self, ids: Any, last: int) -> None:
        self.forwards += 1
        time.sleep(self.seconds)


def endless(seconds: float = 0.0, **defaults: Any) -> Ensemble:
    members = [LoadedMember(EndlessToy(i, seconds), f"toy:{i}") for i in (1, 2)]
    return Ensemble(members, defaults=GenerationOptions(**defaults))


class RunningServer:
    """A server that runs in a thread, and a client for it."""

    def __init__(self, app: ServerApp, url: str) -> None:
        self.app = app
        self.url = url
        self.client = httpx.Client(base_url=url, timeout=30, trust_env=False)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def chat(self, *, messages: Any = HELLO, **body: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", {"messages": messages, **body})

    def complete(self, prompt: Any = "one", **body: Any) -> httpx.Response:
        return self.post("/v1/completions", {"prompt": prompt, **body})

    def metric(self, name: str, **labels: str) -> float:
        """A value of /metrics, summed over other labels; 0 for one that does not exist yet."""
        total = 0.0
        for line in self.client.get("/metrics").text.splitlines():
            match = re.fullmatch(rf"{name}(?:\{{(.*)\}})? (\S+)", line)
            if match and all(f'{key}="{value}"' in (match[1] or "") for key, value in labels.items()):
                total += float(match[2])
        return total


def wait(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition never held"
        time.sleep(0.005)


@contextmanager
def running(
    ensembles: Mapping[str, Ensemble] | Ensemble,
    keys: Mapping[str, str] | None = None,
    *,
    send_buffer: int = 0,
    tracer: RequestTracer | None = None,
    **limits: Any,
) -> Iterator[RunningServer]:
    """Serve in a thread of this process. send_buffer: bytes buffered for a slow client; 0 for the default."""
    named = ensembles if isinstance(ensembles, Mapping) else {"toys": ensembles}
    address = ListenAddress(port=0)
    app = ServerApp(
        ModelRegistry(named), ServerLimits(**{"grace_period": 0, **limits}), keys, address.allowed_hosts, tracer
    )
    listener = address.bind()
    if send_buffer:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    urls: list[str] = []
    web_server = GracefulServer(app, listener, on_ready=urls.append)
    thread = threading.Thread(target=web_server.run, kwargs={"sockets": [listener]})
    thread.start()
    wait(lambda: bool(urls))
    server = RunningServer(app, urls[0])
    try:
        yield server
    finally:
        server.client.close()
        web_server.should_exit = True
        thread.join(30)
        listener.close()
        assert not thread.is_alive()
        assert not app.model_thread.is_alive


class ServerProcess:
    """`mixlm serve` in a process of its own. preamble: code that the process runs first."""

    def __init__(self, *arguments: str, port: int = 0, preamble: str = "", **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", preamble + MAIN, "serve", "--port", str(port), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.lines: list[str] = []
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.lines.append(line)
            if match := re.match(r"serving .* at (http\S+)", line):
                self.url = match[1]
                break
        else:
            raise AssertionError(f"it never served: {self.lines}")
        self.port = int(self.url.rpartition(":")[2])
        threading.Thread(target=lambda: self.lines.extend(self._process.stderr or ()), daemon=True).start()

    def send_signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, seconds: float = 30) -> int:
        """Wait for the process to end; return its exit code."""
        return self._process.wait(seconds)

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines if line.startswith("{")]

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        if self._process.stderr is not None:
            self._process.stderr.close()


def events(response: httpx.Response) -> Iterator[Any]:
    """The events of a streamed response, up to [DONE]."""
    for line in response.iter_lines():
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))
    raise AssertionError("the stream has no end")


def raw_connection(url: str, data: bytes, *, seconds: float = 10) -> socket.socket:
    """A TCP connection to which bytes were sent."""
    host, port = url.removeprefix("http://").rsplit(":", 1)
    connection = socket.create_connection((host, int(port)), seconds)
    connection.sendall(data)
    return connection


def request_bytes(body: Any, path: str = "/v1/chat/completions", headers: str = "") -> bytes:
    """An HTTP request. headers: further header lines, each with its line end."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}{headers}Content-Length: {len(data)}\r\n\r\n".encode() + data
