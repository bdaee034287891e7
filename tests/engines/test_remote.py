from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ggufs import write_tiny_gguf
from servers import FakeServer

from mixlm.engines.contract import *  # noqa: F403
from mixlm.engines.contract import random_ids

pytest.importorskip("aiohttp")

from mixlm.binding import LoadedMember
from mixlm.core.sampling import Transform, softmax
from mixlm.engines import EngineSpec, load
from mixlm.engines.base import Engine
from mixlm.engines.remote.engine import RemoteEngine
from mixlm.engines.remote.http_client import ClientLimits
from mixlm.engines.remote.model_info import tokenizer_folder_of
from mixlm.engines.requests import LogitsRequest
from mixlm.ensemble import Ensemble
from mixlm.errors import (
    ConfigError,
    EngineError,
    GenerationInterruptedError,
    MixlmError,
    TokenizerError,
    UnsupportedError,
)
from mixlm.models.cache import GGUF_FILE, read_info, write_info
from mixlm.models.gguf import find_gguf, tokenizer_folder
from mixlm.types import Sampling, TopKFilter

QUICK = ClientLimits(connect=1, response=5, busy=1, connections=3)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", context=512)


@pytest.fixture(scope="module")
def folder(cache, file) -> Path:
    return tokenizer_folder(find_gguf(str(file)))


@pytest.fixture(scope="module")
def llama(file) -> object:
    """A real server of llama.cpp, on a port of its own."""
    return start_llama(file)


def start_llama(file: Path) -> object:
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_parallel, params.n_ctx, params.n_ubatch = 4, 2048, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.verbosity, params.warmup, params.fit_params, params.endpoint_props = -1, False, False, True
    server = xllamacpp.Server(params)
    server.handle_completions({"prompt": [1], "n_predict": 1})
    return server


@pytest.fixture(scope="module")
def engine(llama) -> Engine:
    return load(EngineSpec(llama.listening_address, "tiny"))


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer().start()
    yield server
    server.stop()


@pytest.fixture
def remote(fake, folder) -> RemoteEngine:
    return RemoteEngine(EngineSpec(fake.url, ""), folder, QUICK)


def test_a_real_server_has_the_logits_of_the_same_model_in_this_process(engine, file):
    local = load(EngineSpec(str(file), "", "float32", engine="llamacpp", slots=1))
    assert engine.vocabulary == local.vocabulary
    assert (engine.context_length, engine.top_k_limit) == (512, 64)
    ids = random_ids(engine, 9)
    expected, logits = local.session().logits(ids)[0], engine.session().logits(ids)[0]
    np.testing.assert_allclose(softmax(logits), softmax(expected), atol=1e-5)


def test_an_ensemble_with_a_member_behind_a_server_generates(engine):
    pair = Ensemble([LoadedMember(engine, "a"), LoadedMember(engine, "b")])
    texts = [pair.generate("three", seed=1, max_tokens=12, ignore_end=True, top_k=9).text for _ in range(2)]
    assert texts[0] == texts[1]


def test_the_name_is_that_of_the_model(remote, fake):
    assert (remote.name, remote.context_length, remote.top_k_limit) == ("fake", 511, 64)
    logits = remote.session().logits(np.array([5, 6, 7]))[0]
    expected = fake.logits([5, 6, 7])
    top = np.argsort(-expected)[:64]
    np.testing.assert_allclose(softmax(logits[top]), softmax(expected[top]), atol=1e-6)


def test_requests_of_several_sequences_are_in_flight_at_once_up_to_the_limit(remote, fake):
    fake.faults, fake.delay = ["slow"] * 6, 0.1
    prompts = [np.array([3, 4, i]) for i in range(6)]
    responses = remote.respond([(remote.session(), LogitsRequest(0, ids)) for ids in prompts])
    for logits, ids in zip(responses, prompts, strict=True):
        assert logits[0].argmax() == fake.logits(ids.tolist()).argmax()
    assert 2 <= fake.max_in_flight <= QUICK.connections


