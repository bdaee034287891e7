"""A member behind a server of SGLang: by a stand-in, which responds as SGLang's source says."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
from servers import FakeServer
from sglang_server import FakeSGLang

from mixlm.engines.contract import *  # noqa: F403
from mixlm.engines.contract import random_ids

pytest.importorskip("aiohttp")

from test_remote import QUICK, cache, file, folder  # noqa: F401

from mixlm.binding import LoadedMember
from mixlm.core.sampling import Transform
from mixlm.engines import EngineSpec
from mixlm.engines.base import Engine
from mixlm.engines.remote.engine import RemoteEngine
from mixlm.engines.requests import LogitsRequest
from mixlm.engines.toy import ToyEngine
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, EngineError, GenerationInterruptedError, TokenizerError, UnsupportedError
from mixlm.types import Sampling, TopKFilter

OPTIONS = {"seed": 2, "max_tokens": 24, "ignore_end": True, "top_k": 9}


@pytest.fixture
def fake() -> Iterator[FakeSGLang]:
    server = FakeSGLang().start()
    yield server
    server.stop()


@pytest.fixture
def loaded(fake, folder):  # noqa: F811
    """Load a member behind the server; options go to its spec."""
    return lambda **options: RemoteEngine(EngineSpec(fake.url, "", **options), folder, QUICK)


@pytest.fixture
def engine(loaded) -> RemoteEngine:
    return loaded()


def directly(engine: Engine, table) -> ToyEngine:
    """The model of a server, in this process and with whole rows."""
    toy = ToyEngine(table=table, name="direct", context_length=engine.context_length)
    toy.vocabulary, toy.encoder, toy.prompts = engine.vocabulary, engine.encoder, engine.prompts
    return toy


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(top_k=64, temperature=1.0),
        Sampling(top_k=20),
        Sampling(top_k=30, top_p=0.8),
        Sampling(top_k=40, min_p=0.1, temperature=1.7),
        Sampling(top_k=1),
    ],
)
def test_the_distribution_of_a_token_is_that_of_the_model_itself(engine, fake, sampling):
    transform = Transform(sampling, np.array(sorted(engine.vocabulary.special_ids)))
    for ids in ([5, 6, 7], random_ids(engine, 30).tolist()):
        actual, expected = transform(engine.session().logits(np.array(ids))[0]), transform(fake.logits(ids))
        assert dict(zip(actual.ids.tolist(), actual.logprobs, strict=True)) == pytest.approx(
            dict(zip(expected.ids.tolist(), expected.logprobs, strict=True)), abs=1e-5
        )


@pytest.mark.parametrize("method", ["mixture", "conventional", "speculative", "single"])
def test_texts_are_those_of_the_model_itself(engine, fake, method):
    other = FakeSGLang(seed=1)
    direct = [directly(engine, fake.logits), directly(engine, other.logits)]
    pairs = [Ensemble([LoadedMember(first, "a"), LoadedMember(direct[1], "b")]) for first in (engine, direct[0])]
    tokens, expected = (pair.generate("three", method=method, **OPTIONS).tokens for pair in pairs)
    assert [token.data for token in tokens] == [token.data for token in expected]
    np.testing.assert_allclose([token.logprob for token in tokens], [token.logprob for token in expected], atol=1e-5)


def test_the_servers_own_defaults_change_nothing(fake, loaded):
    fake.preferred = {"temperature": 0.3, "top_k": 5, "top_p": 0.5, "min_p": 0.2, "repetition_penalty": 1.5}
    fake.preferred |= {"presence_penalty": 1.0, "frequency_penalty": 1.0, "min_new_tokens": 4, "max_new_tokens": 99}
    engine = loaded()
    logits, expected = engine.session().logits(np.array([5, 6]))[0], fake.logits([5, 6])
    is_returned = np.isfinite(logits)
    assert is_returned.sum() == 80
    np.testing.assert_allclose(np.diff(logits[is_returned]), np.diff(expected[is_returned]), atol=1e-5)
    assert {*fake.preferred} <= {*fake.requests[-1]["sampling_params"]}


def test_what_is_improbable_beyond_float32_is_impossible(fake, loaded):
    fake.scale = 120.0
    engine = loaded()
    logits, expected = engine.session().logits(np.array([5, 6]))[0], fake.logits([5, 6]).astype(float)
    beyond = expected < expected.max() - 110
    assert beyond.sum() > 180
    assert np.isneginf(logits[beyond]).all()
    assert np.isfinite(logits).any()
    transform = Transform(Sampling(top_k=20, temperature=2.0), np.array([], dtype=np.int64))
    assert np.exp(transform(logits).logprobs).sum() == pytest.approx(1)


def test_an_end_of_text_that_the_server_samples_is_returned_as_any_token(fake, loaded):
    engine = loaded()
    [end, *_] = engine.vocabulary.end_ids
    table = fake.logits
    fake.logits = lambda ids, adapter=None: table(ids, adapter) + 30 * (np.arange(260) == end)
    logits = engine.session().logits(np.array([5, 6, 7]))[0]
    assert logits.argmax() == end
    assert np.isfinite(logits).sum() == 80


def test_loading_takes_few_requests(fake, loaded):
    loaded()
    # The top tokens after a prompt, the model's fingerprint, once more for the cache, and those of given ids.
    assert fake.paths == ["/v1/models", "/server_info", "/tokenize", "/tokenize", *["/generate"] * 4]


def test_other_servers_get_no_requests_that_are_sglangs(folder):  # noqa: F811
    other = FakeServer().start()
    try:
        RemoteEngine(EngineSpec(other.url, ""), folder, QUICK)
    finally:
        other.stop()
    assert not {"/generate", "/server_info", "/get_server_info"} & {*other.paths}


def test_the_context_is_what_the_server_takes(fake, loaded):
    engine = loaded()
    assert engine.context_length == 505
    longest = np.resize(random_ids(engine, 100), 505)
    assert engine.session().logits(longest).shape == (1, 260)
    with pytest.raises(EngineError, match=r"refuses \(400\): Input length \(506 tokens\) exceeds"):
        loaded(context=510).session().logits(np.append(longest, 5))
    with pytest.raises(EngineError, match=r"refuses \(400\): The input \(512 tokens\) is longer than the model's"):
        loaded(context=600).session().logits(np.resize(longest, 512))
    fake.info["max_req_input_len"] = 100  # room for keys and values
    assert loaded().context_length == 99


def test_the_context_of_older_servers_and_of_those_that_do_not_say_it(fake, loaded):
    fake.pages = {"/get_server_info": fake.info}
    fake.info["max_req_input_len"] = 200
    assert loaded().context_length == 199
    fake.pages = {}
    del fake.info["max_req_input_len"]
    assert loaded().context_length == 505
    del fake.models[0]["max_model_len"]
    with pytest.raises(UnsupportedError, match="how many tokens its context holds"):
        loaded()
    assert loaded(context=64).context_length == 64


def test_the_tokenizer_is_found_where_the_server_has_it(fake, folder):  # noqa: F811
    with pytest.raises(ConfigError, match=r"tokenizer of fake at .* is not known"):
        RemoteEngine(EngineSpec(fake.url, ""), None, QUICK)
    fake.info["tokenizer_path"] = str(folder)
    assert RemoteEngine(EngineSpec(fake.url, ""), None, QUICK).vocabulary.size == 260
    fake.info["tokenizer_path"], fake.info["model_path"] = "nowhere/fake", str(folder)
    assert RemoteEngine(EngineSpec(fake.url, ""), None, QUICK).vocabulary.size == 260


def test_a_tokenizer_that_reads_as_the_server_does_not_is_refused(engine, fake, loaded):
    fake.tokenize = lambda text: engine.encoder.encode(text.encode()).ids
    loaded()
    assert fake.paths.count("/tokenize") == 3  # the first has no other
    fake.tokenize = lambda text: list(text.encode())
    with pytest.raises(TokenizerError, match="read a text differently"):
        loaded()


def test_no_more_tokens_are_requested_than_there_are(fake, loaded):
    engine = loaded(candidates=5000)
    assert engine.top_k_limit == 260 - engine.extra_tokens
    assert max(body.get("top_logprobs_num", 0) for body in fake.requests) == 260
    assert np.isfinite(engine.session().logits(np.array([5, 6]))).all()


def test_as_many_tokens_are_requested_as_sampling_needs_and_there_are(engine, fake):
    ids = random_ids(engine, 5)
    banned = np.sort(np.argsort(-fake.logits(ids.tolist()))[:245])
    [rows] = engine.respond([(engine.session(), LogitsRequest(0, ids, top_k_filter=TopKFilter(9, banned)))])
    assert [body["top_logprobs_num"] for body in fake.requests[-3:]] == [9 + 16, 4 * (9 + 16), 260]
    assert rows[0].ids.size == 9
    assert not np.isin(rows[0].ids, banned).any()


def test_what_its_cache_held_is_reported(fake, loaded):
    engine = loaded()
    assert engine.details["prefix cache"] == "reported"
    session, ids = engine.session(), random_ids(engine, 40)
    for end in (30, 32, 34):
        engine.respond([(session, LogitsRequest(0, ids[:end]))])
    assert [(work.tokens, work.cached) for work in session.stats.forwards] == [(30, 0), (2, 30), (2, 32)]
    fake.caches = False
    assert loaded().details["prefix cache"] == "not reported"


def test_it_is_asked_token_by_token_and_the_details_say_why(engine, fake):
    assert engine.details["engine"] == "SGLang"
    assert "no: it takes seeds with --enable-deterministic-inference only" in engine.details["samples itself"]
    fake.requests.clear()
    completion = Ensemble([LoadedMember(engine, "a")]).generate("three", seed=1, max_tokens=6, ignore_end=True, top_k=9)
    assert len(completion.tokens) == len(fake.requests) == 6
    assert {body["sampling_params"]["max_new_tokens"] for body in fake.requests} == {1}
    assert {body["top_logprobs_num"] for body in fake.requests} == {9 + 16}


def test_an_adapter_is_requested_by_its_name(fake, loaded, folder):  # noqa: F811
    fake.adapters = {"poet": 7}
    card = fake.models[0]
    fake.models.append({**card, "id": "poet", "root": "/adapters/poet", "parent": "fake", "max_model_len": None})
    with pytest.raises(ConfigError, match=r"several models.*fake, poet.*#NAME"):
        loaded()
    named = partial(EngineSpec, name="")
    base, poet = (RemoteEngine(named(f"{fake.url}#{name}"), folder, QUICK) for name in ("fake", "poet"))
    assert poet.context_length == 505
    ids = [5, 6, 7]
    assert base.session().logits(np.array(ids))[0].argmax() == fake.logits(ids).argmax()
    assert "lora_path" not in fake.requests[-1]
    assert poet.session().logits(np.array(ids))[0].argmax() == fake.logits(ids, "poet").argmax()
    fake.adapters = {}
    with pytest.raises(EngineError, match="requested LoRA adapters are not loaded: poet"):
        poet.session().logits(np.array([8, 9]))


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ('{"meta_info": {"finish_reason": {"type": "abort", "message": "told to stop"}}}', "returns no probabilities"),
        (
            '{"meta_info": {"output_top_logprobs": [], "finish_reason": "told to stop"}}',
            "sends a malformed response: .*told to stop",
        ),
        ('{"meta_info": {"output_top_logprobs": [null]}}', "sends a malformed response"),
        ('{"meta_info": {"output_top_logprobs": [[]]}}', "sends a malformed response"),
        ('{"meta_info": {"output_top_logprobs": [[[null, 5, null]]]}}', "sends a malformed response"),
        ('{"meta_info": {"output_top_logprobs": [[[-1.0, 5, null], [-2.0, 5, null]]]}}', "sends a malformed response"),
        ('{"meta_info": {"output_top_logprobs": [[[-1.0, "x", null]]]}}', "sends a malformed response"),
        ('{"meta_info": null}', "sends a malformed response"),
        ("{}", "sends a malformed response"),
        ("null", "sends a malformed response"),
        ("garbage", "is not JSON"),
        ("error", r"refuses \(500\): it broke"),
    ],
)
def test_a_malformed_response_is_an_error_that_shows_it(engine, fake, response, message):
    fake.faults = [response]
    with pytest.raises(EngineError, match=message) as raised:
        engine.session().logits(np.array([8, 9]))
    assert fake.url in str(raised.value)
    assert engine.session().logits(np.array([8, 9])).shape == (1, 260)


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ({"error": {"message": "temperature must be non-negative"}}, "temperature must be non-negative"),
        ({"error": "unknown field `x`"}, "unknown field `x`"),
        ({"object": "error", "message": "no list", "type": "Bad Request", "param": None, "code": 400}, "no list"),
    ],
)
def test_a_refusal_is_named_in_each_of_its_shapes(engine, fake, refusal, message):
    fake.refusal = lambda body: refusal
    with pytest.raises(EngineError, match=rf"refuses \(400\): {message}$"):
        engine.session().logits(np.array([8, 9]))


@pytest.mark.parametrize("fault", ["drop", "cut", "503"])
def test_a_passing_failure_is_retried(engine, fake, fault):
    fake.faults = [fault]
    assert engine.session().logits(np.array([8, 9]))[0].argmax() == fake.logits([8, 9]).argmax()


def test_a_server_that_stays_busy_is_not_waited_for_without_end(engine, fake):
    fake.faults, fake.retry_after = ["503"] * 50, None
    with pytest.raises(EngineError, match=r"is busy \(status 503\)"):
        engine.session().logits(np.array([8, 9]))


def test_a_server_that_does_not_return_ids_is_refused(fake, loaded):
    respond = fake.respond

    def without(body):
        response = respond(body)
        response["meta_info"].pop("output_top_logprobs", None)
        return response

    fake.respond = without
    with pytest.raises(UnsupportedError, match=r"most likely next tokens by their ids: .*returns no probabilities"):
        loaded()
    fake.completion_path = "/elsewhere"
    with pytest.raises(UnsupportedError, match=r"by their ids: .*refuses \(404\)"):
        loaded()


def test_sglangs_completions_alone_are_refused(fake, loaded):
    fake.models[0]["owned_by"] = "someone"
    with pytest.raises(UnsupportedError, match="does not return the most likely next tokens by their ids"):
        loaded()
    assert "/generate" not in fake.paths


def test_a_key_is_required(fake, loaded, monkeypatch):
    fake.key = "secret-7"
    with pytest.raises(ConfigError, match=r"asks for a key.*key_env"):
        loaded()
    monkeypatch.setenv("MIXLM_TEST_KEY", "secret-7")
    assert loaded(key_env="MIXLM_TEST_KEY").context_length == 505


def test_a_server_that_comes_back_with_another_model_is_found_out(engine, fake):
    engine.session().logits(np.array([8, 9]))
    fake.stop()
    fake.seed = 1
    fake.start()
    with pytest.raises(EngineError, match="has another model now, under the name fake"):
        engine.session().logits(np.array([8, 9]))
    assert not engine.alive()


def test_a_server_that_comes_back_as_it_was_goes_on(engine, fake):
    fake.stop()
    assert not engine.alive()
    with pytest.raises(EngineError, match="does not answer"):
        engine.session().logits(np.array([8, 9]))
    fake.models[0]["created"] += 60  # the time of the request
    fake.start()
    assert engine.alive()
    assert engine.session().logits(np.array([8, 9]))[0].argmax() == fake.logits([8, 9]).argmax()


@pytest.fixture
def both(fake, folder) -> Iterator[tuple[RemoteEngine, list[FakeSGLang]]]:  # noqa: F811
    second = FakeSGLang().start()
    yield RemoteEngine(EngineSpec(f"{fake.url},{second.url}", ""), folder, QUICK), [fake, second]
    second.stop()


def test_a_replica_goes_on_in_the_middle_of_a_generation(both, engine, fake):
    replicated, fakes = both
    direct = directly(engine, FakeSGLang(seed=1).logits)
    whole = Ensemble([LoadedMember(directly(engine, fake.logits), "a"), LoadedMember(direct, "b")]).generate(
        "x", **OPTIONS
    )
    stream = Ensemble([LoadedMember(replicated, "a"), LoadedMember(direct, "b")]).stream("x", **OPTIONS)
    first_tokens = [next(stream) for _ in range(8)]
    replica = stream.sessions[0].replica
    fakes[replicated.replicas.index(replica)].stop()
    completion = stream.finish()
    assert list(completion.tokens[:8]) == first_tokens
    assert [token.data for token in completion.tokens] == [token.data for token in whole.tokens]
    assert stream.sessions[0].replica is not replica


def test_servers_with_different_models_are_no_replicas(fake, both, folder):  # noqa: F811
    _, fakes = both
    spec = EngineSpec(",".join(fake.url for fake in fakes), "")
    fakes[1].seed = 1
    with pytest.raises(UnsupportedError, match=f"{fakes[1].url} has another model: it is no replica"):
        RemoteEngine(spec, folder, QUICK)
    fakes[1].seed, fakes[1].info["max_req_input_len"] = 0, 100
    with pytest.raises(UnsupportedError, match="a context of 99 tokens, others 505"):
        RemoteEngine(spec, folder, QUICK)


def test_a_generation_ends_with_what_it_has_when_the_server_is_gone(engine, fake):
    stream = Ensemble([LoadedMember(engine, "a")]).stream("three", **OPTIONS)
    first_tokens = [next(stream) for _ in range(5)]
    fake.stop()
    with pytest.raises(GenerationInterruptedError, match="a failed in the middle of a generation") as raised:
        stream.finish()
    assert list(raised.value.completion.tokens[:5]) == first_tokens
