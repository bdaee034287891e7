from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from vllm_cases import *  # noqa: F403
from vllm_cases import assert_valid, pair
from vllm_server import served, write_tiny_model

from mixlm.engines.contract import *  # noqa: F403
from mixlm.engines.contract import random_ids

pytest.importorskip("vllm")
pytest.importorskip("aiohttp")
pytest.importorskip("websockets")
from mixlm.binding import LoadedMember
from mixlm.engines import EngineSpec, load
from mixlm.engines.base import Engine
from mixlm.engines.remote.engine import RemoteEngine
from mixlm.engines.remote.http_client import ClientLimits
from mixlm.engines.remote.session_client import SessionPool
from mixlm.engines.requests import GenerateRequest
from mixlm.engines.vllm.sampling_params import SESSION_PATH
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, EngineError, GenerationInterruptedError
from mixlm.types import Sampling

pytestmark = pytest.mark.engines

QUICK = ClientLimits(connect=2, response=20, busy=2)
PROCESSED = ("--logprobs-mode", "processed_logprobs", "--max-logprobs", "100")
MASK = ("--logits-processors", "mixlm.engines.vllm.banned_tokens_plugin:BannedTokensProcessor")
KEY = "secret-7"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def server(folder) -> Iterator[str]:
    with served(folder, *PROCESSED, *MASK, key=KEY) as (_, url):
        yield url


@pytest.fixture(scope="module", params=["sessions", "completions"])
def engine(request, server, folder) -> Iterator[RemoteEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXLM_TEST_KEY", KEY)
        spec = EngineSpec(server, "tiny", key_env="MIXLM_TEST_KEY")
        remote = RemoteEngine(spec, folder)
        assert remote.details["samples itself"] == "yes, masking"
        assert remote.details["prefix cache"] == "reported"
        [replica] = remote.replicas
        assert replica.server.sessions is not None
        if request.param == "completions":
            replica.server.sessions = None
        yield remote


@pytest.fixture(scope="module")
def exact(folder) -> Engine:
    return load(EngineSpec(str(folder), "tiny", "float32", engine="hf"))


def test_the_key_holds_for_sessions_too(server):
    with pytest.raises(ConfigError, match="asks for a key"):
        load(EngineSpec(server, "tiny"))

    async def check() -> None:
        pass

    for key, expected in ((KEY, True), ("another", False)):
        client = SimpleNamespace(base_url=server, key=key, limits=QUICK, count_connection=lambda: None)
        assert asyncio.run(SessionPool(client, check).is_available()) == expected


def test_a_connection_that_was_closed_is_opened_again(engine):
    session, ids = engine.session(), random_ids(engine, 20)
    first = session.logits(ids).copy()
    session.logits(ids[:10])
    engine.replicas[0].server.close()
    np.testing.assert_allclose(session.logits(ids), first, atol=1e-4)


def test_more_sessions_than_may_be_idle(engine, exact):
    """The server keeps half of its sequences while they are idle; the others are prefilled again."""
    sessions = [engine.session() for _ in range(12)]
    none = np.zeros(0, dtype=np.int64)
    texts = [random_ids(engine, 20, seed) for seed in range(12)]
    for _ in range(2):
        for i, session in enumerate(sessions):
            request = GenerateRequest(0, texts[i], 3, Sampling(top_k=8), none, i)
            response = session.generate(request)
            assert_valid(exact, request, response)
            texts[i] = np.concatenate([texts[i], response.ids])


def test_a_malformed_message_is_refused_and_the_next_one_served(server):
    from websockets.sync.client import connect

    url, headers = server.replace("http", "ws", 1) + SESSION_PATH, {"Authorization": f"Bearer {KEY}"}
    with connect(url, additional_headers=headers) as socket:
        socket.send('{"keep": 5, "ids": [], "parameters": {}}')
        assert "keep is 5 of 0 tokens" in socket.recv()
        socket.send("no JSON")
        assert "error" in socket.recv()
        socket.send('{"keep": 0, "ids": [1, 2], "parameters": {"max_tokens": 1, "logprobs": 5}}')
        assert '"logprobs"' in socket.recv()


@pytest.mark.parametrize("on_failure", ["error", "drop"])
def test_a_server_that_is_killed_in_the_middle_of_a_generation_and_comes_back_as_another(
    folder, tmp_path, exact, on_failure
):
    named = ("--served-model-name", "tiny")
    with served(folder, *PROCESSED, *named, plugin=on_failure == "drop") as (process, url):
        engine = RemoteEngine(EngineSpec(url, "goes", tokenizer=str(folder)), folder, QUICK)
        assert engine.details["samples itself"] == "yes"  # without the mask, by biases
        assert (engine.replicas[0].server.sessions is None) == (on_failure == "error")
        both = Ensemble([LoadedMember(exact, "stays"), LoadedMember(engine, "goes")])
        options = {"seed": 2, "max_tokens": 30, "ignore_end": True, "top_k": 9}
        whole = both.generate("three", **options)
        stream = both.stream("three", **options, on_failure=on_failure)
        first_tokens = [next(stream) for _ in range(8)]
        process.send_signal(signal.SIGKILL)
        process.wait()
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
            tokens = tokens[: 30 - dropped]
        assert list(tokens[:8]) == first_tokens
        assert [token.data for token in tokens] == [token.data for token in whole.tokens][: len(tokens)]
        assert not engine.alive()
    port = int(url.rpartition(":")[2])
    with served(write_tiny_model(tmp_path, seed=1), *named, *PROCESSED, port=port, plugin=on_failure == "drop"):
        with pytest.raises(EngineError, match="another model now"):
            pair(engine).generate("three", seed=2, max_tokens=3)
        assert not engine.alive()


def test_a_server_with_the_usual_settings_is_asked_token_by_token(folder, exact):
    with served(folder, plugin=False) as (_, url):
        engine = load(EngineSpec(url, "tiny"))
        assert "processed_logprobs" in engine.details["samples itself"]
        assert engine.top_k_limit == 16
        ids = random_ids(engine, 20)
        assert engine.session().logits(ids)[0].argmax() == exact.session().logits(ids)[0].argmax()
        assert len(pair(engine).generate("three", seed=1, max_tokens=6, top_k=9, ignore_end=True).tokens) == 6
