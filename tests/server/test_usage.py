"""The usage of a request: prompts count once, with the tokens that a prefix cache had."""

from __future__ import annotations

from mixlm.server.completions_format import summed_usage
from mixlm.server.metrics import ServerMetrics
from mixlm.types import Completion, MemberUsage, Usage


def completion(**cached: int) -> Completion:
    members = {
        name: MemberUsage(
            prompt_tokens=tokens, tokens=1, forwards=1, forward_tokens=5, forward_seconds=0.1, cached_tokens=n
        )
        for (name, n), tokens in zip(cached.items(), (30, 40), strict=True)
    }
    return Completion("x", (), "stop", 0, Usage(1, 1, 0.1, 0.1, members))


def test_cached_tokens_are_those_of_the_longest_prompt_and_of_the_first_completion_of_each():
    completions = [completion(a=3, b=10), completion(a=29, b=39), completion(a=20, b=0), completion(a=29, b=39)]
    usage = summed_usage(completions, 2)
    assert usage["prompt_tokens"] == 80
    assert usage["prompt_tokens_details"] == {"cached_tokens": 10}
    assert {name: member["cached_tokens"] for name, member in usage["mixlm"]["members"].items()} == {"a": 23, "b": 10}


def test_the_metrics_count_cached_tokens_of_every_completion():
    metrics = ServerMetrics()
    for part in (completion(a=3, b=10), completion(a=29, b=39)):
        metrics.count_completion("pair", part)
    lines = metrics.render().decode().splitlines()
    assert 'mixlm_cached_tokens_total{member="a",model="pair"} 32.0' in lines
    assert 'mixlm_cached_tokens_total{member="b",model="pair"} 49.0' in lines
