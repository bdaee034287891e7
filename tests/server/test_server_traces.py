"""Traces: what spans say, whose they continue, and that a receiver understands them."""

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
from serving import Running, endless, events, raw, request_bytes, running

from mixlm.errors import UsageError
from mixlm.loading import load
from mixlm.server.tracing import Traces, traces_to

needs_sdk = pytest.mark.skipif(find_spec("opentelemetry") is None, reason="OpenTelemetry is not installed")
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARTS = ["prepare", "queue", "prefill", "write"]
SECRET = "a-word-that-nobody-else-says"


class Kept:
    """A server whose spans are kept in memory."""

    def __init__(self, server: Running, exporter: Any) -> None:
        self.server = server
        self._exporter = exporter

    def spans(self, requests: int) -> list[Any]:
        """All spans, by when they began, once so many requests are over; a response may be there before its span."""

        def found() -> tuple[Any, ...]:
            self.server.server.traces._provider.force_flush()
            return self._exporter.get_finished_spans()

        self.server.wait(lambda: len([one for one in found() if one.name not in PARTS]) == requests)
        return sorted(found(), key=lambda one: (one.start_time, one.name in PARTS))


@pytest.fixture
def kept() -> Iterator[Kept]:
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter = memory.InMemorySpanExporter()
    with running(load("toy:1", "toy:2"), traces=Traces(exporter)) as one:
        yield Kept(one, exporter)


def test_nothing_is_imported_unless_a_receiver_is_named():
    code = (
        "import sys, mixlm.server.http_server, mixlm.cli.serve; from mixlm.server.tracing import traces_to\n"
        "assert traces_to(None, {}) is None; assert 'opentelemetry' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_receiver_is_an_address():
    with pytest.raises(UsageError, match="must be an address"):
        traces_to("localhost:4318", {})


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_span_with_its_parts(kept, stream):
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine-1"}
    body = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 6, "seed": 1, "stream": stream}
    response = kept.server.post("/v1/chat/completions", body, headers=headers)
    assert response.status_code == 200
    root, *parts = kept.spans(1)
    assert root.name == "POST /v1/chat/completions"
    assert root.kind.name == "SERVER"
    assert f"{root.context.trace_id:032x}" == TRACE
    assert f"{root.parent.span_id:016x}" == PARENT
    assert [one.name for one in parts] == PARTS
    # The parts are the whole of it, one behind the other.
    assert all(one.parent.span_id == root.context.span_id for one in parts)
    assert [one.start_time for one in parts] == [root.start_time, *(one.end_time for one in parts[:-1])]
    assert parts[-1].end_time <= root.end_time
    said = root.attributes
    expected = load("toy:1", "toy:2").generate(SECRET, max_tokens=6, seed=1)
    assert said["mixlm.request_id"] == "mine-1"
    assert said["http.response.status_code"] == 200
    assert said["gen_ai.request.model"] == "toys"
    assert (said["mixlm.method"], said["mixlm.unit"]) == ("mixture", "token")
    assert said["gen_ai.usage.output_tokens"] == expected.usage.tokens
    assert said["mixlm.members"] == ("toy:1", "toy:2")
    members = expected.usage.members.values()
    assert said["mixlm.member.tokens"] == tuple(one.tokens for one in members)
    assert said["mixlm.member.forwards"] == tuple(one.forwards for one in members)
    everything = repr([(one.name, one.attributes, one.events, one.status) for one in (root, *parts)])
    assert SECRET not in everything
    assert not expected.text.strip() or expected.text.strip() not in everything


def test_what_the_client_does_not_sample_is_not_sent(kept):
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    assert kept.server.post("/v1/chat/completions", body, headers=headers).status_code == 200
    kept.server.chat(max_tokens=2)
    [own] = [one for one in kept.spans(1) if one.name not in PARTS]
    assert own.parent is None


def test_refusals_and_unknown_paths_are_spans_and_questions_of_supervisors_are_not(kept):
    for path in ("/", "/health", "/ready", "/metrics", "/v1/made/up"):
        kept.server.client.get(path)
    kept.server.chat(tools=[{"type": "function"}])
    spans = {one.name: one.attributes for one in kept.spans(2)}
    assert set(spans) == {"GET other", "POST /v1/chat/completions"}
    assert spans["POST /v1/chat/completions"]["error.type"] == "unsupported_field"
    assert spans["POST /v1/chat/completions"]["http.response.status_code"] == 400


