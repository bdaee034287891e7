"""What one client sends cannot stop the server for the others: schemas, prompts, full queues, heads; and shutdown."""

from __future__ import annotations

import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from serving import HELLO, EndlessToy, endless, events, raw_connection, request_bytes, running, wait

from mixlm.binding import LoadedMember
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError
from mixlm.loading import load
from mixlm.server.api_keys import hash_key
from mixlm.server.completion_handler import CompletionHandler
from mixlm.server.completions_format import CompletionsFormat
from mixlm.server.protocols.responses import ResponsesFormat
from mixlm.server.request_schemas import parse_body

KEYS = {name: f"the-long-random-key-of-{name}" for name in ("ada", "bob")}


def two_clients():
    return {hash_key(key): name for name, key in KEYS.items()}


def post(server, name, body):
    headers = {"authorization": f"Bearer {KEYS[name]}"}
    return server.post("/v1/chat/completions", {"messages": HELLO, **body}, headers=headers)


def response_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def large_schema(properties):
    return {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(properties)}}


@pytest.mark.slow
def test_schemas_that_take_long_to_compile_are_refused_and_do_not_hold_up_others():
    limits = {"max_schema_chars": 10**6, "schema_timeout": 1.5}
    with running(load("toy:1", "toy:2"), two_clients(), **limits) as server, ThreadPoolExecutor(7) as pool:
        large = [
            pool.submit(post, server, "ada", {"response_format": response_format(large_schema(9_000 + i))})
            for i in range(7)
        ]
        wait(lambda: server.app.preparer.is_busy)
        plain = post(server, "bob", {"max_tokens": 20})
        assert plain.status_code == 200
        assert not any(future.done() for future in large)
        small = post(server, "bob", {"response_format": response_format({"enum": ["river"]}), "max_tokens": 20})
        assert small.status_code == 200, small.text
        assert sum(future.done() for future in large) <= 4  # it did not wait for all of them
        for future in large:
            response = future.result()
            assert (response.status_code, response.json()["error"]["param"]) == (400, "response_format")
            assert "takes longer than 1.5 s" in response.json()["error"]["message"]


def test_a_schema_that_is_too_large_is_refused_at_once(toys):
    response = toys.chat(response_format=response_format(large_schema(9_000)))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "response_format")
    assert "more than 100000 characters" in response.json()["error"]["message"]


