from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from contract import *  # noqa: F403
from contract import random_ids
from vllm_cases import *  # noqa: F403
from vllm_cases import pair
from vllm_server import served, write_tiny_model

pytest.importorskip("vllm")
pytest.importorskip("aiohttp")
pytest.importorskip("websockets")
from mixlm.engines import EngineSpec, load
from mixlm.engines.base import Engine, GenerateRequest
from mixlm.engines.remote.engine import RemoteEngine
from mixlm.engines.remote.http_client import ApiKey, ClientLimits
from mixlm.engines.remote.session_client import SessionConnector
from mixlm.ensemble import Ensemble, MemberSpec
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
def engine(request, server) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXLM_TEST_KEY", KEY)
        one = load(EngineSpec(server, "tiny", key_env="MIXLM_TEST_KEY"))
        assert one.details["samples itself"] == "yes, masking"
        assert one.details["prefix cache"] == "reported"
        [server] = one.replicas
        assert server.texts is not None
        if request.param == "completions":
            server.texts = None
        yield one


@pytest.fixture(scope="module")
def exact(folder) -> Engine:
    return load(EngineSpec(str(folder), "tiny", "float32", engine="hf"))


def test_the_key_holds_for_sessions_too(server):
    with pytest.raises(ConfigError, match="asks for a key"):
        load(EngineSpec(server, "tiny"))
    for key, found in ((KEY, True), ("another", False)):
        line = asyncio.run(SessionConnector.found(server, ApiKey(key), QUICK))
        assert (line is not None) == found


def test_a_connection_that_was_dropped_is_opened_again(engine):
    session, ids = engine.session(), random_ids(engine, 20)
    first = session.logits(ids).copy()
    if engine.replicas[0].texts is not None:
        engine.replicas[0].texts._open[session].close()
    session._latest = None
    np.testing.assert_allclose(session.logits(ids), first, atol=1e-4)


def test_more_sessions_than_may_rest(engine, exact):
    """The server keeps half of its sequences at rest; the others are read again."""
    sessions = [engine.session() for _ in range(12)]
    none = np.zeros(0, dtype=np.int64)
    texts = [random_ids(engine, 20, seed) for seed in range(12)]
    for _ in range(2):
        for at, session in enumerate(sessions):
            run = GenerateRequest(0, texts[at], 3, Sampling(top_k=8), none, at)
            written = session.generate(run)
            assert_written(exact, run, written)  # noqa: F405
            texts[at] = np.concatenate([texts[at], written.ids])


def test_what_is_no_message_is_refused_and_the_next_is_answered(engine):
    if engine.replicas[0].texts is None:
        pytest.skip("only sessions have messages")

    async def talk() -> None:
        text = await engine.replicas[0].texts._line.open()
        await text._socket.send('{"keep": 5, "ids": [], "parameters": {}}')
        assert "keep is 5 of 0 tokens" in await text._socket.recv()
        await text._socket.send("no JSON")
        assert "error" in await text._socket.recv()
        await text._socket.send('{"keep": 0, "ids": [1, 2], "parameters": {"max_tokens": 1, "logprobs": 5}}')
        assert '"told"' in await text._socket.recv()
        text.close()

    asyncio.run(talk())


@pytest.mark.parametrize("on_failure", ["error", "drop"])
def test_a_server_that_is_killed_in_the_middle_of_a_reply_and_comes_back_as_another(
    folder, tmp_path, exact, on_failure, monkeypatch
):
    named = ("--served-model-name", "tiny")
    with served(folder, *PROCESSED, *named, plugin=on_failure == "drop") as (process, url):
        engine = RemoteEngine(EngineSpec(url, "goes", tokenizer=str(folder)), folder, QUICK)
        assert engine.details["samples itself"] == "yes"  # without the mask, by biases
        assert (engine.replicas[0].texts is None) == (on_failure == "error")
        both = Ensemble([MemberSpec(exact, "stays"), MemberSpec(engine, "goes")])
        options = {"seed": 2, "max_tokens": 30, "ignore_end": True, "top_k": 9}
        whole = both.generate("three", **options)
        stream = both.stream("three", **options, on_failure=on_failure)
        begun = [next(stream) for _ in range(8)]
        process.send_signal(signal.SIGKILL)
        process.wait()
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
            tokens = tokens[: 30 - dropped]
        assert list(tokens[:8]) == begun
        assert [one.data for one in tokens] == [one.data for one in whole.tokens][: len(tokens)]
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
