"""Traces: spans, their context, and a receiver that decodes them."""

from __future__ import annotations

import gzip
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from typing import Any

import pytest
from serving import RunningServer, endless, events, raw_connection, request_bytes, running, wait

from mixlm.errors import UsageError
from mixlm.loading import load
from mixlm.server.tracing import RequestTracer, tracer_for

needs_sdk = pytest.mark.skipif(find_spec("opentelemetry") is None, reason="OpenTelemetry is not installed")
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PHASES = ["prepare", "queue", "prefill", "write"]
SECRET = "a-word-that-nobody-else-says"


class TracedServer:
    """A server whose spans are collected in memory."""

    def __init__(self, server: RunningServer, exporter: Any) -> None:
        self.server = server
        self._exporter = exporter

    def spans(self, requests: int) -> list[Any]:
        """All spans, by start, once so many requests are over; a response may arrive before its span."""

        def finished() -> tuple[Any, ...]:
            self.server.app.tracer._provider.force_flush()
            return self._exporter.get_finished_spans()

        wait(lambda: len([span for span in finished() if span.name not in PHASES]) == requests)
        return sorted(finished(), key=lambda span: (span.start_time, span.name in PHASES))


@pytest.fixture
def traced() -> Iterator[TracedServer]:
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter = memory.InMemorySpanExporter()
    with running(load("toy:1", "toy:2"), tracer=RequestTracer(exporter)) as server:
        yield TracedServer(server, exporter)


@pytest.mark.slow
def test_nothing_is_imported_unless_a_receiver_is_named():
    code = (
        "import sys, mixlm.server.http_server, mixlm.cli.serve; from mixlm.server.tracing import tracer_for\n"
        "assert tracer_for(None, {}) is None; assert 'opentelemetry' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_receiver_is_a_url():
    with pytest.raises(UsageError, match="must be a URL"):
        tracer_for("localhost:4318", {})


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_span_with_its_phases(traced, stream):
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine-1"}
    body = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 6, "seed": 1, "stream": stream}
    response = traced.server.post("/v1/chat/completions", body, headers=headers)
    assert response.status_code == 200
    root, *phases = traced.spans(1)
    assert root.name == "POST /v1/chat/completions"
    assert root.kind.name == "SERVER"
    assert f"{root.context.trace_id:032x}" == TRACE
    assert f"{root.parent.span_id:016x}" == PARENT
    assert [span.name for span in phases] == PHASES
    # The phases follow each other, and cover the request.
    assert all(span.parent.span_id == root.context.span_id for span in phases)
    assert [span.start_time for span in phases] == [root.start_time, *(span.end_time for span in phases[:-1])]
    assert phases[-1].end_time <= root.end_time
    attributes = root.attributes
    expected = load("toy:1", "toy:2").generate(SECRET, max_tokens=6, seed=1)
    assert attributes["mixlm.request_id"] == "mine-1"
    assert attributes["http.response.status_code"] == 200
    assert attributes["gen_ai.request.model"] == "toys"
    assert (attributes["mixlm.method"], attributes["mixlm.unit"]) == ("mixture", "token")
    assert attributes["gen_ai.usage.output_tokens"] == expected.usage.tokens
    assert attributes["mixlm.members"] == ("toy:1", "toy:2")
    members = expected.usage.members.values()
    assert attributes["mixlm.member.tokens"] == tuple(member.tokens for member in members)
    assert attributes["mixlm.member.forwards"] == tuple(member.forwards for member in members)
    everything = repr([(span.name, span.attributes, span.events, span.status) for span in (root, *phases)])
    assert SECRET not in everything
    assert not expected.text.strip() or expected.text.strip() not in everything


def test_a_trace_that_the_client_does_not_sample_is_not_exported(traced):
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    assert traced.server.post("/v1/chat/completions", body, headers=headers).status_code == 200
    traced.server.chat(max_tokens=2)
    [root] = [span for span in traced.spans(1) if span.name not in PHASES]
    assert root.parent is None


def test_errors_are_traced_and_health_checks_are_not(traced):
    for path in ("/", "/health", "/ready", "/metrics", "/v1/made/up"):
        traced.server.client.get(path)
    traced.server.chat(best_of=2)
    spans = {span.name: span.attributes for span in traced.spans(2)}
    assert set(spans) == {"GET other", "POST /v1/chat/completions"}
    assert spans["POST /v1/chat/completions"]["error.type"] == "unsupported_field"
    assert spans["POST /v1/chat/completions"]["http.response.status_code"] == 400