def test_an_error_is_raised_when_the_other_requests_are_done(remote, fake):
    fake.faults, fake.delay = ["error", "slow"], 0.3
    sessions = [remote.session(), remote.session()]
    with pytest.raises(EngineError, match="it broke"):
        remote.respond([(session, LogitsRequest(0, np.array([3, 4, 5]))) for session in sessions])
    assert fake.in_flight == 0
    assert sorted(len(session.stats.forwards) for session in sessions) == [0, 1]


@pytest.mark.parametrize("fault", ["drop", "cut", "429", "503"])
def test_a_passing_failure_is_retried(remote, fake, fault):
    fake.faults = [fault]
    before = len(fake.requests)
    logits = remote.session().logits(np.array([8, 9]))[0]
    assert logits.argmax() == fake.logits([8, 9]).argmax()
    assert len(fake.requests) >= before + 2


def test_a_request_that_fails_leaves_nothing_to_the_next_one_of_its_session(remote, fake):
    session, ids = remote.session(), random_ids(remote, 5)
    request = LogitsRequest(0, ids, top_k_filter=TopKFilter(3, np.zeros(0, np.int64)))
    fake.faults = ["error"]
    with pytest.raises(EngineError):
        remote.respond([(session, request)])
    np.testing.assert_array_equal(session.logits(ids), remote.session().logits(ids))
    remote.respond([(session, request)])
    np.testing.assert_array_equal(session.logits(ids[:4]), remote.session().logits(ids[:4]))


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        (["drop", "drop"], "does not answer: "),
        (["cut", "cut"], "does not answer: "),
        (["garbage"], "is not JSON: '<html>so sorry"),
        (["error"], r"refuses \(500\): it broke"),
        (["{}"], "sends a malformed response"),
        (["null"], "sends a malformed response"),
        (['{"choices": [{"logprobs": {"top_logprobs": [{}]}}]}'], "sends a malformed response"),
        (['{"choices": [{"logprobs": {"top_logprobs": [{"token_id:x": 1}]}}]}'], "sends a malformed response"),
        (['{"choices": [{"logprobs": null}]}'], "returns no probabilities"),
    ],
)
def test_a_lasting_failure_is_an_error_that_names_the_server(remote, fake, faults, message):
    fake.faults = list(faults)
    with pytest.raises(EngineError, match=message) as raised:
        remote.session().logits(np.array([8, 9]))
    assert fake.url in str(raised.value)
    assert remote.session().logits(np.array([8, 9])).shape == (1, 260)


def test_a_response_that_takes_too_long_is_not_waited_for(fake, folder):
    remote = RemoteEngine(EngineSpec(fake.url, ""), folder, ClientLimits(connect=1, response=0.2))
    fake.faults = ["slow"]
    with pytest.raises(EngineError, match=r"does not answer within 0.2 seconds"):
        remote.session().logits(np.array([8, 9]))


def test_a_busy_server_is_waited_for_as_it_asks_and_not_forever(remote, fake):
    fake.faults = ["429"] * 3
    start = time.monotonic()
    remote.session().logits(np.array([8, 9]))
    assert 0.15 <= time.monotonic() - start < 2
    fake.faults, fake.retry_after = ["503"] * 50, None
    with pytest.raises(EngineError, match=r"is busy \(status 503\)"):
        remote.session().logits(np.array([8, 9]))


def test_a_server_that_comes_back_with_another_model_is_found_out(remote, fake):
    remote.session().logits(np.array([8, 9]))
    fake.stop()
    fake.seed = 1
    fake.start()
    with pytest.raises(EngineError, match="has another model now, under the name fake"):
        remote.session().logits(np.array([8, 9]))
    assert not remote.alive()


@pytest.mark.parametrize("fault", ["slow", "503"])
def test_whether_a_server_is_alive_is_not_waited_for(remote, fake, fault, monkeypatch):
    monkeypatch.setattr("mixlm.engines.remote.replica._QUICK", 0.2)
    fake.faults, fake.delay = [fault], 0.4
    assert not remote.alive()
    monkeypatch.undo()
    assert remote.alive()


