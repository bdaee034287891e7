"""A member behind several servers; certificates; slots of llama.cpp."""

from __future__ import annotations

import asyncio
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from servers import FakeServer

from mixlm.engines.contract import random_ids

pytest.importorskip("aiohttp")

from test_remote import QUICK, SERVE, cache, file, folder, llama  # noqa: F401

from mixlm.binding import LoadedMember
from mixlm.config import parse_config
from mixlm.engines import EngineSpec, load
from mixlm.engines.remote.engine import RemoteEngine
from mixlm.engines.remote.replica import ReplicaSet
from mixlm.engines.requests import LogitsRequest
from mixlm.ensemble import Ensemble
from mixlm.errors import (
    ConfigError,
    EngineError,
    GenerationInterruptedError,
    RequestRefusedError,
    UnsupportedError,
)

RETRY_AT_ONCE = replace(QUICK, first_retry=0.0)
OPTIONS = {"seed": 2, "max_tokens": 30, "ignore_end": True, "top_k": 9}


@pytest.fixture
def fakes() -> Iterator[list[FakeServer]]:
    servers = [FakeServer().start(), FakeServer().start()]
    yield servers
    for server in servers:
        server.stop()


def urls(servers: list[FakeServer]) -> EngineSpec:
    return EngineSpec(",".join(server.url for server in servers), "")


def wait_until(reached: Callable[[], bool]) -> None:
    limit = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < limit
        time.sleep(0.01)


def request_count(server: FakeServer) -> int:
    return sum(len(body["prompt"]) < 8 for body in server.requests)  # without the checks of the model


@pytest.fixture
def both(fakes, folder) -> RemoteEngine:  # noqa: F811
    return RemoteEngine(urls(fakes), folder, QUICK)


def test_sequences_are_balanced_and_each_stays_with_its_server(both, fakes):
    sessions = [both.session() for _ in range(4)]
    before = [request_count(fake) for fake in fakes]
    for length in range(3, 7):
        both.respond([(session, LogitsRequest(0, np.arange(5, 5 + length) + i)) for i, session in enumerate(sessions)])
    assert [request_count(fake) - count for fake, count in zip(fakes, before, strict=True)] == [8, 8]
    assert [both.replicas.index(session.replica) for session in sessions] == [0, 1, 0, 1]


def test_a_sequence_goes_on_at_another_server_and_the_first_one_comes_back(both, fakes, caplog):
    session = both.session()
    ids = np.arange(5, 12)
    session.logits(ids)
    fakes[0].stop()
    assert session.logits(np.append(ids, 3))[0].argmax() == fakes[1].logits([10, 11, 3]).argmax()
    assert session.replica is both.replicas[1]
    assert both.alive()
    assert "does not answer" in caplog.text
    fakes[0].start()
    time.sleep(0.6)
    both.session().logits(ids)
    wait_until(lambda: both.replicas[0].is_ready)
    other = both.session()
    other.logits(ids)
    assert other.replica is both.replicas[0]
    assert session.replica is both.replicas[1]


@pytest.mark.slow
def test_an_error_is_raised_when_no_server_is_left(both, fakes):
    session = both.session()
    for fake in fakes:
        fake.stop()
    with pytest.raises(EngineError, match="does not answer"):
        session.logits(np.arange(5, 9))
    assert not both.alive()
    fakes[1].start()
    assert both.alive()
    assert session.logits(np.arange(5, 9)).shape == (1, 260)


def test_a_request_that_a_server_refuses_fails_alone(both, fakes, monkeypatch):
    session, other = both.session(), both.session()
    session.logits(np.arange(5, 9))
    monkeypatch.setattr(fakes[0], "refusal", lambda body: {"error": "no"} if 77 in body["prompt"] else None)
    with pytest.raises(RequestRefusedError, match=r"refuses \(400\): no"):
        session.logits(np.array([5, 77]))
    assert all(replica.is_ready for replica in both.replicas)
    assert other.logits(np.arange(5, 9)).shape == session.logits(np.arange(5, 9)).shape


def test_a_member_that_refuses_a_request_is_not_dropped(both, fakes, monkeypatch):
    pair = Ensemble([LoadedMember(both, "a"), LoadedMember(both, "b")])
    stream = pair.stream("one two", on_failure="drop", **OPTIONS)
    next(stream)
    for fake in fakes:
        monkeypatch.setattr(fake, "refusal", lambda body: {"error": {"message": "no"}})
    with pytest.raises(GenerationInterruptedError, match=r"refuses \(400\): no"):
        stream.finish()
    assert all(member.dropped == 0 for member in stream.completion.usage.members.values())


