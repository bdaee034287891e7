"""Engines that report their most likely tokens only, under a grammar: the most likely ones of those that it allows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest
from ggufs import write_tiny_gguf
from servers import FakeServer
from sglang_server import FakeSGLang

pytest.importorskip("aiohttp")
pytest.importorskip("xllamacpp")
pytest.importorskip("llguidance")

from test_remote import QUICK, cache, file, folder, llama  # noqa: F401

from mixlm.binding import LoadedMember
from mixlm.core.sampling import softmax
from mixlm.engines import EngineSpec, load
from mixlm.engines.base import Engine
from mixlm.engines.remote.engine import RemoteEngine
from mixlm.engines.toy import ToyEngine, random_table
from mixlm.ensemble import Ensemble
from mixlm.errors import RequestRefusedError, UnsupportedError
from mixlm.types import TopKFilter

IDS = np.array([70, 71, 72, 73, 74])
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 999}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"name": "get_weather", "parameters": SCHEMA}


@pytest.fixture
def vllm() -> Iterator[FakeServer]:
    """A stand-in for vLLM with --logprobs-mode processed_logprobs."""
    server = FakeServer()
    server.samples, server.max_logprobs = True, 260
    yield server.start()
    server.stop()


@pytest.fixture
def sglang() -> Iterator[FakeSGLang]:
    server = FakeSGLang().start()
    yield server
    server.stop()


@pytest.fixture(params=["llama.cpp", "llama.cpp server", "vLLM", "SGLang"])
def engine(request: Any, file: Any, folder: Any) -> Engine:  # noqa: F811
    if request.param == "llama.cpp":
        return load(EngineSpec(str(file), "", "float32", engine="llamacpp", slots=2))
    if request.param == "llama.cpp server":
        return load(EngineSpec(request.getfixturevalue("llama").listening_address, "tiny"))
    fake = request.getfixturevalue("vllm" if request.param == "vLLM" else "sglang")
    return RemoteEngine(EngineSpec(fake.url, ""), folder, QUICK)


def all_logits(engine: Engine, ids: np.ndarray) -> np.ndarray:
    """The logits of every token that may be sampled, or of as many as there are, asked for in the usual way."""
    [candidates] = engine.session().logits_rows(ids, 1, TopKFilter(engine.vocabulary.size, np.zeros(0, np.int64)))
    row = np.full(engine.vocabulary.size, -np.inf)
    row[candidates.ids] = candidates.logprobs
    return np.where(engine.sampleable, row, -np.inf)


def masks(engine: Engine, logits: np.ndarray) -> dict[str, np.ndarray]:
    order = np.argsort(-logits)[: np.isfinite(logits).sum()]
    chosen = {"few, the least likely": order[-5:], "one": order[-1:], "some": order[3::2], "most": order[7:]}
    return {name: np.isin(np.arange(engine.vocabulary.size), ids) for name, ids in chosen.items()}


def test_the_tokens_that_are_allowed_have_the_members_probabilities(engine):
    assert engine.takes_ids
    texts = [IDS[: len(IDS) - back] for back in (2, 1, 0)]
    logits = [all_logits(engine, ids) for ids in texts]
    session = engine.session()
    usual = session.logits(IDS)[0].copy()
    for name in masks(engine, logits[0]):
        allowed = [masks(engine, row)[name] for row in logits]
        rows = session.logits_rows(IDS, 3, None, allowed)
        for row, expected, mask in zip(rows, logits, allowed, strict=True):
            wanted = np.where(mask, expected, -np.inf)
            top = np.argsort(-wanted)[: min(mask.sum(), engine.top_k_limit)]
            likeliest = np.argsort(-np.where(mask, row, -np.inf))[: len(top)]
            assert {*likeliest.tolist()} == {*top.tolist()}
            np.testing.assert_allclose(softmax(row[top]), softmax(wanted[top]), atol=2e-5)
    np.testing.assert_array_equal(session.logits(IDS)[0] > -np.inf, usual > -np.inf)  # the others are back
    none = session.logits_rows(IDS, 1, None, [np.zeros(engine.vocabulary.size, dtype=np.bool_)])
    assert not np.isfinite(none).any()


def test_banned_ids_among_the_allowed_ones_are_not_waited_for(engine, monkeypatch):
    row = all_logits(engine, IDS)
    order, ids = np.argsort(-row), np.arange(engine.vocabulary.size)
    session, queries = engine.session(), []
    top_tokens = session.top_tokens
    monkeypatch.setattr(session, "top_tokens", lambda *query: queries.append(query[1]) or top_tokens(*query))
    top_k_filter, allowed = TopKFilter(5, np.sort(order[12:20])), np.isin(ids, order[10:20])
    [candidates] = session.logits_rows(IDS, 1, top_k_filter, [allowed])
    assert {*candidates.ids.tolist()} == {*order[10:12].tolist()}
    np.testing.assert_allclose(softmax(candidates.logprobs), softmax(row[candidates.ids]), atol=2e-5)
    assert queries == [2]


def test_ids_that_count_are_not_asked_for_by_mixlms_own_route_which_takes_none(vllm, folder):  # noqa: F811
    class Route:
        async def generate(self, owner: Any, ids: Any, parameters: Any, banned: str = "") -> dict[str, Any]:
            raise RequestRefusedError("it takes no such parameters")

        def release(self, owner: Any) -> None: ...

        def close(self) -> None: ...

    engine = RemoteEngine(EngineSpec(vllm.url, ""), folder, QUICK)
    allowed = np.isin(np.arange(engine.vocabulary.size), [65, 66, 67])
    expected = engine.session().logits_rows(IDS, 1, None, [allowed])
    engine.replicas[0].server.sessions = Route()
    np.testing.assert_array_equal(engine.session().logits_rows(IDS, 1, None, [allowed]), expected)
    with pytest.raises(RequestRefusedError):
        engine.session().logits(IDS)


def whole(engine: RemoteEngine, table: Callable[..., np.ndarray]) -> ToyEngine:
    """The model of a stand-in, in this process and with whole rows."""
    toy = ToyEngine(table=table, name="whole", context_length=engine.context_length)
    toy.vocabulary, toy.encoder, toy.prompts = engine.vocabulary, engine.encoder, engine.prompts
    return toy


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["token", "piece", "word", "byte"])
@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_texts_are_those_of_the_same_models_with_whole_rows(request, folder, kind, unit):  # noqa: F811
    fake = request.getfixturevalue(kind)
    remote = RemoteEngine(EngineSpec(fake.url, ""), folder, QUICK)
    own = whole(remote, random_table(260, 5))
    pairs = [
        Ensemble([LoadedMember(engine, "a"), LoadedMember(own, "b")], [0.6, 0.4], unit=unit)
        for engine in (remote, whole(remote, fake.logits))
    ]
    methods = ("mixture", "conventional", "speculative", "greedy", "layered")
    for method in methods[:1] if unit in ("word", "byte") else methods:
        options: dict[str, Any] = {"method": method, "max_tokens": 200, "top_k": 7, "json_schema": SCHEMA}
        for seed in range(1 if method == "greedy" else 2):
            actual, expected = (pair.generate("abc", seed=seed, **options) for pair in pairs)
            assert actual.text == expected.text
            assert [token.member for token in actual.tokens] == [token.member for token in expected.tokens]
            jsonschema.validate(json.loads(actual.text), SCHEMA)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["token", "piece"])
def test_the_most_likely_text_needs_no_top_k(vllm, folder, unit):  # noqa: F811
    remote = RemoteEngine(EngineSpec(vllm.url, ""), folder, QUICK)
    own = whole(remote, random_table(260, 5))
    pairs = [
        Ensemble([LoadedMember(engine, "a"), LoadedMember(own, "b")], [0.6, 0.4], unit=unit)
        for engine in (remote, whole(remote, vllm.logits))
    ]
    for options in ({"max_tokens": 8}, {"json_schema": SCHEMA}, {"json_schema": SCHEMA, "top_logprobs": 2}):
        actual, expected = (pair.generate("bc", method="greedy", **options) for pair in pairs)
        assert actual.text == expected.text
        np.testing.assert_allclose(
            [token.logprob for token in actual.tokens], [token.logprob for token in expected.tokens], atol=1e-4
        )
    # Under a grammar all that is allowed can be listed, so nothing has to be truncated.
    actual, expected = (pair.generate("bc", seed=2, json_schema=SCHEMA, top_k=0, min_p=0.01) for pair in pairs)
    assert actual.text == expected.text


@pytest.mark.slow
def test_members_in_llamacpp_and_behind_a_server_call_tools(vllm, folder, tmp_path):  # noqa: F811
    path = write_tiny_gguf(tmp_path / "tiny.gguf", context=2048)
    vllm.models = [{"id": "fake", "max_model_len": 2048}]
    local = load(EngineSpec(str(path), "", "float32", engine="llamacpp", slots=2))
    remote = RemoteEngine(EngineSpec(vllm.url, ""), folder, QUICK)
    ensemble = Ensemble([LoadedMember(local, "a"), LoadedMember(remote, "b")], [0.5, 0.5])
    for seed, choice in enumerate(("required", "get_weather")):
        completion = ensemble.generate(
            "Oslo?", tools=[TOOL], tool_choice=choice, parallel_tool_calls=False, seed=seed, max_tokens=300, top_k=20
        )
        [call] = completion.tool_calls
        assert call.name == "get_weather"
        jsonschema.validate(json.loads(call.arguments), SCHEMA)
        assert {token.member for token in completion.tokens} == {"a", "b"}


def test_a_server_whose_logits_are_rounded_otherwise_in_every_batch_takes_given_ids(vllm, folder, monkeypatch):  # noqa: F811
    logits, calls = vllm.logits, []

    def rounded(ids):
        """Logits below 32 in bfloat16: each may be the next one in another batch."""
        calls.append(ids)
        ranks = np.argsort(np.argsort(-logits(ids)))
        return logits(ids) + np.where((ranks + len(calls)) % 2, 0.12, 0)

    monkeypatch.setattr(vllm, "logits", rounded)
    assert RemoteEngine(EngineSpec(vllm.url, ""), folder, QUICK).takes_ids


def test_a_server_without_given_ids_refuses_grammars_by_name(folder):  # noqa: F811
    fake = FakeServer().start()
    try:
        remote = RemoteEngine(EngineSpec(fake.url, ""), folder, QUICK)
        assert not remote.takes_ids
        ensemble = Ensemble([LoadedMember(remote, "a")])
        for language, name in (({"json_schema": SCHEMA}, "json_schema"), ({"tools": [TOOL]}, "tools")):
            with pytest.raises(UnsupportedError, match=f"{name} allows tokens.*likely tokens of all") as raised:
                ensemble.generate("abc", **language)
            assert "processed_logprobs" in str(raised.value)
    finally:
        fake.stop()