@pytest.mark.parametrize("change", [{"id": "other"}, {"max_model_len": 256}, {"root": "/elsewhere"}])
def test_a_server_that_comes_back_with_another_card_is_found_out(remote, fake, change):
    fake.stop()
    fake.models[0] = {**fake.models[0], **change}
    fake.start()
    with pytest.raises(EngineError, match="another model now"):
        remote.session().logits(np.array([8, 9]))


def test_a_server_that_comes_back_as_it_was_goes_on(remote, fake):
    fake.stop()
    assert not remote.alive()
    with pytest.raises(EngineError, match="does not answer"):
        remote.session().logits(np.array([8, 9]))
    fake.start()
    assert remote.alive()
    assert remote.session().logits(np.array([8, 9]))[0].argmax() == fake.logits([8, 9]).argmax()


def test_a_server_that_returns_few_tokens_allows_a_small_top_k(fake, folder):
    fake.max_logprobs = 20
    remote = RemoteEngine(EngineSpec(fake.url, ""), folder, QUICK)
    assert remote.top_k_limit == 16
    alone = Ensemble([LoadedMember(remote, "a")])
    alone.context(alone.settings(top_k=16))
    with pytest.raises(UnsupportedError, match="its 16 most likely tokens only"):
        alone.context(alone.settings(top_k=17))


@pytest.mark.parametrize("limit", [21, 80, 81, 159])
def test_a_limit_of_top_tokens_is_found_and_what_needs_more_is_refused(fake, folder, limit):
    fake.max_logprobs = limit
    remote = RemoteEngine(EngineSpec(fake.url, ""), folder, QUICK)
    assert (remote.max_top_k, remote.reports_all) == (limit, False)
    assert len(fake.requests) < 60
    refused = len([body for body in fake.requests if body.get("logprobs", 0) > limit])
    pair = Ensemble([LoadedMember(remote, "a"), LoadedMember(remote, "b")])
    with pytest.raises(UnsupportedError, match=f"reports its {limit} most likely"):
        pair.generate("one", rule="vote", temperature=1.0, top_k=0, seed=1)
    with suppress(UnsupportedError):  # where a position is not decided
        pair.generate("one", rule="geometric", temperature=1.0, top_k=0, seed=1, max_tokens=4)
    assert len([body for body in fake.requests if body.get("logprobs", 0) > limit]) == refused


def test_a_server_without_a_limit_reports_all(fake, folder):
    fake.max_logprobs = 260
    remote = RemoteEngine(EngineSpec(fake.url, ""), folder, QUICK)
    assert (remote.max_top_k, remote.reports_all, remote.top_k_limit) == (None, True, 64)


def test_no_more_tokens_are_requested_than_sampling_needs(remote, fake):
    alone, options = Ensemble([LoadedMember(remote, "a")]), {"seed": 1, "max_tokens": 6, "ignore_end": True}
    del fake.requests[:]
    alone.generate("one two", top_k=9, **options)
    assert {body["logprobs"] for body in fake.requests if body["logprobs"] > 5} == {9 + 16}
    banned = np.sort(np.argsort(-fake.logits([4, 5, 6]))[:30])
    [rows] = remote.respond(
        [(remote.session(), LogitsRequest(0, np.array([4, 5, 6]), top_k_filter=TopKFilter(9, banned)))]
    )
    assert fake.requests[-1]["logprobs"] == 4 * (9 + 16)
    assert rows[0].ids.size == 9
    assert not np.isin(rows[0].ids, banned).any()


def test_what_a_server_lacks_is_named(fake, folder):
    fake.spell_ids = False
    with pytest.raises(UnsupportedError, match=r"most likely next tokens by their ids.*returns no probabilities"):
        RemoteEngine(EngineSpec(fake.url, ""), folder, QUICK)
    del fake.models[0]["max_model_len"]
    with pytest.raises(UnsupportedError, match="how many tokens its context holds"):
        RemoteEngine(EngineSpec(fake.url, ""), folder, QUICK)


