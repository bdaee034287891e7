"""Servers for tests: in this process, or in one of its own."""

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

from mixlm.engines.toy import WORD_TOKENS, ToyEngine, ToySession, wordy_table
from mixlm.ensemble import Ensemble, MemberSpec
from mixlm.server.api_keys import Keys
from mixlm.server.app import Server
from mixlm.server.http_server import Address, web_server
from mixlm.server.limits import Limits
from mixlm.server.model_registry import Registry
from mixlm.server.tracing import Traces

MAIN = "import sys; from mixlm.cli import main; sys.exit(main())"
HELLO = [{"role": "user", "content": "hello"}]


class EndlessToy(ToyEngine):
    """A toy that never ends a reply and takes its time over every forward."""

    def __init__(self, seed: int, seconds: float = 0.0) -> None:
        plain = wordy_table(seed)

        def table(context: tuple[int, ...]) -> np.ndarray:
            logits = plain(context)
            logits[len(WORD_TOKENS) + 1] = -np.inf
            return logits

        super().__init__(table=table, name=f"toy:{seed}")
        self.seconds = seconds
        self.forwards = 0

    def session(self) -> ToySession:
        engine = self

        class Slow(ToySession):
            def _forward(self, ids: Any, last: int) -> Any:
                engine.forwards += 1
                time.sleep(engine.seconds)
                return super()._forward(ids, last)

        return Slow(self)


def endless(seconds: float = 0.0) -> Ensemble:
    return Ensemble([MemberSpec(EndlessToy(i, seconds), f"toy:{i}") for i in (1, 2)])


class Running:
    """A server that runs in a thread, and a client for it."""

    def __init__(self, server: Server, url: str) -> None:
        self.server = server
        self.url = url
        self.client = httpx.Client(base_url=url, timeout=30, trust_env=False)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def chat(self, *, messages: Any = HELLO, **body: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", {"messages": messages, **body})

    def complete(self, prompt: Any = "one", **body: Any) -> httpx.Response:
        return self.post("/v1/completions", {"prompt": prompt, **body})

    def metric(self, name: str, **labels: str) -> float:
        """A figure of /metrics; 0 where it does not occur yet."""
        total = 0.0
        for line in self.client.get("/metrics").text.splitlines():
            found = re.fullmatch(rf"{name}(?:\{{(.*)\}})? (\S+)", line)
            if found and all(f'{key}="{value}"' in (found[1] or "") for key, value in labels.items()):
                total += float(found[2])
        return total

    def wait(self, condition: Callable[[], bool], seconds: float = 20) -> None:
        wait(condition, seconds)


def wait(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


@contextmanager
def running(
    ensembles: Mapping[str, Ensemble] | Ensemble,
    keys: Keys | None = None,
    *,
    buffer: int = 0,
    traces: Traces | None = None,
    **limits: Any,
) -> Iterator[Running]:
    """Serve in a thread of this process. buffer: bytes kept for a slow client; 0 for the usual."""
    named = ensembles if isinstance(ensembles, Mapping) else {"toys": ensembles}
    address = Address(port=0)
    limits = {"grace": 0, **limits}
    server = Server(Registry(named), Limits(**limits), keys, address.hosts, traces)
    listening = address.listen()
    if buffer:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    came: list[str] = []
    web = web_server(server, listening, ready=came.append)
    thread = threading.Thread(target=web.run, kwargs={"sockets": [listening]})
    thread.start()
    wait(lambda: bool(came))
    one = Running(server, came[0])
    try:
        yield one
    finally:
        one.client.close()
        web.should_exit = True
        thread.join(30)
        listening.close()
        assert not thread.is_alive()
        assert not server.worker.alive


class Process:
    """`mixlm serve` in a process of its own."""

    def __init__(self, *arguments: str, port: int = 0, before: str = "", **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", before + MAIN, "serve", "--port", str(port), *arguments],
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
            if found := re.match(r"serving .* at (http\S+)", line):
                self.url = found[1]
                break
        else:
            raise AssertionError(f"it never served: {self.lines}")
        self.port = int(self.url.rpartition(":")[2])
        threading.Thread(target=lambda: self.lines.extend(self._process.stderr or ()), daemon=True).start()

    def send(self, sent: signal.Signals) -> None:
        self._process.send_signal(sent)

    def end(self, seconds: float = 30) -> int:
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
    """The events of a streamed response, up to the one that says it is done."""
    for line in response.iter_lines():
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))
    raise AssertionError("the stream has no end")


def raw(url: str, data: bytes, *, seconds: float = 10) -> socket.socket:
    """A connection of bare bytes."""
    host, port = url.removeprefix("http://").rsplit(":", 1)
    connection = socket.create_connection((host, int(port)), seconds)
    connection.sendall(data)
    return connection


def request_bytes(body: Any, path: str = "/v1/chat/completions", head: str = "") -> bytes:
    """A request as it stands on the wire. head: further header lines, each with its end."""
    data = json.dumps(body).encode()
    first = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{first}{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