@pytest.mark.slow
def test_servers_with_different_models_are_no_replicas(fakes, folder):  # noqa: F811
    fakes[1].seed = 1
    with pytest.raises(UnsupportedError, match=f"{fakes[1].url} has another model: it is no replica"):
        RemoteEngine(urls(fakes), folder, QUICK)
    fakes[1].seed, fakes[1].max_logprobs = 0, 30
    with pytest.raises(UnsupportedError, match="returns 30 of the most likely tokens, others 100"):
        RemoteEngine(urls(fakes), folder, QUICK)
    fakes[1].max_logprobs, fakes[1].models = 100, [{"id": "fake", "max_model_len": 100}]
    with pytest.raises(UnsupportedError, match="a context of 99 tokens, others 511"):
        RemoteEngine(urls(fakes), folder, QUICK)


def test_servers_that_refuse_to_sample_in_the_same_way_are_replicas(fakes, folder, monkeypatch):  # noqa: F811
    for fake in fakes:
        monkeypatch.setattr(fake, "refusal", lambda body: {"error": "no"} if "return_token_ids" in body else None)
    engine = RemoteEngine(urls(fakes), folder, QUICK)
    assert all(replica.is_ready for replica in engine.replicas)
    assert "the server refuses (400): no" in engine.details["samples itself"]


def test_servers_that_do_not_say_their_context_are_replicas_where_it_is_given(fakes, folder):  # noqa: F811
    for fake in fakes:
        del fake.models[0]["max_model_len"]
    engine = RemoteEngine(replace(urls(fakes), context=64), folder, QUICK)
    assert engine.context_length == 64
    assert all(replica.is_ready for replica in engine.replicas)


def test_a_server_that_is_not_there_yet_is_taken_in_later(fakes, folder):  # noqa: F811
    for missing in (0, 1):
        fakes[missing].stop()
        engine = RemoteEngine(urls(fakes), folder, RETRY_AT_ONCE)
        sessions = [engine.session() for _ in range(2)]
        sessions[0].logits(np.arange(5, 9))
        assert sessions[0].replica is engine.replicas[1 - missing]
        fakes[missing].start()
        sessions[1].logits(np.arange(5, 9))
        wait_until(lambda: engine.replicas[missing].is_ready)  # noqa: B023
        last = engine.session()
        last.logits(np.arange(5, 9))
        assert last.replica is engine.replicas[missing]


def test_no_sequence_waits_for_a_server_that_is_retried(fakes, folder, monkeypatch):  # noqa: F811
    engine = RemoteEngine(urls(fakes), folder, RETRY_AT_ONCE)
    sessions = [engine.session() for _ in range(3)]
    sessions[0].logits(np.arange(5, 9))
    fakes[0].stop()
    sessions[0].logits(np.arange(5, 10))
    released = threading.Event()
    connect = ReplicaSet.connect

    async def wait_and_connect(self, replica):
        await asyncio.to_thread(released.wait, 60)
        await connect(self, replica)

    monkeypatch.setattr(ReplicaSet, "connect", wait_and_connect)
    fakes[0].start()
    for session in sessions:
        session.logits(np.arange(5, 11))  # the retry is under way, and not waited for
    assert {engine.replicas.index(session.replica) for session in sessions} == {1}
    assert not engine.replicas[0].is_ready
    released.set()
    wait_until(lambda: engine.replicas[0].is_ready)


def test_a_server_that_comes_back_with_another_model_stays_out(fakes, folder):  # noqa: F811
    engine = RemoteEngine(urls(fakes), folder, RETRY_AT_ONCE)
    session = engine.session()
    session.logits(np.arange(5, 9))
    fakes[0].stop()
    fakes[0].seed = 1
    fakes[0].start()
    for last in range(9, 12):
        logits = session.logits(np.arange(5, last + 1))
        assert logits[0].argmax() == fakes[1].logits([last - 2, last - 1, last]).argmax()
    assert session.replica is engine.replicas[1]