def test_one_of_several_models_is_named_behind_the_url(fake, folder):
    fake.models.append({"id": "second", "max_model_len": 64})
    assert RemoteEngine(EngineSpec(fake.url + "/v1#second", ""), folder, QUICK).context_length == 63
    with pytest.raises(ConfigError, match=r"no model 'secnd'; it has: fake, second.*did you mean 'second'"):
        RemoteEngine(EngineSpec(fake.url + "#secnd", ""), folder, QUICK)
    with pytest.raises(ConfigError, match=r"several models.*fake, second.*#NAME"):
        RemoteEngine(EngineSpec(fake.url, ""), folder, QUICK)


def test_a_key_comes_from_the_environment_and_is_never_shown(fake, folder, monkeypatch):
    fake.key = "secret-7"
    with pytest.raises(ConfigError, match=r"asks for a key.*key_env"):
        RemoteEngine(EngineSpec(fake.url, ""), folder, QUICK)
    spec = EngineSpec(fake.url, "", key_env="MIXLM_TEST_KEY")
    with pytest.raises(ConfigError, match="MIXLM_TEST_KEY is not set"):
        RemoteEngine(spec, folder, QUICK)
    monkeypatch.setenv("MIXLM_TEST_KEY", "secret-7")
    remote = RemoteEngine(spec, folder, QUICK)
    fake.faults = ["error"]
    with pytest.raises(MixlmError) as raised:
        remote.session().logits(np.array([8, 9]))
    assert "secret" not in repr(raised.value) + repr(vars(remote)) + repr(remote.details)


def test_a_model_whose_tokenizer_is_not_known_is_refused(fake):
    with pytest.raises(ConfigError, match=r"tokenizer of fake at .* is not known"):
        load(EngineSpec(fake.url, ""))


def test_ends_of_text_are_those_of_the_generation_config_too(fake, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [70, 71]}')
    end_ids = RemoteEngine(EngineSpec(fake.url, ""), folder, QUICK).vocabulary.end_ids
    assert end_ids.isdisjoint({70, 71})
    fake.samples = True
    remote = RemoteEngine(EngineSpec(fake.url, ""), tmp_path / "model", QUICK)
    assert remote.vocabulary.end_ids == end_ids | {70, 71}
    Ensemble([LoadedMember(remote, "a")]).generate("three", seed=1, max_tokens=4)
    assert {70, 71} <= {*fake.requests[-1]["stop_token_ids"]}


