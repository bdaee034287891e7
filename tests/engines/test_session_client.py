"""The client of mixlm's session route, over a server that has nothing else."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import Iterator
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("aiohttp")
pytest.importorskip("websockets")
from websockets.sync.server import Server, ServerConnection, serve

from mixlm.engines.remote.http_client import ClientLimits
from mixlm.engines.remote.model_info import ModelInfo
from mixlm.engines.remote.openai_server import OpenAIServer
from mixlm.engines.remote.server import TokenizerProbe
from mixlm.engines.remote.session_client import SessionPool
from mixlm.engines.requests import GenerateRequest
from mixlm.engines.vllm.sampling_params import SESSION_PATH
from mixlm.errors import EngineError, RequestRefusedError
from mixlm.types import Sampling

KEY = "secret-7"
PARAMETERS = {"max_tokens": 2}


class FakeSessionServer:
    """Continues a sequence with its last token plus 1, 2, …; messages: what it received, by connection."""

    def __init__(self) -> None:
        self.messages: list[list[dict[str, Any]]] = []
        self.connections: list[ServerConnection] = []
        self.error, self.refused = "", False
        self._server: Server = serve(self._handle, "127.0.0.1", 0, process_request=self._authorize)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.socket.getsockname()[1]}"

    def stop(self) -> None:
        self._server.shutdown()

    def _authorize(self, connection: ServerConnection, request: Any) -> Any:
        is_allowed = request.path == SESSION_PATH and request.headers.get("Authorization") == f"Bearer {KEY}"
        return None if is_allowed else connection.respond(HTTPStatus.UNAUTHORIZED, "no")

    def _handle(self, connection: ServerConnection) -> None:
        self.connections.append(connection)
        self.messages.append([])
        messages, tokens = self.messages[-1], []
        for data in connection:
            message = json.loads(data)
            messages.append(message)
            if self.error:
                connection.send(json.dumps({"error": self.error, "refused": self.refused}))
                continue
            tokens = [*tokens[: message["keep"]], *message["ids"]]
            ids = [tokens[-1] + i for i in range(1, message["parameters"]["max_tokens"] + 1)]
            tokens += ids
            logprobs = [{str(token): -0.5} for token in ids]
            connection.send(json.dumps({"ids": ids, "logprobs": logprobs, "cached": message["keep"]}))


class Owner:
    """What a sequence belongs to."""


@pytest.fixture
def server() -> Iterator[FakeSessionServer]:
    fake = FakeSessionServer()
    yield fake
    fake.stop()


def client_of(server: FakeSessionServer, key: str = KEY) -> Any:
    limits = ClientLimits(connect=2, response=5)
    return SimpleNamespace(base_url=server.url, key=key, limits=limits, count_connection=lambda: None)


def pool_of(server: FakeSessionServer, key: str = KEY, checks: list[int] | None = None) -> SessionPool:
    async def check() -> None:
        if checks is not None:
            checks.append(len(server.connections))

    return SessionPool(client_of(server, key), check)


def test_only_what_is_new_is_sent(server):
    async def run() -> None:
        checks: list[int] = []
        pool, owner = pool_of(server, checks=checks), Owner()
        response = await pool.generate(owner, np.array([5, 6]), PARAMETERS, "0-3")
        assert response["ids"] == [7, 8]
        await pool.generate(owner, np.array([5, 6, 7, 8, 20]), PARAMETERS)
        await pool.generate(owner, np.array([5, 6, 30]), PARAMETERS)
        assert len(checks) == 1
        pool.close()

    asyncio.run(run())
    [messages] = server.messages
    assert [(message["keep"], message["ids"]) for message in messages] == [(0, [5, 6]), (4, [20]), (2, [30])]
    assert [message["banned"] for message in messages] == ["0-3", "", ""]


def test_a_connection_that_is_gone_is_opened_again_and_gets_the_whole_sequence(server):
    async def run() -> None:
        checks: list[int] = []
        pool, owner = pool_of(server, checks=checks), Owner()
        await pool.generate(owner, np.array([5, 6]), PARAMETERS)
        await asyncio.to_thread(server.connections[0].close)
        response = await pool.generate(owner, np.array([5, 6, 7]), PARAMETERS)
        assert response["ids"] == [8, 9]
        assert len(checks) == 2
        pool.close()

    asyncio.run(run())
    assert server.messages[1][0]["ids"] == [5, 6, 7]


@pytest.mark.parametrize("refused", [True, False])
def test_what_the_server_refuses_is_an_error(server, refused):
    server.error, server.refused = "keep is 5 of 0 tokens", refused

    async def run() -> None:
        with pytest.raises(EngineError, match="refuses: keep is 5 of 0 tokens") as raised:
            await pool_of(server).generate(Owner(), np.array([5, 6]), PARAMETERS)
        assert isinstance(raised.value, RequestRefusedError) == refused

    asyncio.run(run())


def test_the_key_holds_for_sessions_too(server):
    async def run() -> list[bool]:
        return [await pool_of(server, key).is_available() for key in (KEY, "another")]

    assert asyncio.run(run()) == [True, False]


def test_another_model_is_not_continued(server):
    async def run() -> None:
        async def check() -> None:
            raise EngineError("has another model now")

        pool = SessionPool(client_of(server), check)
        with pytest.raises(EngineError, match="has another model now"):
            await pool.generate(Owner(), np.array([5, 6]), PARAMETERS)

    asyncio.run(run())
    assert not any(server.messages)


@pytest.mark.slow
def test_a_connection_ends_with_its_sequence(server):
    async def run() -> None:
        pool, owners = pool_of(server), [Owner(), Owner()]
        for owner in owners:
            await pool.generate(owner, np.array([5, 6]), PARAMETERS)
        pool.release(owners[0])
        del owner, owners
        gc.collect()
        for connection in server.connections:
            async with asyncio.timeout(5):
                while connection.state.name == "OPEN":
                    await asyncio.sleep(0.01)

    asyncio.run(run())


class Route:
    """The session route, which sends one response."""

    def __init__(self, response: dict[str, Any]) -> None:
        self.response = response

    async def generate(self, *_: Any) -> dict[str, Any]:
        return self.response


def server_with(response: dict[str, Any]) -> OpenAIServer:
    client: Any = SimpleNamespace(base_url="http://x")
    server = OpenAIServer(client, ModelInfo({"id": "x"}, {}), TokenizerProbe([], [], [b"x"] * 10, ""))
    route: Any = Route(response)
    server.sessions = route
    return server


@pytest.mark.parametrize(
    "response",
    [
        {"ids": []},
        {"ids": [5], "logprobs": [{}]},
        {"ids": [5], "logprobs": [{"5": None}]},
        {"ids": [5], "logprobs": []},
        {"ids": ["x"], "logprobs": [{"x": -1.0}]},
    ],
)
def test_a_malformed_response_is_an_error(response):
    none = np.zeros(0, dtype=np.int64)
    request = GenerateRequest(0, np.array([5]), 1, Sampling(), none, 1)
    with pytest.raises(EngineError, match="sends a malformed response"):
        asyncio.run(server_with(response).generate(Owner(), request, ()))


def test_top_tokens_are_those_of_the_only_position():
    response = {"ids": [5], "logprobs": [{"5": -1.0, "9": -2.0}]}
    candidates = asyncio.run(server_with(response).candidates(Owner(), np.array([5]), 2)).candidates
    assert (candidates.ids.tolist(), candidates.logprobs.tolist()) == ([5, 9], [-1.0, -2.0])
    for wrong in ({"logprobs": []}, {"logprobs": [{}]}, {"logprobs": [{"5": "x"}]}, {}):
        with pytest.raises(EngineError, match="sends a malformed response"):
            asyncio.run(server_with(wrong).candidates(Owner(), np.array([5]), 2))
