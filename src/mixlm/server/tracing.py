"""Traces of requests, for a receiver of OpenTelemetry's protocol (OTLP over HTTP). Off unless one is named.

A request is a span, with the times of its parts as children: `prepare` (its body and prompts are read), `queue`,
`prefill` (up to the first token) and `write`. What was asked or written is in none of them. OpenTelemetry is imported
where a receiver is named, and not before; spans are made when a request is over, and sent by a thread of their own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from threading import Timer
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from mixlm.errors import MixlmError, UsageError
from mixlm.version import __version__

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

# Where other programs are told to send their traces; the first is the one for traces alone.
VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PARTS = ("prepare", "queue", "prefill", "write")
_PATH = "/v1/traces"
# How long a server that stops waits for its last spans to be taken, seconds.
_LAST = 2.0


@dataclass
class Steps:
    """How far a request got, on the clock of `time.monotonic`, and what its span says of it.

    prepared: its prompts were read. started: its first reply left the line. first: its first token came.
    """

    prepared: float | None = None
    started: float | None = None
    first: float | None = None
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """A request that is over. arrived: on the clock of `time.monotonic`. error: a word for what went wrong."""

    method: str
    path: str
    status: int
    arrived: float
    identity: str
    error: str | None
    steps: Steps | None


class Traces:
    """Makes spans and hands them to an exporter."""

    def __init__(self, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        named = {SERVICE_VERSION: __version__}
        if not os.environ.get("OTEL_SERVICE_NAME") and SERVICE_NAME not in os.environ.get(
            "OTEL_RESOURCE_ATTRIBUTES", ""
        ):
            named[SERVICE_NAME] = "mixlm"
        self._provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
        self._exporter = exporter
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("mixlm.server", __version__)
        self._incoming = TraceContextTextMapPropagator()

    def request(self, ended: Ended, headers: Mapping[str, str]) -> str:
        """Make the spans of a request; its `traceparent` is continued. Returns the id of the trace, in hexadecimal."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, format_trace_id, set_span_in_context

        now, clock = time.monotonic(), time.time_ns()

        def at(moment: float) -> int:
            return clock - int(1e9 * (now - moment))

        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        attributes = {
            "http.request.method": ended.method,
            "http.route": ended.path,
            "http.response.status_code": ended.status,
            "mixlm.request_id": ended.identity,
            **(ended.steps.attributes if ended.steps is not None else {}),
        }
        if ended.error is not None:
            attributes["error.type"] = ended.error
        span = self._tracer.start_span(
            f"{ended.method} {ended.path}",
            context=self._incoming.extract(carrier),
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=at(ended.arrived),
        )
        if ended.steps is not None and span.is_recording():
            steps, inside = ended.steps, set_span_in_context(span)
            begins = [ended.arrived, steps.prepared, steps.started, steps.first]
            for name, begin, end in zip(_PARTS, begins, [*begins[1:], None], strict=True):
                if begin is None:
                    break
                child = self._tracer.start_span(name, context=inside, start_time=at(begin))
                child.end(at(now if end is None else end))
        if ended.status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(at(now))
        identity: str = format_trace_id(span.get_span_context().trace_id)
        return identity

    def close(self) -> None:
        """Send what is left, for as long as a stopping server may wait for it."""
        # To shut down sends what is left, and has no time limit of its own; an exporter that is shut down gives up.
        late = Timer(_LAST, self._exporter.shutdown)
        late.start()
        self._provider.shutdown()
        late.cancel()


def traces_to(url: str | None, environment: Mapping[str, str]) -> Traces | None:
    """Return what sends traces to a receiver; of none, to the one that the environment names, else None.

    url: such as http://localhost:4318; a path is taken as it is, and without one it is that of the protocol. Raises
    UsageError for what is no such address, MixlmError where the libraries are missing.
    """
    if url is None and not any(environment.get(one) for one in VARIABLES):
        return None
    if url is not None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"--traces is {url!r}; it must be an address", "such as http://localhost:4318")
        url = url if parts.path not in ("", "/") else parts._replace(path=_PATH).geturl()
    if find_spec("opentelemetry") is None or find_spec("opentelemetry.exporter") is None:
        named = "--traces" if url is not None else next(one for one in VARIABLES if environment.get(one))
        raise MixlmError(f"{named} is given, and OpenTelemetry is missing", "install: pip install 'mixlm[otel]'")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    # Without an endpoint of its own, the exporter reads the environment.
    return Traces(cast("SpanExporter", OTLPSpanExporter(endpoint=url)))