def test_a_tokenizer_in_the_cache_is_made_anew_where_an_older_version_made_it(file, folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    shutil.copy(file, model / GGUF_FILE)
    write_info(model, replace(read_info(folder), tokenizer=1))
    (model / "tokenizer.json").write_text("{}")
    assert tokenizer_folder_of(str(model)) == model
    assert (model / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()


def test_a_tokenizer_that_reads_differently_is_refused(llama, tmp_path):
    from trained import trained
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=trained("gpt2"), eos_token="</s>").save_pretrained(tmp_path)
    with pytest.raises(TokenizerError, match="read a text differently"):
        load(EngineSpec(llama.listening_address, "", tokenizer=str(tmp_path)))


@pytest.mark.parametrize(("model", "engine"), [("smollm2-135m", "remote"), ("http://127.0.0.1:9", "hf")])
def test_a_server_and_an_engine_must_fit(model, engine):
    with pytest.raises(ConfigError, match=r"is no server|is a server"):
        load(EngineSpec(model, "", engine=engine))


@pytest.mark.parametrize(
    "url", ["http://", "https://:80", "http://[::1", "http://a:b", "http://a:99999", "http://a,http:"]
)
def test_what_is_no_url_of_a_server_is_refused(url):
    with pytest.raises(ConfigError, match="is not the URL of a server"):
        load(EngineSpec(url, ""))


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(EngineError, match=r"http://127.0.0.1:9 does not answer"):
        load(EngineSpec("http://127.0.0.1:9", ""))


@pytest.fixture
def sampler(fake, folder) -> RemoteEngine:
    """A member behind a server that samples itself."""
    fake.samples = True
    return RemoteEngine(EngineSpec(fake.url, ""), folder, QUICK)


@pytest.mark.parametrize("masks", [True, False])
def test_a_server_that_samples_itself_is_asked_for_several_tokens(fake, folder, masks):
    fake.samples, fake.masks = True, masks
    remote = RemoteEngine(EngineSpec(fake.url, ""), folder, QUICK)
    assert remote.details["samples itself"] == ("yes, masking" if masks else "yes")
    alone = Ensemble([LoadedMember(remote, "a")])
    fake.requests.clear()
    completion = alone.generate("three", seed=1, max_tokens=12, ignore_end=True, top_k=0)
    [request] = fake.requests
    assert (len(completion.tokens), request["max_tokens"]) == (12, 12)
    control = sorted(remote.vocabulary.special_ids)
    assert ("vllm_xargs" in request) == masks
    if not masks:
        assert sorted(map(int, request["logit_bias"])) == control
    ids = request["prompt"]
    for token in completion.tokens:
        distribution = Transform(Sampling(temperature=0.7, top_k=0), np.array(control))(fake.logits(ids))
        ids = [*ids, remote.vocabulary.tokens.index(token.data)]
        assert token.logprob == pytest.approx(distribution.logprobs[distribution.ids == ids[-1]][0])
    assert sum(member.forwards for member in completion.usage.members.values()) == 12


@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        ("samples", "returns no token ids"),
        ("processed", "--logprobs-mode processed_logprobs"),
        ("seeds", "equal seeds must sample equal tokens"),
        ("bans", "cannot be kept from sampling some tokens"),
    ],
)
def test_what_a_server_lacks_to_sample_itself_is_named_and_it_is_asked_token_by_token(fake, folder, lacking, message):
    fake.samples = True
    setattr(fake, lacking, False)
    remote = RemoteEngine(EngineSpec(fake.url, ""), folder, QUICK)
    assert message in remote.details["samples itself"]
    fake.requests.clear()
    completion = Ensemble([LoadedMember(remote, "a")]).generate("three", seed=1, max_tokens=6, ignore_end=True, top_k=9)
    assert len(completion.tokens) == len(fake.requests) == 6


@pytest.mark.slow
def test_more_control_tokens_than_biases_may_name_are_not_left_to_the_server(sampler, fake, folder):
    many = np.arange(301)
    assert sampler.samples_itself(Sampling(), many)
    fake.masks = False
    biased = RemoteEngine(EngineSpec(fake.url, ""), folder, QUICK)
    assert not biased.samples_itself(Sampling(), many)
    assert biased.samples_itself(Sampling(), many[:300])
    assert not biased.samples_itself(Sampling(min_p=0.1, top_p=0.9), many[:0])


@pytest.mark.parametrize(
    "response",
    [
        "{}",
        "null",
        '{"choices": [{"token_ids": [], "logprobs": {"token_logprobs": []}}]}',
        '{"choices": [{"token_ids": [1, 2], "logprobs": {"token_logprobs": [-1]}}]}',
        '{"choices": [{"token_ids": [1], "logprobs": {"token_logprobs": [null]}}]}',
        '{"choices": [{"token_ids": ["x"], "logprobs": {"token_logprobs": [-1]}}]}',
    ],
)
def test_a_malformed_response_is_an_error_that_shows_it(sampler, fake, response):
    fake.faults = [response]
    with pytest.raises(GenerationInterruptedError, match="sends a malformed response"):
        Ensemble([LoadedMember(sampler, "a")]).generate("three", seed=1, max_tokens=6)


def test_tokens_of_a_server_that_came_back_with_another_model_are_not_taken(sampler, fake):
    fake.stop()
    fake.seed = 1
    fake.start()
    with pytest.raises(GenerationInterruptedError, match="has another model now"):
        Ensemble([LoadedMember(sampler, "a")]).generate("three", seed=1, max_tokens=6)


