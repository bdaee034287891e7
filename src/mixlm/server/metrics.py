"""The server's metrics, in the text format of Prometheus. They hold nothing of prompts or generated text."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mixlm.types import Completion, Token

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_FORWARD_TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)


class ServerMetrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        by_member = ["model", "member"]
        self._tokens = self._counter("mixlm_tokens", "Generated tokens, by the member that sampled them.", by_member)
        self._forwards = self._counter("mixlm_forwards", "Forward passes.", by_member)
        self._forward_tokens = self._counter("mixlm_forward_tokens", "Tokens in forward passes.", by_member)
        self._cached_tokens = self._counter(
            "mixlm_cached_tokens", "Tokens of prompts that were found in a prefix cache.", by_member
        )
        self._catch_up = self._histogram(
            "mixlm_catch_up_tokens", "Tokens in a forward pass after a member's prefill.", by_member, _FORWARD_TOKENS
        )
        self._drafts = self._renamed("mixlm_draft_tokens", "mixlm_guesses", "Draft tokens.", ["model", "result"])
        self._completions = self._renamed(
            "mixlm_completions", "mixlm_replies", "Finished completions.", ["model", "finish_reason"]
        )
        self._cancelled = self._renamed("mixlm_cancelled", "mixlm_closed", "Cancelled requests.", ["reason"])
        self._errors = self._counter("mixlm_errors", "Error responses.", ["status", "code"])
        self._responses = self._counter("mixlm_requests", "Responses.", ["path", "status"])
        self._first_token = self._histogram(
            "mixlm_time_to_first_token_seconds", "From a request's arrival to its first token.", ["model"], _SECONDS
        )
        self._queue = self._histogram(
            "mixlm_queue_seconds", "From the encoding of a prompt to the start of the generation.", ["model"], _SECONDS
        )
        self._request = self._histogram(
            "mixlm_request_seconds",
            "From a request's arrival to the end of its response.",
            ["path"],
            (*_SECONDS, 300, 600),
        )

    def _counter(self, name: str, text: str, labels: Sequence[str]) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _renamed(self, name: str, old: str, text: str, labels: Sequence[str]) -> list[Counter]:
        """Return a counter, and one that counts the same under its older name."""
        return [self._counter(name, text, labels), self._counter(old, f"The older name of {name}.", labels)]

    def _histogram(self, name: str, text: str, labels: Sequence[str], buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self._registry)

    def add_gauge(self, name: str, text: str, value: Callable[[], float], old: str = "") -> None:
        """Add a gauge. value: called whenever the metrics are rendered. old: its older name, if it had one."""
        Gauge(name, text, registry=self._registry).set_function(value)
        if old:
            Gauge(old, f"The older name of {name}.", registry=self._registry).set_function(value)

    def render(self) -> bytes:
        """Return all metrics in the text format."""
        return generate_latest(self._registry)

    def observe_queue_time(self, model: str, seconds: float) -> None:
        """Record how long a generation waited in the queue."""
        self._queue.labels(model).observe(seconds)

    def observe_first_token(self, model: str, seconds: float) -> None:
        """Record a request's time to first token."""
        self._first_token.labels(model).observe(seconds)

    def count_tokens(self, model: str, tokens: Sequence[Token]) -> None:
        """Count generated tokens."""
        for member, count in collections.Counter(token.member for token in tokens).items():
            self._tokens.labels(model, member).inc(count)

    def count_forwards(self, model: str, member: str, tokens: Sequence[int], *, prefilled: bool) -> None:
        """Count a member's forward passes. tokens: in each pass. prefilled: False if the first is the prefill."""
        self._forwards.labels(model, member).inc(len(tokens))
        self._forward_tokens.labels(model, member).inc(sum(tokens))
        catch_up = self._catch_up.labels(model, member)
        for length in tokens if prefilled else tokens[1:]:
            catch_up.observe(length)

    def count_completion(self, model: str, completion: Completion) -> None:
        """Count a finished completion, with its draft tokens."""
        usage = completion.usage
        for member, part in usage.members.items():
            self._cached_tokens.labels(model, member).inc(part.cached_tokens)
        for counter in self._completions:
            counter.labels(model, completion.finish_reason).inc()
        for counter in self._drafts if usage.drafted else ():
            counter.labels(model, "accepted").inc(usage.accepted)
            counter.labels(model, "rejected").inc(usage.drafted - usage.accepted)

    def count_cancelled(self, reason: str) -> None:
        """Count a cancelled request."""
        for counter in self._cancelled:
            counter.labels(reason).inc()

    def count_error(self, status: int, code: str | None) -> None:
        """Count an error response."""
        self._errors.labels(str(status), code or "other").inc()

    def count_response(self, path: str, status: int, seconds: float) -> None:
        """Count a response. path: of a route; arbitrary paths would let clients fill the memory."""
        self._responses.labels(path, str(status)).inc()
        self._request.labels(path).observe(seconds)
