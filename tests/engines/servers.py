"""A server that speaks as vLLM does, over a random table, and that fails as it is told to."""

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

import numpy as np

from mixlm.core.sampling import Transform
from mixlm.types import Sampling


class Fake:
    """faults: what happens to the next requests for completions, first come first served.

    "drop" closes the connection; "cut" sends half of the answer; "garbage" sends no JSON; "slow" takes `delay` seconds;
    "429" and "503" say busy; "error" says that something is wrong; any other word is sent as the answer.

    asked: the bodies of questions; paths: of all requests. pages: what else is there to get.

    draws: whether it draws tokens by itself and gives their ids; with `processed`, it tells the probabilities that it
    draws with; `seeds` and `bans` are heeded, the latter by `masks` or by biases.
    """

    question = "/v1/completions"  # the path of questions

    def __init__(self, size: int = 260, seed: int = 0, *, key: str | None = None) -> None:
        self.size, self.seed, self.key = size, seed, key
        self.models: list[dict[str, Any]] = [{"id": "fake", "max_model_len": 512}]
        self.faults: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.pages: dict[str, Any] = {}
        self.most = 100
        self.spell_ids = True
        self.draws = False
        self.processed = self.seeds = self.bans = self.masks = True
        self.delay = 0.5
        self.retry_after: str | None = "0.05"
        self.busy = self.busiest = 0
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._server: ThreadingHTTPServer | None = None
        self.port = 0
        self.scheme = "http"

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def start(self, tls: ssl.SSLContext | None = None) -> Fake:
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
                    self.say(401, {"error": {"message": "who are you"}})
                elif self.path == "/v1/models":
                    self.say(200, {"data": fake.models})
                elif self.path in fake.pages:
                    self.say(200, fake.pages[self.path])
                else:
                    self.say(404, {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.paths.append(self.path)
                if self.path != fake.question:
                    return self.say(*fake.beside(self.path, body))
                with fake._lock:
                    fake.asked.append(body)
                    fault = fake.faults.pop(0) if fake.faults else None
                    fake.busy += 1
                    fake.busiest = max(fake.busiest, fake.busy)
                try:
                    self.complete(body, fault)
                finally:
                    with fake._lock:
                        fake.busy -= 1
                return None

            def complete(self, body: dict[str, Any], fault: str | None) -> None:
                if fault == "slow":
                    time.sleep(fake.delay)
                if fault == "drop":
                    self.close_connection = True
                    self.connection.close()
                elif fault in ("429", "503"):
                    headers = {} if fake.retry_after is None else {"Retry-After": fake.retry_after}
                    self.say(int(fault), {"error": {"message": "busy"}}, headers)
                elif fault == "garbage":
                    self.say(200, b"<html>so sorry</html>")
                elif fault == "error":
                    self.say(500, {"error": {"message": "it broke"}})
                elif fault == "cut":
                    self.say(200, fake.answer(body), cut=True)
                elif fault not in (None, "slow"):
                    self.say(200, fault.encode())
                elif (refusal := fake.refusal(body)) is not None:
                    self.say(400, refusal)
                else:
                    self.say(200, fake.answer(body))

            def say(self, status: int, value: Any, headers: Any = None, *, cut: bool = False) -> None:
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                for name, one in (headers or {}).items():
                    self.send_header(name, one)
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
            for one in self._open:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            self._open.clear()
            self._server = None

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        return np.random.default_rng([self.seed, *ids[-3:]]).normal(scale=2, size=self.size)

    def beside(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and answer of what is posted elsewhere."""
        return 404, {}

    def refusal(self, body: dict[str, Any]) -> Any:
        """What is said of a question that is not answered, None for one that is."""
        if body.get("logprobs", 0) > self.most:
            return {"error": {"message": f"logprobs is more than {self.most}"}}
        return None

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        if self.draws and body.get("return_token_ids"):
            return self.drawn(body)
        if "logprobs" not in body:
            return {"model": body["model"], "choices": [{"text": "x", "logprobs": None}]}
        x = self.logits(body["prompt"])
        x = x - np.log(np.exp(x).sum())
        if self.processed and self.draws:
            law = self.law(body)(x)
            x = np.full(self.size, -9999.0)
            x[law.ids] = law.logprobs
        top = np.argsort(-x)[: body["logprobs"]]
        spelled = "token_id:{}" if self.spell_ids else "text {}"
        told = {spelled.format(i): float(x[i]) for i in top}
        return {"model": body["model"], "choices": [{"text": "x", "logprobs": {"top_logprobs": [told]}}]}

    def law(self, body: dict[str, Any]) -> Transform:
        """The transform that a request asks for."""
        sampling = Sampling(
            **{name: body[name] for name in ("temperature", "top_p", "min_p")}, top_k=max(body["top_k"], 0)
        )
        banned = [int(one) for one, bias in body.get("logit_bias", {}).items() if bias == -100] if self.bans else []
        given = body.get("vllm_xargs", {}).get("mixlm_banned", "")
        for part in given.split(",") if given and self.masks and self.bans else ():
            first, _, last = part.partition("-")
            banned += range(int(first), int(last or first) + 1)
        return Transform(sampling, np.array(banned, dtype=np.int64))

    def drawn(self, body: dict[str, Any]) -> dict[str, Any]:
        """Draw tokens, and tell what is told of them."""
        random = np.random.default_rng(body["seed"] if self.seeds else None)
        ids: list[int] = []
        told: list[float] = []
        while len(ids) < body["max_tokens"] and not {*ids} & {*body.get("stop_token_ids", [])}:
            x = self.logits([*body["prompt"], *ids])
            law = self.law(body)(x)
            at = random.choice(len(law.ids), p=np.exp(law.logprobs) / np.exp(law.logprobs).sum())
            ids.append(int(law.ids[at]))
            told.append(float(law.logprobs[at]) if self.processed else float(x[ids[-1]] - np.log(np.exp(x).sum())))
        choice = {"text": "x", "token_ids": ids, "logprobs": {"token_logprobs": told}}
        return {"model": body["model"], "choices": [choice], "usage": {"prompt_tokens_details": {"cached_tokens": 0}}}
