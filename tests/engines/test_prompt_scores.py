"""Log-probabilities of given tokens from servers: against transformers, and against the tables of stand-ins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from ggufs import write_tiny_gguf
from servers import FakeServer
from sglang_server import FakeSGLang

pytest.importorskip("aiohttp")

from test_remote import QUICK, cache, file, folder, llama, start_llama  # noqa: F401

from mixlm.binding import LoadedMember
from mixlm.engines import EngineSpec, load
from mixlm.engines.contract import random_ids
from mixlm.engines.remote.engine import RemoteEngine, RemoteSession
from mixlm.ensemble import Ensemble
from mixlm.errors import EngineError, UnsupportedError
from mixlm.evaluation.contexts import RequestContext
from mixlm.evaluation.likelihood import ContinuationScorer
from mixlm.fitting.likelihood import expectation_maximisation
from mixlm.generation.generation import Generation
from mixlm.generation.scheduler import Scheduler
from mixlm.routing import PromptRouter
from mixlm.scoring.score import identity, score, score_answers

TEXT = "The sky is blue, and 12 + 30 = 42: naïve, ½ or “quoted” — 中文.\n" * 3


@pytest.fixture(params=["prompt_logprobs", "echo", "sglang"])
def stand_in(request: pytest.FixtureRequest) -> Iterator[FakeServer]:
    server: FakeServer = FakeSGLang() if request.param == "sglang" else FakeServer()
    server.scores = None if request.param == "sglang" else request.param
    server.start()
    yield server
    server.stop()


def logprobs(server: FakeServer, ids: list[int]) -> np.ndarray:
    rows = [np.asarray(server.logits(ids[:end]), dtype=float) for end in range(1, len(ids))]
    return np.array([row[token] - np.logaddexp.reduce(row) for row, token in zip(rows, ids[1:], strict=True)])


def test_a_server_returns_the_log_probability_of_each_token(stand_in, folder):  # noqa: F811
    session = RemoteEngine(EngineSpec(stand_in.url, ""), folder, QUICK).session()
    ids = [5, 6, 7, 9, 200, 3]
    ids = [*ids[:1], *[int(np.argmax(stand_in.logits(ids[:1])))], *ids[2:]]
    scores = session.token_scores(np.array(ids))
    np.testing.assert_allclose(scores.logprobs, logprobs(stand_in, ids), atol=1e-5)
    expected = [int(np.argmax(stand_in.logits(ids[:end]))) == ids[end] for end in range(1, len(ids))]
    assert scores.is_top.tolist() == expected
    assert scores.is_top[0]
    np.testing.assert_array_equal(session.token_logprobs(np.array(ids)), scores.logprobs)
    assert session.token_logprobs(np.array([5])).shape == (0,)


@pytest.mark.slow
def test_llama_cpp_gives_them_token_by_token_and_incomplete_characters_too(llama, file, folder, cache):  # noqa: F811
    served = load(EngineSpec(llama.listening_address, "tiny"))
    exact = load(EngineSpec(str(file), "", "float32", engine="hf"))
    ids = np.concatenate([random_ids(served, 12), served.encoder.encode("½中".encode()).ids])
    session = served.session()
    assert isinstance(session, RemoteSession)
    scores = session.token_scores(ids)
    for end in (1, 5, len(ids) - 1):
        candidates = session.top_tokens(ids[:end], served.vocabulary.size)
        own = candidates.logprobs[candidates.ids == ids[end]][0] - np.logaddexp.reduce(candidates.logprobs)
        assert scores.logprobs[end - 1] == pytest.approx(own, abs=2e-3)
    # llama.cpp keeps keys and values in float16, transformers here in float32.
    np.testing.assert_allclose(scores.logprobs, exact.session().token_logprobs(ids), rtol=5e-3)
    rows = exact.session().logits(ids, last=len(ids))[:-1]
    assert scores.is_top.tolist() == (rows.argmax(axis=1) == ids[1:]).tolist()


@pytest.mark.slow
def test_two_servers_give_the_weights_of_the_local_fit(llama, file, folder, cache, tmp_path):  # noqa: F811
    other = write_tiny_gguf(tmp_path / "other.gguf", context=512, seed=5)
    second = start_llama(other)
    texts = "".join(chr(97 + i) for i in np.random.default_rng(0).integers(0, 26, size=150))
    local = pair(*(load(EngineSpec(str(path), "", "float32", engine="hf")) for path in (file, other)))
    served = pair(*(load(EngineSpec(server.listening_address, "tiny")) for server in (llama, second)))
    weights = [expectation_maximisation(score(ensemble, texts)).weights for ensemble in (local, served)]
    assert 0.02 < weights[0][0] < 0.98
    np.testing.assert_allclose(weights[1], weights[0], atol=0.01)


def pair(first: Any, second: Any, **options: Any) -> Ensemble:
    return Ensemble([LoadedMember(first, "a"), LoadedMember(second, "b")], unit="piece", **options)


@pytest.mark.slow
def test_texts_answers_and_weights_come_from_servers_alone(folder):  # noqa: F811
    servers = [FakeServer(seed=seed).start() for seed in (1, 2)]
    try:
        for server in servers:
            server.scores = "prompt_logprobs"
        members = [RemoteEngine(EngineSpec(server.url, ""), folder, QUICK) for server in servers]
        ensemble = pair(*members)
        scores = score(ensemble, TEXT, identities=[identity(server.url) for server in servers])
        prefix = members[0].prompts.prefix(members[0].vocabulary.end_ids)
        ids = [*prefix, *members[0].encoder.encode(TEXT.encode()).ids]
        for i, server in enumerate(servers):
            expected = logprobs(server, [int(token) for token in ids])[len(prefix) - 1 :]
            np.testing.assert_allclose(scores.logprobs[:, i].sum(), expected.sum(), atol=1e-3)
        fitted = expectation_maximisation(scores).weights
        assert fitted.min() > 0.2  # two tables of noise
        answers = score_answers(ensemble, [("abc", "de")], ends=True)
        assert np.isfinite(answers.logprobs).all()
        assert (answers.starts == answers.ends).sum() == 1
        scorer = ContinuationScorer(ensemble)
        logprob, greedy = scorer.continuation(RequestContext("abc"), "de")
        assert logprob < 0
        assert not greedy
        # A prompt is scored where it is continued, without what begins a text; other tokens are not reported with it.
        echo: dict[str, Any] = {"raw": True, "score_prompt": True, "max_tokens": 0}
        prompt = ensemble.generate(TEXT, **echo).prompt
        mixed = scores.mixture(np.array([0.5, 0.5]))[-len(prompt) :]
        np.testing.assert_allclose([token.logprob for token in prompt][3:], mixed[3:], atol=1e-4)
        with pytest.raises(UnsupportedError, match="of a prompt's own tokens, and no others"):
            ensemble.generate(TEXT, **echo, top_logprobs=1)
        # Weights by prompt need the prompt's log-probabilities, and nothing else.
        routed = pair(*members, router=PromptRouter(np.array([0.5, 0.5]), 2.0))
        assert routed.generate("abc", seed=1, max_tokens=3, top_k=5, ignore_end=True, raw=True).text
    finally:
        for server in servers:
            server.stop()


def test_a_server_without_them_is_named(folder):  # noqa: F811
    server = FakeServer().start()
    try:
        engine = RemoteEngine(EngineSpec(server.url, ""), folder, QUICK)
        with pytest.raises(UnsupportedError, match=rf"{server.url}: the server returns no log-probabilities") as raised:
            score(Ensemble([LoadedMember(engine, "a")]), "a text")
        assert "engine='hf'" in str(raised.value)
        server.scores = "prompt_logprobs"
        server.faults = ["error"]
        with pytest.raises(EngineError):
            engine.session().token_logprobs(np.array([1, 2, 3]))
        nonsense = {"model": "fake", "choices": [{"text": "x", "prompt_logprobs": [None, {"2": {"logprob": 3.0}}, {}]}]}
        server.faults = [json.dumps(nonsense)] * 2
        with pytest.raises(UnsupportedError, match="returns no log-probabilities"):
            engine.session().token_logprobs(np.array([1, 2, 3]))
    finally:
        server.stop()


def test_a_score_that_takes_long_can_be_given_up(folder):  # noqa: F811
    server = FakeServer().start()
    try:
        server.scores, server.delay = "prompt_logprobs", 2.0
        ensemble = Ensemble([LoadedMember(RemoteEngine(EngineSpec(server.url, ""), folder, QUICK), "a")])
        scheduler = Scheduler(2)

        def start(**options: Any) -> Generation:
            settings = ensemble.settings(raw=True, seed=1, top_k=5, **options)
            generation = ensemble.context(settings).start(ensemble.encode_prompt("abc", settings))
            scheduler.add(generation)
            return generation

        server.faults = ["slow"]
        echo = start(score_prompt=True, max_tokens=0)
        while not server.in_flight:
            assert scheduler.step() == []
        scheduler.cancel(echo)
        later = start(max_tokens=2, ignore_end=True)
        assert [*scheduler.run()] == [later]
        assert server.in_flight >= 1  # the server is still at what was given up
        assert len(later.completion.tokens) == 2
    finally:
        server.stop()


def test_what_is_behind_a_server_is_not_cached():
    assert identity("http://127.0.0.1:8000#model") is None
