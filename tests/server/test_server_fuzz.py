"""Random requests: generated from the OpenAPI document, and corrupted valid ones."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from serving import HELLO, running

from mixlm.loading import load

CHAT = {
    "messages": HELLO, "model": "toys", "max_tokens": 2, "temperature": 0.5, "stop": ["x"], "n": 1, "stream": True,
    "seed": 1, "stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 1,
    "mixlm": {"top_k": 2, "weights": [1, 2], "method": "mixture"},
}  # fmt: skip
TEXT = {
    "prompt": ["one", "two"],
    "max_tokens": 2,
    "logprobs": 1,
    "n": 2,
    "logit_bias": {" river": 1.5},
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [1, "b"]}}},
    "mixlm": {"min_p": 0.1},
}
ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1e308, -1e308, 5e-324, 2**63, 2**64, 10**30, "", "x" * 2000, "\u0000", "\ud83d\ude00",
    [], {}, [None], [[]], {"": None}, "0", "null", [1, "a"], {"type": "text"},
)  # fmt: skip


def schemathesis_cases() -> list[tuple[str, str]]:
    from mixlm.server.limits import ServerLimits
    from mixlm.server.openapi import openapi_document

    paths = openapi_document(ServerLimits())["paths"]
    return [(path, method) for path, item in paths.items() for method in item if method != "parameters"]


@pytest.mark.slow
@pytest.mark.parametrize(("path", "method"), schemathesis_cases())
def test_requests_made_from_the_description(brief, path, method):
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    schema = schemathesis.openapi.from_dict(brief.client.get("/openapi.json").json())
    checks = [
        schemathesis.checks.not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_schema_conformance,
    ]
    seen = []

    @given(case=schema[path][method.upper()].as_strategy())
    @settings(max_examples=40, suppress_health_check=list(HealthCheck))
    def send(case):
        if isinstance(case.body, dict):
            case.body["max_output_tokens" if path == "/v1/responses" else "max_tokens"] = 2
            case.body["stream"] = False
            # What hardly any made-up value fits.
            names = ("max_completion_tokens", "stream_options", "model", "previous_response_id", "include")
            for name in (
                *names,
                "tool_choice",
                "chat_template_kwargs",
                "reasoning_effort",
                "verbosity",
                "reasoning",
                "guided_json",
            ):
                case.body.pop(name, None)
        response = case.call_and_validate(base_url=brief.url, checks=checks)
        seen.append(response.status_code)

    send()
    # Bodies of the newer APIs are rarely right in all parts; what matters is that no status is a surprise.
    assert 200 in seen or method in ("get", "delete") or path in ("/v1/responses", "/v1/messages"), sorted(set(seen))


def corrupted(body: Any, rng: random.Random) -> Any:
    """A copy of a body in which one place, at any depth, holds something else."""
    if not isinstance(body, dict | list) or not body or rng.random() < 0.3:
        return rng.choice(ODD)
    if isinstance(body, list):
        position = rng.randrange(len(body))
        return [corrupted(item, rng) if i == position else item for i, item in enumerate(body)]
    key = rng.choice(list(body))
    if rng.random() < 0.1:
        return {
            **body,
            rng.choice(["x", "", "\u0000", "tools", "logit_bias", "messages"]): rng.choice(ODD),
        }
    return {**body, key: corrupted(body[key], rng)}


@pytest.fixture(scope="module")
def brief():
    """A server whose completions are short unless a request says otherwise."""
    pair = load("toy:1", "toy:2")
    pair.defaults = pair.settings(max_tokens=2)
    with running({"toys": pair}) as server:
        yield server


@pytest.mark.slow
def test_corrupted_requests_are_never_the_servers_fault(brief):
    rng = random.Random(0)
    statuses = set()
    for i in range(600):
        path, body = (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT))[i % 2]
        request_body = corrupted(body, rng)
        if (
            isinstance(request_body, dict)
            and isinstance(request_body.get("max_tokens"), int)
            and request_body["max_tokens"] > 5
        ):
            continue
        data = json.dumps(request_body).encode()
        if i % 5 == 0:
            position = rng.randrange(len(data))
            data = data[:position] + bytes([rng.randrange(256)]) + data[position + rng.randrange(3) :]
        response = brief.client.post(path, content=data, headers={"content-type": "application/json"})
        statuses.add(response.status_code)
        assert response.status_code < 500, (data, response.text)
        if response.status_code != 200:
            assert response.json()["error"]["message"]
    assert {200, 400} <= statuses
    assert brief.app.model_thread.num_unfinished == 0