def test_a_schema_that_the_compiler_would_end_the_process_for_is_refused(toys):
    links = {f"a{i}": {"properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}} for i in range(700)}
    schema = {"$ref": "#/$defs/a0", "$defs": {**links, "a700": {}}}
    response = toys.chat(response_format=response_format(schema), max_tokens=1)
    assert response.status_code == 400
    assert "nested too deeply" in response.json()["error"]["message"]


def test_a_schema_cannot_configure_its_parser(toys):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    schema["x-guidance"] = {"key_separator": " := "}
    response = toys.chat(response_format=response_format(schema))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "response_format")
    assert "x-guidance" in response.json()["error"]["message"]
    with pytest.raises(ConfigError, match="x-guidance"):
        load("toy:1").generate("hello", json_schema=schema)


class SlowPrompts:
    """Makes prompts that contain "slow" wait for an event, in the encoder of an ensemble."""

    def __init__(self, monkeypatch, seconds):
        self.go_on = threading.Event()
        self.entered = 0
        encode = Ensemble.encode_prompt

        def slow(ensemble, prompt, settings):
            if "slow" in str(prompt):
                self.entered += 1
                self.go_on.wait(seconds)
            return encode(ensemble, prompt, settings)

        monkeypatch.setattr(Ensemble, "encode_prompt", slow)


SLOW_PROMPT = [{"role": "user", "content": "slow"}]


@pytest.mark.slow
def test_a_prompt_that_takes_long_to_encode_holds_up_nobody_and_is_refused(monkeypatch):
    prompts = SlowPrompts(monkeypatch, 20)
    with running(endless(0.002), two_clients(), encode_timeout=1.0) as server, ThreadPoolExecutor(1) as pool:
        refused = pool.submit(post, server, "ada", {"messages": SLOW_PROMPT})
        wait(lambda: prompts.entered == 1)
        start = time.monotonic()
        assert post(server, "bob", {"max_tokens": 20}).status_code == 200
        assert time.monotonic() - start < 1
        error = refused.result()
        assert (error.status_code, error.json()["error"]["code"]) == (400, "prompt_too_complex")
        assert error.json()["error"]["param"] == "messages"
        assert server.app.model_thread.num_unfinished == 0
        prompts.go_on.set()


def test_a_large_body_is_validated_while_others_are_answered(monkeypatch):
    entered, go_on = threading.Event(), threading.Event()

    def slow(schema, data):
        entered.set()
        go_on.wait(20)
        return parse_body(schema, data)

    monkeypatch.setattr("mixlm.server.app.parse_body", slow)
    with running(endless()) as server, ThreadPoolExecutor(1) as pool:
        large = pool.submit(server.chat, messages=HELLO * 2000, max_tokens=1)
        assert entered.wait(20)
        assert server.client.get("/health", timeout=10).json() == {"status": "ok"}
        assert server.app.preparer.is_busy
        go_on.set()
        error = large.result().json()["error"]
        assert error["code"] == "context_length_exceeded"


def test_a_large_response_is_built_while_others_are_answered(monkeypatch):
    entered, go_on = threading.Event(), threading.Event()
    response = CompletionsFormat.response

    def slow(*arguments):
        entered.set()
        go_on.wait(20)
        return response(*arguments)

    monkeypatch.setattr(CompletionsFormat, "response", slow)
    with running(endless()) as server, ThreadPoolExecutor(1) as pool:
        large = pool.submit(server.chat, max_tokens=40, logprobs=True, top_logprobs=20)
        assert entered.wait(20)
        assert server.client.get("/health", timeout=10).json() == {"status": "ok"}
        go_on.set()
        assert len(large.result().json()["choices"][0]["logprobs"]["content"]) == 40


@pytest.mark.parametrize("events", ["final_chunks", "last_chunks"])
def test_large_events_at_the_end_of_a_stream_are_built_while_others_are_answered(monkeypatch, events):
    entered, go_on = threading.Event(), threading.Event()
    build = getattr(ResponsesFormat, events)

    def slow(*arguments):
        entered.set()
        go_on.wait(20)
        return build(*arguments)

    monkeypatch.setattr(ResponsesFormat, events, slow)
    body = {"input": "one", "max_output_tokens": 40, "top_logprobs": 20, "stream": True}
    body["include"] = ["message.output_text.logprobs"]
    with running(endless()) as server, ThreadPoolExecutor(1) as pool:
        large = pool.submit(server.post, "/v1/responses", body)
        assert entered.wait(20)
        assert server.client.get("/health", timeout=10).json() == {"status": "ok"}
        go_on.set()
        assert large.result().text.count('"response.output_text.delta"') == 40


def test_the_event_loop_writes_few_tokens_of_a_stream_in_a_row(monkeypatch):
    """Each step of the models gives 64 tokens at once."""
    sent = []
    send = CompletionHandler._send_chunks

    async def recording(self, send_message, chunks):
        sent.append(sum(b'"members":["' in chunk for chunk in chunks))
        await send(self, send_message, chunks)

    monkeypatch.setattr(CompletionHandler, "_send_chunks", recording)
    with running(endless(), max_batch=64) as server:
        server.complete(n=64, max_tokens=5, stream=True)
    assert sum(sent) == 64 * 5
    assert max(sent) <= 32


def test_a_client_that_disconnects_while_its_prompts_are_encoded_frees_its_place(monkeypatch):
    prompts = SlowPrompts(monkeypatch, 20)
    with running(endless(0.002)) as server:
        connection = raw_connection(server.url, request_bytes({"prompt": ["slow 1", "slow 2"]}, "/v1/completions"))
        wait(lambda: prompts.entered == 1)
        assert server.app.model_thread.num_unfinished == 2
        connection.close()
        wait(lambda: server.app.model_thread.num_unfinished == 0)
        prompts.go_on.set()
        wait(lambda: not server.app.preparer.is_busy)
        assert prompts.entered == 1  # the second prompt is not encoded any more
        assert server.metric("mixlm_cancelled_total", reason="gone") == 1


@pytest.mark.slow
def test_a_client_that_fills_the_queue_leaves_others_their_share():
    with running(endless(0.01), two_clients(), max_batch=1, max_queue=3) as server, ThreadPoolExecutor(2) as pool:
        many = pool.submit(post, server, "ada", {"n": 4, "max_tokens": 30})
        wait(lambda: server.app.model_thread.num_unfinished == 4)
        assert post(server, "ada", {"max_tokens": 1}).status_code == 429
        single = pool.submit(post, server, "bob", {"max_tokens": 5})
        wait(lambda: server.app.model_thread.num_unfinished == 5)
        assert post(server, "bob", {"n": 2, "max_tokens": 1}).status_code == 429  # more than its share
        assert single.result().status_code == 200
        assert not many.done()
        assert many.result().status_code == 200
        assert post(server, "bob", {"n": 4, "max_tokens": 1}).status_code == 200


@pytest.mark.slow
def test_a_client_that_has_all_slots_gives_one_to_another():
    """Its generation goes on later, with the text that it has alone."""
    with running(endless(0.001), two_clients(), max_batch=2) as server, ThreadPoolExecutor(1) as pool:
        body = {"n": 4, "max_tokens": 80, "seed": 1}
        many = pool.submit(post, server, "ada", body)
        wait(lambda: server.app.model_thread.num_running == 2)
        for _ in range(3):
            assert post(server, "bob", {"max_tokens": 2}).status_code == 200
        assert not many.done()
        assert server.app.model_thread.num_unfinished == 4
        assert many.result().json()["choices"] == post(server, "ada", body).json()["choices"]


@pytest.mark.parametrize("end", ["\r\n\r\n", ""])
@pytest.mark.parametrize("line", ["X-Long: " + "x" * 100_000, "\r\n".join(f"X-{i}: {i:09}" for i in range(6_000))])
def test_a_head_that_is_too_large_is_refused(toys, line, end):
    with raw_connection(toys.url, b"GET /health HTTP/1.1\r\nHost: localhost\r\n") as connection:
        connection.sendall(f"{line}\r\n{end}".encode())
        assert connection.recv(12) == b"HTTP/1.1 431"
    with raw_connection(toys.url, f"GET /health?{'x' * 100_000} HTTP/1.1\r\n".encode()) as connection:
        assert connection.recv(12) == b"HTTP/1.1 431"
    assert toys.client.get("/health", headers={"X-Long": "x" * 50_000}).status_code == 200


def test_the_head_after_a_long_body_may_come_with_it(toys):
    body = {"prompt": "one " * 10, "max_tokens": 1, "user": "x" * 70_000}
    with raw_connection(toys.url, request_bytes(body, "/v1/completions") + b"GET /health HTT") as connection:
        assert connection.recv(12) == b"HTTP/1.1 200"
        connection.sendall(b"P/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert b"HTTP/1.1 200" in b"".join(iter(lambda: connection.recv(1 << 16), b""))


def test_an_endless_head_during_a_response_is_cut_off():
    with running(endless(0.01)) as server:
        connection = raw_connection(server.url, request_bytes({"messages": HELLO, "stream": True, "max_tokens": 3000}))
        assert connection.recv(12) == b"HTTP/1.1 200"
        connection.sendall(b"GET /health HTTP/1.1\r\nX-Long: ")

        def is_closed():
            try:
                connection.sendall(b"x" * 100_000)
            except (ConnectionResetError, BrokenPipeError):
                return True
            return False

        wait(is_closed)
        connection.close()
        wait(lambda: server.app.model_thread.num_unfinished == 0)


@pytest.mark.slow
def test_health_reports_a_step_that_takes_too_long():
    gate = threading.Event()

    engine = EndlessToy(1)
    engine.on_forward = lambda ids, last: gate.wait(20)
    with running(Ensemble([LoadedMember(engine, "m")]), stall_timeout=0.3) as server:
        with ThreadPoolExecutor(1) as pool:
            response = pool.submit(server.chat, max_tokens=2)
            wait(lambda: server.client.get("/health").status_code == 503)
            assert server.client.get("/ready").status_code == 503
            assert "a step of the models has taken" in server.client.get("/health").json()["status"]
            gate.set()
            assert response.result().status_code == 200
        time.sleep(0.4)  # an idle server does not stall
        assert server.client.get("/health").json() == {"status": "ok"}
        assert server.client.get("/ready").status_code == 200


HANG = """
import time
from mixlm.engines import toy
from mixlm.ensemble import Ensemble
def hang(*_arguments):
    time.sleep(1000)
"""
HANGS = {
    "encoding": "Ensemble.encode_prompt = hang",
    "step": "toy.ToyEngine.on_forward = staticmethod(hang)",
    "schema": "from mixlm.core.grammar import GrammarCache; GrammarCache.for_language = hang",
}


@pytest.mark.slow
@pytest.mark.parametrize("hanging", HANGS)
def test_sigterm_ends_the_process_whatever_hangs(start_process, hanging):
    server = start_process("-m", "toy:1", "--grace", "0.2", preamble=f"{HANG}{HANGS[hanging]}\n")
    body = {"messages": HELLO, "response_format": {"type": "json_object"} if hanging == "schema" else None}
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(request_bytes(body))
        time.sleep(0.5)
        start = time.monotonic()
        server.send_signal(signal.SIGTERM)
        assert server.wait(15) == 0
        assert time.monotonic() - start < 8
        assert connection.recv(12) == b"HTTP/1.1 503"


SLOW = """
import time
from mixlm.engines import toy
forward = toy.ToySession.forward
def slow(self, ids, last):
    time.sleep(0.02)
    logits = forward(self, ids, last)
    logits[:, -1] = -100
    return logits
toy.ToySession.forward = slow
"""


@pytest.mark.slow
def test_a_second_sigterm_ends_streams_with_an_error_event(start_process):
    server = start_process("-m", "toy:1", "--grace", "60", preamble=SLOW)
    body = {"messages": HELLO, "stream": True, "max_tokens": 100_000}
    with httpx.stream("POST", server.url + "/v1/chat/completions", json=body) as response:
        chunks = events(response)
        next(chunks)
        server.send_signal(signal.SIGTERM)
        for _ in range(20):
            next(chunks)
        start = time.monotonic()
        server.send_signal(signal.SIGTERM)
        *_, last = chunks
    assert last["error"]["code"] == "stopping"
    assert server.wait() == 0
    assert time.monotonic() - start < 5