def test_a_file_names_servers_by_url():
    def member(**keys):
        return parse_config({"members": [keys]}, "file").members[0]

    assert member(url=["http://a:1", "https://b:2#x"]).model == "http://a:1,https://b:2#x"
    assert member(url="http://a:1").model == "http://a:1"
    with pytest.raises(ConfigError, match="a model or a url, not both"):
        member(url="http://a:1", model="http://b:1")
    for wrong in ([], ["a:1"], 3, ["http://a:1,http://b:1"]):
        with pytest.raises(ConfigError, match="a server's URL or a list of them"):
            member(url=wrong)


@pytest.fixture
def processes(file) -> Iterator[list[tuple[subprocess.Popen[str], str]]]:  # noqa: F811
    """Two servers of llama.cpp with one model, each in a process of its own, and their URLs."""
    pytest.importorskip("xllamacpp")
    started = [
        subprocess.Popen([sys.executable, "-c", SERVE, str(file)], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    try:
        yield [(process, process.stdout.readline().strip()) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
            process.stdout.close()


@pytest.mark.slow
def test_a_server_killed_in_the_middle_of_a_generation_is_replaced_by_its_replica(processes, llama):  # noqa: F811
    stays = load(EngineSpec(llama.listening_address, ""))
    goes = RemoteEngine(EngineSpec(",".join(url for _, url in processes), ""), None, QUICK)
    pair = Ensemble([LoadedMember(stays, "stays"), LoadedMember(goes, "goes")])
    # Not by the same servers, which would have the text in their caches then.
    whole = Ensemble([LoadedMember(stays, "stays"), LoadedMember(stays, "goes")]).generate("three", **OPTIONS)
    stream = pair.stream("three", **OPTIONS)
    first_tokens = [next(stream) for _ in range(8)]
    session = stream.sessions[1]
    replica, before = session.replica, len(session.stats.forwards)
    server, _ = processes[goes.replicas.index(replica)]
    server.send_signal(signal.SIGKILL)
    server.wait()
    completion = stream.finish()
    assert session.replica is not replica
    assert list(completion.tokens[:8]) == first_tokens
    assert [token.data for token in completion.tokens] == [token.data for token in whole.tokens]
    assert completion.usage.members["goes"].dropped == 0
    assert session.stats.forwards[before].tokens >= 8  # the other server had nothing of the text in its cache
    assert all(forward.tokens < 20 < forward.cached for forward in session.stats.forwards[before + 1 :])


@pytest.mark.slow
def test_sequences_with_a_common_prefix_keep_their_slots(processes):
    _, url = processes[0]
    alone = RemoteEngine(EngineSpec(url, ""), None, QUICK)
    ids = random_ids(alone, 40)
    session = alone.session()
    for end in (30, 32, 34):
        session.logits(ids[:end])
    assert [(forward.tokens, forward.cached) for forward in session.stats.forwards] == [(30, 0), (2, 30), (2, 32)]
    assert alone.details["prefix cache"] == "reported"


@pytest.mark.slow
def test_a_slot_that_was_left_serves_a_sequence_with_the_same_prefix(processes):
    _, url = processes[0]
    alone = RemoteEngine(EngineSpec(url, ""), None, QUICK)
    ids = random_ids(alone, 40)
    alone.session().logits(ids[:30])
    other = alone.session()
    alone.respond([(other, LogitsRequest(0, ids))])
    assert other.stats.forwards[0].cached == 30


@pytest.mark.slow
def test_an_unknown_certificate_is_refused(folder, tmp_path, monkeypatch):  # noqa: F811
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    arguments = f"req -x509 -newkey rsa:2048 -nodes -keyout {key} -out {certificate} -days 2 -subj /CN=localhost"
    command = ["openssl", *arguments.split(), "-addext", "subjectAltName=IP:127.0.0.1"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = FakeServer().start(context)
    try:
        with pytest.raises(EngineError, match=r"(?i)certificate"):
            RemoteEngine(EngineSpec(server.url, ""), folder, QUICK)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        remote = RemoteEngine(EngineSpec(server.url, ""), folder, QUICK)
        assert remote.session().logits(np.array([8, 9]))[0].argmax() == server.logits([8, 9]).argmax()
    finally:
        server.stop()


@pytest.mark.slow
def test_many_threads_may_use_one_member(both, fakes):
    prompts = [np.array([3, 4, i]) for i in range(40)]
    with ThreadPoolExecutor(8) as threads:
        tokens = list(threads.map(lambda ids: both.session().logits(ids)[0].argmax(), prompts))
    assert tokens == [fakes[0].logits(ids.tolist()).argmax() for ids in prompts]
