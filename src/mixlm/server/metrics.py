"""What a server counts, in the text format of Prometheus. Nothing of what was asked or written is in it."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mixlm.types import Completion, Token

TEXT = "text/plain; version=0.0.4; charset=utf-8"
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)


class Metrics:
    """The figures of one server; several in one process do not meet."""

    def __init__(self) -> None:
        self._all = CollectorRegistry()
        by_member = ["model", "member"]
        self._tokens = self._counter("mixlm_tokens", "Tokens written, by the member that wrote them.", by_member)
        self._forwards = self._counter("mixlm_forwards", "Forward passes.", by_member)
        self._run = self._counter("mixlm_forward_tokens", "Tokens run through forward passes.", by_member)
        self._caught_up = Histogram(
            "mixlm_catch_up_tokens",
            "Tokens in a forward pass behind the first of a reply: how much a member had missed.",
            by_member,
            buckets=_LENGTHS,
            registry=self._all,
        )
        self._guesses = self._counter("mixlm_guesses", "Guesses of what comes next.", ["model", "result"])
        self._replies = self._counter("mixlm_replies", "Finished replies.", ["model", "finish_reason"])
        self._closed = self._counter("mixlm_closed", "Requests that were given up.", ["reason"])
        self._errors = self._counter("mixlm_errors", "Responses that are errors.", ["status", "code"])
        self._requests = self._counter("mixlm_requests", "Responses.", ["path", "status"])
        self._first = Histogram(
            "mixlm_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            ["model"],
            buckets=_FIRST,
            registry=self._all,
        )
        self._queued = Histogram(
            "mixlm_queue_seconds",
            "From the moment a reply's prompt is read until its turn comes.",
            ["model"],
            buckets=_FIRST,
            registry=self._all,
        )
        self._seconds = Histogram(
            "mixlm_request_seconds",
            "From a request's arrival to the end of its response.",
            ["path"],
            buckets=(*_FIRST, 300, 600),
            registry=self._all,
        )

    def _counter(self, name: str, text: str, labels: Sequence[str]) -> Counter:
        return Counter(name, text, labels, registry=self._all)

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a figure that is asked for when somebody reads them."""
        Gauge(name, text, registry=self._all).set_function(value)

    def text(self) -> bytes:
        """Return all figures."""
        return generate_latest(self._all)

    def queued(self, model: str, seconds: float) -> None:
        """Count how long a reply waited for its turn."""
        self._queued.labels(model).observe(seconds)

    def first(self, model: str, seconds: float) -> None:
        """Count a request's first token."""
        self._first.labels(model).observe(seconds)

    def wrote(self, model: str, tokens: Sequence[Token]) -> None:
        """Count tokens."""
        for member, count in Tally(one.member for one in tokens).items():
            self._tokens.labels(model, member).inc(count)

    def ran(self, model: str, member: str, tokens: Sequence[int], *, begun: bool) -> None:
        """Count a member's forward passes. tokens: of each. begun: whether the first is behind another of its reply."""
        self._forwards.labels(model, member).inc(len(tokens))
        self._run.labels(model, member).inc(sum(tokens))
        caught_up = self._caught_up.labels(model, member)
        for length in tokens if begun else tokens[1:]:
            caught_up.observe(length)

    def finished(self, model: str, completion: Completion) -> None:
        """Count a finished reply."""
        usage = completion.usage
        self._replies.labels(model, completion.finish_reason).inc()
        if usage.drafted:
            self._guesses.labels(model, "accepted").inc(usage.accepted)
            self._guesses.labels(model, "rejected").inc(usage.drafted - usage.accepted)

    def closed(self, reason: str) -> None:
        """Count a request that was given up."""
        self._closed.labels(reason).inc()

    def problem(self, status: int, code: str | None) -> None:
        """Count an error."""
        self._errors.labels(str(status), code or "other").inc()

    def response(self, path: str, status: int, seconds: float) -> None:
        """Count a response. path: that of a route, never what a client made up."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)
