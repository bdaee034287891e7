from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from contract import *  # noqa: F403
from contract import random_ids
from ggufs import write_tiny_gguf
from servers import Fake

pytest.importorskip("httpx")

from mixlm.core.sampling import Transform, softmax
from mixlm.engines import EngineSpec, load
from mixlm.engines.base import Engine, LogitsRequest
from mixlm.engines.remote.capabilities import ServerCapabilities
from mixlm.engines.remote.engine import RemoteEngine
from mixlm.engines.remote.http_client import ClientLimits
from mixlm.ensemble import Ensemble, MemberSpec
from mixlm.errors import (
    ConfigError,
    EngineError,
    GenerationInterruptedError,
    MixlmError,
    TokenizerError,
    UnsupportedError,
)
from mixlm.models import find_gguf, tokenizer_folder
from mixlm.types import Sampling, TopKFilter

QUICK = ClientLimits(connect=1, answer=5, busy=1, connections=3)


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
def llama(file) -> Iterator[object]:
    """A real server of llama.cpp, on a port of its own."""
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
def fake() -> Iterator[Fake]:
    one = Fake().start()
    yield one
    one.stop()


@pytest.fixture
def remote(fake, folder) -> RemoteEngine:
    return RemoteEngine(EngineSpec(fake.url, ""), folder, QUICK)


def test_a_real_server_says_what_the_same_model_says_in_this_process(engine, file):
    here = load(EngineSpec(str(file), "", "float32", engine="llamacpp", slots=1))
    assert engine.vocabulary == here.vocabulary
    assert (engine.context_length, engine.top_k_limit) == (512, 64)
    ids = random_ids(engine, 9)
    ours, theirs = here.session().logits(ids)[0], engine.session().logits(ids)[0]
    np.testing.assert_allclose(softmax(theirs), softmax(ours), atol=1e-5)


def test_an_ensemble_with_a_member_behind_a_server_writes(engine):
    pair = Ensemble([MemberSpec(engine, "a"), MemberSpec(engine, "b")])
    texts = [pair.generate("three", seed=1, max_tokens=12, ignore_end=True, top_k=9).text for _ in range(2)]
    assert texts[0] == texts[1]


def test_the_name_is_the_models(remote, fake):
    assert (remote.name, remote.context_length, remote.top_k_limit) == ("fake", 511, 64)
    found = remote.session().logits(np.array([5, 6, 7]))[0]
    wanted = fake.logits([5, 6, 7])
    best = np.argsort(-wanted)[:64]
    np.testing.assert_allclose(softmax(found[best]), softmax(wanted[best]), atol=1e-6)


def test_questions_of_several_sequences_are_sent_at_once_and_never_too_many(remote, fake):
    fake.faults, fake.delay = ["slow"] * 6, 0.1
    texts = [np.array([3, 4, i]) for i in range(6)]
    found = remote.respond([(remote.session(), LogitsRequest(0, ids)) for ids in texts])
    for row, ids in zip(found, texts, strict=True):
        assert row[0].argmax() == fake.logits(ids.tolist()).argmax()
    assert 2 <= fake.busiest <= QUICK.connections


def test_an_error_is_raised_when_all_that_was_asked_with_it_is_done(remote, fake):
    fake.faults, fake.delay = ["error", "slow"], 0.3
    slow = [remote.session(), remote.session()]
    with pytest.raises(EngineError, match="it broke"):
        remote.respond([(one, LogitsRequest(0, np.array([3, 4, 5]))) for one in slow])
    assert fake.busy == 0
    assert sorted(len(one.stats.forwards) for one in slow) == [0, 1]


@pytest.mark.parametrize("fault", ["drop", "cut", "429", "503"])
def test_what_passes_is_tried_again(remote, fake, fault):
    fake.faults = [fault]
    before = len(fake.asked)
    found = remote.session().logits(np.array([8, 9]))[0]
    assert found.argmax() == fake.logits([8, 9]).argmax()
    assert len(fake.asked) >= before + 2


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        (["drop", "drop"], "does not answer: "),
        (["cut", "cut"], "does not answer: "),
        (["garbage"], "what is no JSON: '<html>so sorry"),
        (["error"], r"refuses \(500\): it broke"),
        (["{}"], "gives no answer"),
        (["null"], "gives no answer"),
        (['{"choices": [{"logprobs": {"top_logprobs": [{}]}}]}'], "gives no answer"),
        (['{"choices": [{"logprobs": {"top_logprobs": [{"token_id:x": 1}]}}]}'], "gives no answer"),
        (['{"choices": [{"logprobs": null}]}'], "tells no probabilities"),
    ],
)
def test_what_does_not_pass_is_an_error_that_names_the_server(remote, fake, faults, said):
    fake.faults = list(faults)
    with pytest.raises(EngineError, match=said) as raised:
        remote.session().logits(np.array([8, 9]))
    assert fake.url in str(raised.value)
    assert remote.session().logits(np.array([8, 9])).shape == (1, 260)


