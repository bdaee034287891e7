"""A server with vLLM's API over a random table, which fails as it is told to; and one that records requests."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np

from mixlm.core.sampling import Transform
from mixlm.types import Sampling


class FakeServer:
    """faults: what happens to the next requests for completions, first come first served.

    "drop" closes the connection; "cut" sends half of the response; "garbage" sends no JSON; "slow" takes `delay`
    seconds; "429" and "503" say busy; "error" says that something is wrong; any other word is sent as the response.

    requests: the bodies of requests for completions; paths: of all requests. pages: what else is there to get.

    samples: whether it samples tokens itself and returns their ids; with `processed`, it returns the probabilities that
    it samples with; `seeds` and `bans` are heeded, the latter by `masks` or by biases. scores: how it returns the
    log-probabilities of a prompt: "prompt_logprobs" as vLLM, "echo" as OpenAI, None not at all.
    """

    completion_path = "/v1/completions"

    def __init__(self, size: int = 260, seed: int = 0, *, key: str | None = None) -> None:
        self.size, self.seed, self.key = size, seed, key
        self.models: list[dict[str, Any]] = [{"id": "fake", "max_model_len": 512}]
        self.faults: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.pages: dict[str, Any] = {}
        self.max_logprobs = 100
        self.spell_ids = True
        self.samples = False
        self.processed = self.seeds = self.bans = self.masks = True
        self.scores: str | None = None
        self.delay = 0.5
        self.retry_after: str | None = "0.05"
        self.in_flight = self.max_in_flight = 0
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._server: ThreadingHTTPServer | None = None
        self.port = 0
        self.scheme = "http"

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        """Connections that were accepted since it started."""
        return len(self._open)

    def start(self, tls: ssl.SSLContext | None = None) -> FakeServer:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self) -> None:
                super().setup()
                fake._open.add(self.connection)

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                fake.paths.append(self.path)
                if fake.key and self.headers.get("Authorization") != f"Bearer {fake.key}":
                    self.send(401, {"error": {"message": "who are you"}})
                else:
                    self.send(*fake.get(self.path))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.paths.append(self.path)
                if self.path != fake.completion_path:
                    return self.send(*fake.post(self.path, body))
                with fake._lock:
                    fake.requests.append(body)
                    fault = fake.faults.pop(0) if fake.faults else None
                    fake.in_flight += 1
                    fake.max_in_flight = max(fake.max_in_flight, fake.in_flight)
                try:
                    self.complete(body, fault)
                finally:
                    with fake._lock:
                        fake.in_flight -= 1
                return None

            def complete(self, body: dict[str, Any], fault: str | None) -> None:
                if fault == "slow":
                    time.sleep(fake.delay)
                if fault == "drop":
                    self.close_connection = True
                    self.connection.close()
                elif fault in ("429", "503"):
                    headers = {} if fake.retry_after is None else {"Retry-After": fake.retry_after}
                    self.send(int(fault), {"error": {"message": "busy"}}, headers)
                elif fault == "garbage":
                    self.send(200, b"<html>so sorry</html>")
                elif fault == "error":
                    self.send(500, {"error": {"message": "it broke"}})
                elif fault == "cut":
                    self.send(200, fake.respond(body), cut=True)
                elif fault not in (None, "slow"):
                    self.send(200, fault.encode())
                elif (refusal := fake.refusal(body)) is not None:
                    self.send(400, refusal)
                else:
                    self.send(200, fake.respond(body))

            def send(self, status: int, value: Any, headers: Any = None, *, cut: bool = False) -> None:
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                for name, text in (headers or {}).items():
                    self.send_header(name, text)
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if cut else data)
                if cut:
                    self.close_connection = True

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, *_: object) -> None:
                pass  # clients that went away

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
            self.scheme = "https"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._open.clear()
            self._server = None

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        return np.random.default_rng([self.seed, *ids[-3:]]).normal(scale=2, size=self.size)

    def get(self, path: str) -> tuple[int, Any]:
        """Status and JSON of what is there to get."""
        if path == "/v1/models":
            return 200, {"data": self.models}
        return (200, self.pages[path]) if path in self.pages else (404, {})

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and JSON of what is posted elsewhere than to `completion_path`."""
        return 404, {}

    def refusal(self, body: dict[str, Any]) -> Any:
        """The error for a request that is refused, None for one that is not."""
        if body.get("logprobs", 0) > self.max_logprobs:
            return {"error": {"message": f"logprobs is more than {self.max_logprobs}"}}
        return None

    def respond(self, body: dict[str, Any]) -> dict[str, Any]:
        if self.scores == "prompt_logprobs" and "prompt_logprobs" in body:
            return self.scored(body)
        if self.scores == "echo" and body.get("echo"):
            return self.echoed(body)
        if self.samples and body.get("return_token_ids"):
            return self.sample(body)
        if "logprobs" not in body:
            return {"model": body["model"], "choices": [{"text": "x", "logprobs": None}]}
        x = self.logits(body["prompt"])
        x = x - np.log(np.exp(x).sum())
        if self.processed and self.samples:
            if allowed := body.get("allowed_token_ids"):
                x = np.where(np.isin(np.arange(self.size), allowed), x, -np.inf)
            distribution = self.transform(body)(x)
            x = np.full(self.size, -9999.0)
            x[distribution.ids] = distribution.logprobs
        spelling = "token_id:{}" if self.spell_ids else "text {}"
        top = {spelling.format(i): float(x[i]) for i in np.argsort(-x)[: body["logprobs"]]}
        return {"model": body["model"], "choices": [{"text": "x", "logprobs": {"top_logprobs": [top]}}]}

    def logprobs(self, ids: Sequence[int]) -> np.ndarray:
        """The log-probabilities after ids."""
        x = self.logits(ids)
        return x - np.log(np.exp(x).sum())

    def scored(self, body: dict[str, Any]) -> dict[str, Any]:
        """The log-probabilities of a prompt as vLLM returns them: those of the token and of the top one, by id."""
        ids, entries = body["prompt"], [None]
        for end in range(1, len(ids)):
            x = self.logprobs(ids[:end])
            tokens = dict.fromkeys([ids[end], int(x.argmax())])
            entries.append(
                {
                    str(i): {"logprob": float(x[i]), "rank": int((x > x[i]).sum()) + 1, "decoded_token": "x"}
                    for i in tokens
                }
            )  # type: ignore[arg-type]
        return {"model": body["model"], "choices": [{"text": "x", "logprobs": None, "prompt_logprobs": entries}]}

    def echoed(self, body: dict[str, Any]) -> dict[str, Any]:
        """The log-probabilities of a prompt as OpenAI returned them, with those of the token behind it."""
        ids = body["prompt"]
        rows = [self.logprobs(ids[:end]) for end in range(1, len(ids) + 1)]
        tokens = [*ids[1:], int(rows[-1].argmax())]
        own = [None, *(float(x[token]) for x, token in zip(rows, tokens, strict=True))]
        top = [None, *({f"token_id:{int(x.argmax())}": float(x.max())} for x in rows)]
        return {
            "model": body["model"],
            "choices": [{"text": "x", "logprobs": {"token_logprobs": own, "top_logprobs": top}}],
        }

    def transform(self, body: dict[str, Any]) -> Transform:
        """The transform that a request asks for."""
        sampling = Sampling(
            **{name: body[name] for name in ("temperature", "top_p", "min_p")}, top_k=max(body["top_k"], 0)
        )
        biases = body.get("logit_bias", {})
        banned = [int(token) for token, bias in biases.items() if bias == -100] if self.bans else []
        ranges = body.get("vllm_xargs", {}).get("mixlm_banned", "")
        for part in ranges.split(",") if ranges and self.masks and self.bans else ():
            first, _, last = part.partition("-")
            banned += range(int(first), int(last or first) + 1)
        return Transform(sampling, np.array(banned, dtype=np.int64))

    def sample(self, body: dict[str, Any]) -> dict[str, Any]:
        """Sample tokens, and return what is returned of them."""
        random = np.random.default_rng(body["seed"] if self.seeds else None)
        ids: list[int] = []
        logprobs: list[float] = []
        while len(ids) < body["max_tokens"] and not {*ids} & {*body.get("stop_token_ids", [])}:
            x = self.logits([*body["prompt"], *ids])
            distribution = self.transform(body)(x)
            probabilities = np.exp(distribution.logprobs)
            index = random.choice(len(distribution.ids), p=probabilities / probabilities.sum())
            ids.append(int(distribution.ids[index]))
            raw = float(x[ids[-1]] - np.log(np.exp(x).sum()))
            logprobs.append(float(distribution.logprobs[index]) if self.processed else raw)
        choice = {"text": "x", "token_ids": ids, "logprobs": {"token_logprobs": logprobs}}
        return {"model": body["model"], "choices": [choice], "usage": {"prompt_tokens_details": {"cached_tokens": 0}}}


class RecordingServer(FakeServer):
    """Passes requests on to another server. posted: path and body of what was posted."""

    completion_path = ""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        self.posted: list[tuple[str, dict[str, Any]]] = []

    def get(self, path: str) -> tuple[int, Any]:
        return self._pass_on(path)

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        self.posted.append((path, body))
        return self._pass_on(path, json.dumps(body).encode())

    def _pass_on(self, path: str, data: bytes | None = None) -> tuple[int, Any]:
        try:
            with urlopen(Request(self._url + path, data, {"Content-Type": "application/json"})) as response:
                return response.status, response.read()
        except HTTPError as error:
            return error.code, error.read()
