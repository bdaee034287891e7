"""The HTTP client of members behind servers: connections that are kept, replaced, and led through proxies."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from servers import FakeServer

pytest.importorskip("aiohttp")

from mixlm.engines.remote.http_client import ClientLimits, EventLoopThread, HttpClient, HttpResponse, time_limit
from mixlm.errors import EngineError

LIMITS = ClientLimits(connect=1, response=5, busy=1, connections=3)
BODY = {"model": "fake", "prompt": [3, 4, 5], "logprobs": 5}


@pytest.fixture
def loop() -> Iterator[EventLoopThread]:
    thread = EventLoopThread()
    yield thread

    async def nothing() -> None:
        pass

    thread.close(nothing())


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer().start()
    yield fake
    fake.stop()


@pytest.fixture
def client(loop, server) -> Iterator[HttpClient]:
    http_client = loop.run(create(server.url))
    yield http_client
    loop.run(http_client.close())


async def create(url: str, key: str | None = None) -> HttpClient:
    return HttpClient(url, key, LIMITS)


def post(loop: EventLoopThread, client: HttpClient) -> HttpResponse:
    return loop.run(client.request("POST", "/v1/completions", BODY))


def test_a_connection_is_kept(loop, client, server):
    responses = [post(loop, client) for _ in range(3)]
    assert [response.status for response in responses] == [200, 200, 200]
    assert server.connections == client.connections_made == 1


def test_a_connection_that_the_server_closed_is_replaced(loop, client, server):
    post(loop, client)
    server.stop()
    server.start()
    assert post(loop, client).status == 200
    assert client.connections_made == 2


def test_a_request_whose_connection_drops_is_sent_once_more_over_a_new_connection(loop, client, server):
    post(loop, client)
    server.faults = ["drop"]
    response = post(loop, client)
    assert (response.status, client.connections_made, len(server.requests)) == (200, 2, 3)
    server.faults = ["drop", "drop"]
    with pytest.raises(EngineError, match="does not answer"):
        post(loop, client)
    assert len(server.requests) == 5


def test_a_request_with_a_limit_of_its_own_is_not_sent_again(loop, client, server):
    server.faults = ["drop"]
    with time_limit(2.0), pytest.raises(EngineError, match="does not answer"):
        post(loop, client)
    server.faults, server.delay = ["slow"], 1.0
    with time_limit(0.2), pytest.raises(EngineError, match=r"does not answer within 0\.2 seconds"):
        post(loop, client)
    assert len(server.requests) == 2


def test_no_more_connections_than_allowed(loop, client, server):
    server.faults, server.delay = ["slow"] * 8, 0.1
    futures = [loop.submit(client.request("POST", "/v1/completions", BODY)) for _ in range(8)]
    assert {future.result(10).status for future in futures} == {200}
    assert server.connections == server.max_in_flight == LIMITS.connections


def test_an_error_of_the_server_is_a_response(loop, client, server):
    server.faults = ["error"]
    response = post(loop, client)
    assert (response.status, response.value) == (500, {"error": {"message": "it broke"}})
    assert loop.run(client.request("GET", "/nowhere")).status == 404


def test_the_key_is_sent(loop, server):
    server.key = "secret-7"
    client = loop.run(create(server.url, "secret-7"))
    assert loop.run(client.request("GET", "/v1/models")).status == 200
    loop.run(client.close())


def test_requests_go_through_the_proxy_of_the_environment(loop, server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", server.url)
    proxied = loop.run(create("http://models.example:8000"))
    loop.run(proxied.request("GET", "/v1/models"))
    assert server.paths == ["http://models.example:8000/v1/models"]
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    direct = loop.run(create(server.url))
    assert loop.run(direct.request("GET", "/v1/models")).status == 200
    assert server.paths[-1] == "/v1/models"
    for client in (proxied, direct):
        loop.run(client.close())
