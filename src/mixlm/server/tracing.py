"""Traces of requests, exported by OTLP over HTTP. Off unless a receiver is named.

A request is a span. Its phases are child spans: `prepare` (reading the body, encoding the prompts), `queue`, `prefill`
(up to the first token) and `write`. No span holds a prompt or generated text. OpenTelemetry is imported only when a
receiver is named. Spans are made when a request is over, and exported by a thread of their own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from importlib.util import find_spec
from threading import Timer
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

from mixlm.errors import MixlmError, UsageError
from mixlm.server.request_record import RequestRecord
from mixlm.version import __version__

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

# Variables of the OpenTelemetry specification that name a receiver; the first is for traces alone.
VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PHASES = ("prepare", "queue", "prefill", "write")
_PATH = "/v1/traces"
# How long a server that stops waits for its last spans to be exported, seconds.
_FLUSH_SECONDS = 2.0


class RequestTracer:
    """Makes the spans of requests and hands them to an exporter."""

    def __init__(self, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = {SERVICE_VERSION: __version__}
        if not os.environ.get("OTEL_SERVICE_NAME") and SERVICE_NAME not in os.environ.get(
            "OTEL_RESOURCE_ATTRIBUTES", ""
        ):
            resource[SERVICE_NAME] = "mixlm"
        self._provider = TracerProvider(resource=Resource.create(resource), shutdown_on_exit=False)
        self._exporter = exporter
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("mixlm.server", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def record(self, record: RequestRecord, status: int, headers: Mapping[str, str]) -> str:
        """Make the spans of a finished request, in the trace that its `traceparent` names. Returns the trace's id."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, format_trace_id, set_span_in_context

        now, wall_clock = time.monotonic(), time.time_ns()

        def nanoseconds(moment: float) -> int:
            return wall_clock - int(1e9 * (now - moment))

        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        attributes = {
            "http.request.method": record.method,
            "http.route": record.path,
            "http.response.status_code": status,
            "mixlm.request_id": record.request_id,
            **record.trace_attributes,
        }
        if record.error is not None:
            attributes["error.type"] = record.error
        span = self._tracer.start_span(
            f"{record.method} {record.path}",
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=nanoseconds(record.arrived),
        )
        # Only requests that became a job have phases.
        if record.completions is not None and span.is_recording():
            context = set_span_in_context(span)
            starts = [record.arrived, record.prepared, record.started, record.first_token]
            for name, start, end in zip(_PHASES, starts, [*starts[1:], None], strict=True):
                if start is None:
                    break
                child = self._tracer.start_span(name, context=context, start_time=nanoseconds(start))
                child.end(nanoseconds(now if end is None else end))
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(nanoseconds(now))
        trace_id: str = format_trace_id(span.get_span_context().trace_id)
        return trace_id

    def close(self) -> None:
        """Export the remaining spans, within the time that a stopping server may wait."""
        # The provider's shutdown exports them without a time limit; an exporter that is shut down gives up.
        timer = Timer(_FLUSH_SECONDS, self._exporter.shutdown)
        timer.start()
        self._provider.shutdown()
        timer.cancel()


def tracer_for(url: str | None, environment: Mapping[str, str]) -> RequestTracer | None:
    """Return a tracer for a receiver; without a URL, for the one that the environment names, else None.

    Args:
        url: Such as http://localhost:4318; without a path, the path of the protocol is added.
        environment: Where the variables of the OpenTelemetry specification are looked up.

    Raises:
        UsageError: The URL is invalid.
        MixlmError: OpenTelemetry is not installed.
    """
    if url is None and not any(environment.get(variable) for variable in VARIABLES):
        return None
    if url is not None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"--traces is {url!r}; it must be a URL", "such as http://localhost:4318")
        url = url if parts.path not in ("", "/") else parts._replace(path=_PATH).geturl()
    if find_spec("opentelemetry") is None or find_spec("opentelemetry.exporter") is None:
        source = "--traces" if url is not None else next(name for name in VARIABLES if environment.get(name))
        raise MixlmError(f"{source} is set, but OpenTelemetry is missing", "install: pip install 'mixlm[otel]'")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    # Without an endpoint, the exporter reads the environment.
    return RequestTracer(cast("SpanExporter", OTLPSpanExporter(endpoint=url)))
