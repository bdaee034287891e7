"""The server's metrics, in the text format of Prometheus. They hold nothing of prompts or generated text."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mixlm.types import Completion, Token

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_FORWARD_TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)
# Metrics that are there under their older names too.
_OLDER_NAMES = {
    "mixlm_draft_tokens": "mixlm_guesses",
    "mixlm_completions": "mixlm_replies",
    "mixlm_cancelled": "mixlm_closed",
    "mixlm_running": "mixlm_writing",
}


class ServerMetrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        counter = partial(Counter, registry=self._registry)
        histogram = partial(Histogram, registry=self._registry, buckets=_SECONDS)
        by_member = ["model", "member"]
        self._tokens = counter("mixlm_tokens", "Generated tokens, by the member that sampled them.", by_member)
        self._forwards = counter("mixlm_forwards", "Forward passes.", by_member)
        self._forward_tokens = counter("mixlm_forward_tokens", "Tokens in forward passes.", by_member)
        cached = "Tokens of prompts that were found in a prefix cache."
        self._cached_tokens = counter("mixlm_cached_tokens", cached, by_member)
        caught_up = "Tokens in a forward pass after a member's prefill."
        self._catch_up = histogram("mixlm_catch_up_tokens", caught_up, by_member, buckets=_FORWARD_TOKENS)
        self._draft_tokens = counter("mixlm_draft_tokens", "Draft tokens.", ["model", "result"])
        self._completions = counter("mixlm_completions", "Finished completions.", ["model", "finish_reason"])
        self._errors = counter("mixlm_errors", "Error responses.", ["status", "code"])
        self.cancelled = counter("mixlm_cancelled", "Cancelled requests.", ["reason"])
        # By path of a route: arbitrary paths would let clients fill the memory.
        self.responses = counter("mixlm_requests", "Responses.", ["path", "status"])
        whole = "From a request's arrival to the end of its response."
        self.response_seconds = histogram("mixlm_request_seconds", whole, ["path"], buckets=(*_SECONDS, 300, 600))
        first = "From a request's arrival to its first token."
        self.first_token_seconds = histogram("mixlm_time_to_first_token_seconds", first, ["model"])
        waiting = "From the encoding of a prompt to the start of the generation."
        self.queue_seconds = histogram("mixlm_queue_seconds", waiting, ["model"])

    def add_gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge. value: called whenever the metrics are rendered."""
        Gauge(name, text, registry=self._registry).set_function(value)

    def render(self) -> bytes:
        """Return all metrics in the text format."""
        text = generate_latest(self._registry).decode()
        for name, old in _OLDER_NAMES.items():
            lines = re.findall(rf"^(?:# \w+ )?{name}(?:_total)?\b.*\n", text, re.MULTILINE)
            text += "".join(lines).replace(name, old)
        return text.encode()

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
        self._completions.labels(model, completion.finish_reason).inc()
        if usage.drafted:
            self._draft_tokens.labels(model, "accepted").inc(usage.accepted)
            self._draft_tokens.labels(model, "rejected").inc(usage.drafted - usage.accepted)

    def count_error(self, status: int, code: str | None) -> None:
        """Count an error response."""
        self._errors.labels(str(status), code or "other").inc()