@needs_sdk
def test_a_request_that_ends_in_the_queue():
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 10_000, "stream": True}
    with running(endless(0.01), tracer=RequestTracer(exporter), max_batch=1) as server:
        with server.client.stream("POST", "/v1/chat/completions", json=body, headers={"x-request-id": "a"}) as first:
            chunks = events(first)
            next(chunks)
            with raw_connection(server.url, request_bytes(body, headers="X-Request-Id: b\r\n")) as second:
                assert second.recv(12) == b"HTTP/1.1 200"  # its prompt has been read
            wait(lambda: server.app.model_thread.num_unfinished == 1)
        wait(lambda: server.app.model_thread.num_unfinished == 0)
    spans = exporter.get_finished_spans()
    roots = {span.attributes["mixlm.request_id"]: span for span in spans if span.parent is None}
    for name, phases in (("a", PHASES), ("b", PHASES[:2])):
        assert [
            span.name for span in spans if span.parent and span.parent.span_id == roots[name].context.span_id
        ] == phases
        assert roots[name].attributes["mixlm.cancelled"] == "gone"
    assert roots["a"].attributes["gen_ai.usage.output_tokens"] > 0
    assert sum(roots["a"].attributes["mixlm.member.forwards"]) > 0
    assert roots["b"].attributes["gen_ai.usage.output_tokens"] == 0


@pytest.mark.slow
@needs_sdk
def test_a_request_that_takes_too_long_is_an_error():
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    with running(endless(0.01), tracer=RequestTracer(exporter), request_timeout=0.3) as server:
        assert server.chat(max_tokens=10_000).status_code == 504
    [root] = [span for span in exporter.get_finished_spans() if span.parent is None]
    assert root.attributes["mixlm.cancelled"] == root.attributes["error.type"] == "timeout"
    assert root.status.status_code.name == "ERROR"


class Receiver(ThreadingHTTPServer):
    """Receives OTLP, and decodes it."""

    def __init__(self) -> None:
        self.got: list[Any] = []
        super().__init__(("127.0.0.1", 0), _Taking)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Taking(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        data = self.rfile.read(int(self.headers["content-length"]))
        data = gzip.decompress(data) if self.headers.get("content-encoding") == "gzip" else data
        self.server.got.append((self.path, ExportTraceServiceRequest.FromString(data)))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.slow
@needs_sdk
@pytest.mark.parametrize("by_option", [True, False])
def test_a_receiver_gets_the_spans(start_process, by_option):
    receiver = Receiver()
    try:
        options = ["--traces", receiver.url] if by_option else []
        environment = {} if by_option else {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, "OTEL_SERVICE_NAME": "mine"}
        server = start_process("-m", "toy:1", "-m", "toy:2", *options, NO_PROXY="*", **environment)
        import httpx

        with httpx.Client(base_url=server.url, trust_env=False) as client:
            body = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 4, "stream": True}
            with client.stream("POST", "/v1/chat/completions", json=body) as response:
                assert list(events(response))
                identity = response.headers["x-request-id"]
        server.send_signal(signal.SIGTERM)
        assert server.wait() == 0
    finally:
        receiver.shutdown()
        receiver.server_close()
    [(path, sent)] = receiver.got
    assert path == "/v1/traces"
    [resource] = sent.resource_spans
    about = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
    assert about["service.name"] == ("mixlm" if by_option else "mine")
    spans = [span for scope in resource.scope_spans for span in scope.spans]
    [root] = [span for span in spans if not span.parent_span_id]
    assert sorted(span.name for span in spans if span.parent_span_id == root.span_id) == sorted(PHASES)
    attributes = {attribute.key: attribute.value for attribute in root.attributes}
    assert attributes["mixlm.request_id"].string_value == identity
    assert SECRET.encode() not in sent.SerializeToString()
    [line] = [line for line in server.log if line.get("path") == "/v1/chat/completions"]
    assert line["trace"] == root.trace_id.hex()


@pytest.mark.slow
@needs_sdk
def test_an_unreachable_receiver_delays_nothing(start_process):
    server = start_process("-m", "toy:1", "--traces", "http://127.0.0.1:9", NO_PROXY="*")
    import httpx

    body = {"prompt": SECRET, "max_tokens": 4}
    assert httpx.post(f"{server.url}/v1/completions", json=body, trust_env=False).status_code == 200
    server.send_signal(signal.SIGTERM)
    start = time.monotonic()
    assert server.wait() == 0
    assert time.monotonic() - start < 10
    # What it has to say about that is a line of the log like any other.
    assert all(line.startswith(("{", "serving", "loading")) for line in server.lines if line.strip())
    assert any("trac" in line["event"].lower() or "export" in line["event"].lower() for line in server.log)