def test_an_answer_that_takes_too_long_is_not_waited_for(fake, folder):
    remote = RemoteEngine(EngineSpec(fake.url, ""), folder, ClientLimits(connect=1, answer=0.2))
    fake.faults = ["slow"]
    with pytest.raises(EngineError, match=r"does not answer within 0.2 seconds"):
        remote.session().logits(np.array([8, 9]))


def test_a_busy_server_is_waited_for_as_it_asks_and_not_for_ever(remote, fake):
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


def test_a_server_that_tells_few_tokens_allows_a_small_top_k(fake, folder):
    fake.most = 20
    remote = RemoteEngine(EngineSpec(fake.url, ""), folder, QUICK)
    assert remote.top_k_limit == 16
    alone = Ensemble([MemberSpec(remote, "a")])
    alone.context(alone.settings(top_k=16))
    with pytest.raises(UnsupportedError, match="its 16 likeliest tokens only"):
        alone.context(alone.settings(top_k=17))


def test_no_more_tokens_are_asked_for_than_a_choice_needs(remote, fake):
    alone, options = Ensemble([MemberSpec(remote, "a")]), {"seed": 1, "max_tokens": 6, "ignore_end": True}
    del fake.asked[:]
    alone.generate("one two", top_k=9, **options)
    assert {body["logprobs"] for body in fake.asked if body["logprobs"] > 5} == {9 + 16}
    banned = np.sort(np.argsort(-fake.logits([4, 5, 6]))[:30])
    [found] = remote.respond(
        [(remote.session(), LogitsRequest(0, np.array([4, 5, 6]), top_k_filter=TopKFilter(9, banned)))]
    )
    assert fake.asked[-1]["logprobs"] == 4 * (9 + 16)
    assert found[0].ids.size == 9
    assert not np.isin(found[0].ids, banned).any()


def test_what_a_server_lacks_is_named(fake, folder):
    fake.spell_ids = False
    with pytest.raises(UnsupportedError, match=r"likeliest next tokens by their ids.*tells no probabilities"):
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


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(EngineError, match=r"http://127.0.0.1:9 does not answer"):
        load(EngineSpec("http://127.0.0.1:9", ""))


@pytest.fixture
def drawing(fake, folder) -> RemoteEngine:
    """A member behind a server that draws by itself."""
    fake.draws = True
    return RemoteEngine(EngineSpec(fake.url, ""), folder, QUICK)


@pytest.mark.parametrize("masks", [True, False])
def test_a_server_that_draws_by_itself_is_asked_for_runs(fake, folder, masks):
    fake.draws, fake.masks = True, masks
    one = RemoteEngine(EngineSpec(fake.url, ""), folder, QUICK)
    assert one.servers[0].served == ServerCapabilities("", masks)
    assert one.details["draws by itself"] == ("yes, masking" if masks else "yes")
    alone = Ensemble([MemberSpec(one, "a")])
    fake.asked.clear()
    reply = alone.generate("three", seed=1, max_tokens=12, ignore_end=True, top_k=0)
    [asked] = fake.asked
    assert (len(reply.tokens), asked["max_tokens"]) == (12, 12)
    control = sorted(one.vocabulary.special_ids)
    assert ("vllm_xargs" in asked) == masks
    if not masks:
        assert sorted(map(int, asked["logit_bias"])) == control
    ids = asked["prompt"]
    for token in reply.tokens:
        law = Transform(Sampling(temperature=0.7, top_k=0), np.array(control))(fake.logits(ids))
        ids = [*ids, one.vocabulary.tokens.index(token.data)]
        assert token.logprob == pytest.approx(law.logprobs[law.ids == ids[-1]][0])
    assert sum(one.forwards for one in reply.usage.members.values()) == 12