SERVE = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_parallel, params.n_ctx = 2, 1024
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.verbosity, params.warmup, params.fit_params, params.endpoint_props = -1, False, False, True
server = xllamacpp.Server(params)
server.handle_completions({"prompt": [1], "n_predict": 1})
print(server.listening_address, flush=True)
time.sleep(600)
"""


@pytest.fixture
def process(file) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """llama.cpp's server in a process of its own, and its URL."""
    pytest.importorskip("xllamacpp")
    command = [sys.executable, "-c", SERVE, str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        yield server, server.stdout.readline().strip()
        server.kill()


@pytest.mark.slow
@pytest.mark.parametrize("on_failure", ["error", "drop"])
def test_a_server_that_is_killed_in_the_middle_of_a_generation(process, file, engine, on_failure):
    server, url = process
    pair = Ensemble(
        [LoadedMember(engine, "stays"), LoadedMember(RemoteEngine(EngineSpec(url, ""), None, QUICK), "goes")]
    )
    options = {"seed": 2, "max_tokens": 30, "ignore_end": True, "top_k": 9}
    whole = pair.generate("three", **options)
    stream = pair.stream("three", **options, on_failure=on_failure)
    first_tokens = [next(stream) for _ in range(8)]
    server.send_signal(signal.SIGKILL)
    server.wait()
    if on_failure == "error":
        with pytest.raises(GenerationInterruptedError, match="goes failed in the middle of a generation") as raised:
            stream.finish()
        tokens = raised.value.completion.tokens
        assert 8 <= len(tokens) < 30
    else:
        tokens = stream.finish().tokens
        dropped = stream.completion.usage.members["goes"].dropped
        assert len(tokens) == 30
        assert 0 < dropped <= 22
        assert {token.member for token in tokens[30 - dropped :]} == {"stays"}
        tokens = tokens[: 30 - dropped]
    assert list(tokens[:8]) == first_tokens
    assert [token.data for token in tokens] == [token.data for token in whole.tokens][: len(tokens)]


def test_only_who_made_a_connection_waits_for_its_check(remote, fake, monkeypatch):
    kept, new, released = remote.session(), remote.session(), threading.Event()

    async def is_unchanged() -> bool:
        return await asyncio.to_thread(released.wait, 10)

    kept.logits(np.array([8, 9]))
    monkeypatch.setattr(remote.replicas[0].server, "is_unchanged", is_unchanged)
    fake.faults, fake.delay = ["slow"], 0.3
    first = remote.submit(kept, LogitsRequest(0, np.array([8, 9, 10])))
    while not fake.in_flight:
        time.sleep(0.01)
    second = remote.submit(new, LogitsRequest(0, np.array([7, 8])))
    try:
        first.result(3)
        assert not second.done()
    finally:
        released.set()
    second.result(3)


def test_a_connection_that_was_left_without_a_check_is_checked_by_the_next(remote, fake):
    remote.session().logits(np.array([8, 9]))
    fake.stop()
    fake.seed = 1
    fake.start()
    assert not remote.alive()  # over a new connection, which is kept
    with pytest.raises(EngineError, match="another model now"):
        remote.session().logits(np.array([8, 9]))


@pytest.mark.slow
def test_connections_that_are_made_together_are_checked_together(fake, folder):
    remote = RemoteEngine(EngineSpec(fake.url, ""), folder, ClientLimits(connect=5, response=5, connections=5))
    prompt = np.array([3, 4, 5])
    remote.session().logits(prompt)
    fake.stop()
    fake.start()
    before = len(fake.requests)
    fake.faults, fake.delay = ["slow"] * 10, 0.5  # checks too: meanwhile the other responses arrive
    remote.respond([(remote.session(), LogitsRequest(0, np.append(prompt, i))) for i in range(5)])
    assert len(fake.requests) - before < 5 + 5  # the requests, and fewer checks of the model than connections
    fake.stop()
    fake.seed = 1
    fake.start()
    with pytest.raises(EngineError, match="another model now"):
        remote.respond([(remote.session(), LogitsRequest(0, np.append(prompt, i))) for i in range(5)])