@needs_sdk
def test_a_request_that_ends_in_the_queue_says_so():
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 10_000, "stream": True}
    with running(endless(0.01), traces=Traces(exporter), at_once=1) as one:
        with one.client.stream("POST", "/v1/chat/completions", json=body, headers={"x-request-id": "a"}) as first:
            found = events(first)
            next(found)
            with raw(one.url, request_bytes(body, head="X-Request-Id: b\r\n")) as second:
                assert second.recv(12) == b"HTTP/1.1 200"  # its prompt has been read
            one.wait(lambda: one.server.worker.unended == 1)
        one.wait(lambda: one.server.worker.unended == 0)
    spans = exporter.get_finished_spans()
    roots = {span.attributes["mixlm.request_id"]: span for span in spans if span.parent is None}
    for name, parts in (("a", PARTS), ("b", PARTS[:2])):
        assert [
            span.name for span in spans if span.parent and span.parent.span_id == roots[name].context.span_id
        ] == parts
        assert roots[name].attributes["mixlm.closed"] == "gone"
    assert roots["a"].attributes["gen_ai.usage.output_tokens"] > 0
    assert sum(roots["a"].attributes["mixlm.member.forwards"]) > 0
    assert roots["b"].attributes["gen_ai.usage.output_tokens"] == 0


@needs_sdk
def test_a_request_that_takes_too_long_is_an_error():
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    with running(endless(0.01), traces=Traces(exporter), timeout=0.3) as one:
        assert one.chat(max_tokens=10_000).status_code == 504
    [root] = [span for span in exporter.get_finished_spans() if span.parent is None]
    assert root.attributes["mixlm.closed"] == root.attributes["error.type"] == "timeout"
    assert root.status.status_code.name == "ERROR"


class Receiver(ThreadingHTTPServer):
    """Takes what OTLP sends, and decodes it."""

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


@needs_sdk
@pytest.mark.parametrize("by_option", [True, False])
def test_a_receiver_gets_them(process, by_option):
    receiver = Receiver()
    try:
        options = ["--traces", receiver.url] if by_option else []
        environment = {} if by_option else {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, "OTEL_SERVICE_NAME": "mine"}
        one = process("-m", "toy:1", "-m", "toy:2", *options, NO_PROXY="*", **environment)
        import httpx

        with httpx.Client(base_url=one.url, trust_env=False) as client:
            body = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 4, "stream": True}
            with client.stream("POST", "/v1/chat/completions", json=body) as response:
                assert list(events(response))
                identity = response.headers["x-request-id"]
        one.send(signal.SIGTERM)
        assert one.end() == 0
    finally:
        receiver.shutdown()
        receiver.server_close()
    [(path, sent)] = receiver.got
    assert path == "/v1/traces"
    [resource] = sent.resource_spans
    about = {each.key: each.value.string_value for each in resource.resource.attributes}
    assert about["service.name"] == ("mixlm" if by_option else "mine")
    spans = [each for scope in resource.scope_spans for each in scope.spans]
    [root] = [each for each in spans if not each.parent_span_id]
    assert sorted(each.name for each in spans if each.parent_span_id == root.span_id) == sorted(PARTS)
    attributes = {each.key: each.value for each in root.attributes}
    assert attributes["mixlm.request_id"].string_value == identity
    assert SECRET.encode() not in sent.SerializeToString()
    [line] = [each for each in one.log if each.get("path") == "/v1/chat/completions"]
    assert line["trace"] == root.trace_id.hex()


@needs_sdk
def test_a_receiver_that_is_not_there_holds_nothing_up(process):
    one = process("-m", "toy:1", "--traces", "http://127.0.0.1:9", NO_PROXY="*")
    import httpx

    body = {"prompt": SECRET, "max_tokens": 4}
    assert httpx.post(f"{one.url}/v1/completions", json=body, trust_env=False).status_code == 200
    one.send(signal.SIGTERM)
    start = time.monotonic()
    assert one.end() == 0
    assert time.monotonic() - start < 10
    # What it has to say about that is a line of the log like any other.
    assert all(line.startswith(("{", "serving", "loading")) for line in one.lines if line.strip())
    assert any("trac" in each["event"].lower() or "export" in each["event"].lower() for each in one.log)