@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        ("draws", "tells no token ids"),
        ("processed", "--logprobs-mode processed_logprobs"),
        ("seeds", "equal seeds must draw equal tokens"),
        ("bans", "cannot be kept from drawing some tokens"),
    ],
)
def test_what_a_server_lacks_to_draw_by_itself_is_told_and_it_is_asked_token_by_token(fake, folder, lacking, said):
    fake.draws = True
    setattr(fake, lacking, False)
    one = RemoteEngine(EngineSpec(fake.url, ""), folder, QUICK)
    assert said in one.details["draws by itself"]
    fake.asked.clear()
    reply = Ensemble([MemberSpec(one, "a")]).generate("three", seed=1, max_tokens=6, ignore_end=True, top_k=9)
    assert len(reply.tokens) == len(fake.asked) == 6


def test_more_control_tokens_than_biases_may_name_are_left_to_what_is_told(drawing):
    many = np.arange(301)
    assert drawing.samples_itself(Sampling(), many)
    drawing.servers[0].served = ServerCapabilities("", masks=False)
    assert not drawing.samples_itself(Sampling(), many)
    assert drawing.samples_itself(Sampling(), many[:300])
    assert not drawing.samples_itself(Sampling(min_p=0.1, top_p=0.9), many[:0])


@pytest.mark.parametrize(
    "answer",
    [
        "{}",
        "null",
        '{"choices": [{"token_ids": [], "logprobs": {"token_logprobs": []}}]}',
        '{"choices": [{"token_ids": [1, 2], "logprobs": {"token_logprobs": [-1]}}]}',
        '{"choices": [{"token_ids": [1], "logprobs": {"token_logprobs": [null]}}]}',
        '{"choices": [{"token_ids": ["x"], "logprobs": {"token_logprobs": [-1]}}]}',
    ],
)
def test_what_is_no_run_is_an_error_that_says_what_came(drawing, fake, answer):
    fake.faults = [answer]
    with pytest.raises(GenerationInterruptedError, match="gives no answer"):
        Ensemble([MemberSpec(drawing, "a")]).generate("three", seed=1, max_tokens=6)


def test_a_run_of_a_server_that_came_back_with_another_model_is_not_taken(drawing, fake):
    fake.stop()
    fake.seed = 1
    fake.start()
    with pytest.raises(GenerationInterruptedError, match="has another model now"):
        Ensemble([MemberSpec(drawing, "a")]).generate("three", seed=1, max_tokens=6)


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
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as one:
        yield one, one.stdout.readline().strip()
        one.kill()


@pytest.mark.parametrize("on_failure", ["error", "drop"])
def test_a_server_that_is_killed_in_the_middle_of_a_reply(process, file, engine, on_failure):
    server, url = process
    pair = Ensemble([MemberSpec(engine, "stays"), MemberSpec(RemoteEngine(EngineSpec(url, ""), None, QUICK), "goes")])
    options = {"seed": 2, "max_tokens": 30, "ignore_end": True, "top_k": 9}
    whole = pair.generate("three", **options)
    stream = pair.stream("three", **options, on_failure=on_failure)
    begun = [next(stream) for _ in range(8)]
    server.send_signal(signal.SIGKILL)
    server.wait()
    if on_failure == "error":
        with pytest.raises(GenerationInterruptedError, match="goes failed in the middle of a reply") as raised:
            stream.finish()
        tokens = raised.value.completion.tokens
        assert 8 <= len(tokens) < 30
    else:
        tokens = stream.finish().tokens
        dropped = stream.completion.usage.members["goes"].dropped
        assert len(tokens) == 30
        assert 0 < dropped <= 22
        assert {one.member for one in tokens[30 - dropped :]} == {"stays"}
        tokens = tokens[: 30 - dropped]
    assert list(tokens[:8]) == begun
    assert [one.data for one in tokens] == [one.data for one in whole.tokens][: len(tokens)]


def test_connections_that_are_made_together_are_looked_at_together(fake, folder):
    remote = RemoteEngine(EngineSpec(fake.url, ""), folder, ClientLimits(connect=5, answer=5, connections=5))
    begin = np.array([3, 4, 5])
    remote.session().logits(begin)
    fake.stop()
    fake.start()
    before = len(fake.asked)
    fake.faults, fake.delay = ["slow"] * 5, 0.1
    remote.respond([(remote.session(), LogitsRequest(0, np.append(begin, i))) for i in range(5)])
    assert len(fake.asked) - before <= 5 + 3  # what was asked, and a few looks at who it is
    fake.stop()
    fake.seed = 1
    fake.start()
    with pytest.raises(EngineError, match="another model now"):
        remote.respond([(remote.session(), LogitsRequest(0, np.append(begin, i))) for i in range(5)])
