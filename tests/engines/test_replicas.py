"""A member behind several servers; certificates; places in llama.cpp."""

from __future__ import annotations

import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from contract import random_ids
from servers import FakeServer

pytest.importorskip("aiohttp")

from test_remote import QUICK, SERVE, cache, file, folder, llama  # noqa: F401

from mixlm.config import parse_config
from mixlm.engines import EngineSpec, load
from mixlm.engines.base import LogitsRequest
from mixlm.engines.remote.engine import RemoteEngine
from mixlm.ensemble import Ensemble, MemberSpec
from mixlm.errors import ConfigError, EngineError, UnsupportedError

OPTIONS = {"seed": 2, "max_tokens": 30, "ignore_end": True, "top_k": 9}


@pytest.fixture
def fakes() -> Iterator[list[FakeServer]]:
    servers = [FakeServer().start(), FakeServer().start()]
    yield servers
    for one in servers:
        one.stop()


def urls(servers: list[FakeServer]) -> EngineSpec:
    return EngineSpec(",".join(one.url for one in servers), "")


def asked(one: FakeServer) -> int:
    return sum(len(body["prompt"]) < 8 for body in one.requests)  # without the questions that tell who it is


@pytest.fixture
def both(fakes, folder) -> RemoteEngine:  # noqa: F811
    return RemoteEngine(urls(fakes), folder, QUICK)


def test_sequences_are_shared_out_and_each_stays_with_its_server(both, fakes):
    sessions = [both.session() for _ in range(4)]
    before = [asked(one) for one in fakes]
    for length in range(3, 7):
        both.respond([(one, LogitsRequest(0, np.arange(5, 5 + length) + at)) for at, one in enumerate(sessions)])
    assert [asked(one) - was for one, was in zip(fakes, before, strict=True)] == [8, 8]
    assert [both.replicas.index(one.replica) for one in sessions] == [0, 1, 0, 1]


def test_a_sequence_goes_on_at_another_server_and_the_first_one_comes_back(both, fakes, caplog):
    one = both.session()
    ids = np.arange(5, 12)
    one.logits(ids)
    fakes[0].stop()
    assert one.logits(np.append(ids, 3))[0].argmax() == fakes[1].logits([10, 11, 3]).argmax()
    assert one.replica is both.replicas[1]
    assert both.alive()
    assert "does not answer" in caplog.text
    fakes[0].start()
    time.sleep(0.6)
    other = both.session()
    other.logits(ids)
    assert other.replica is both.replicas[0]
    assert one.replica is both.replicas[1]


def test_an_error_is_raised_when_no_server_is_left(both, fakes):
    one = both.session()
    for fake in fakes:
        fake.stop()
    with pytest.raises(EngineError, match="does not answer"):
        one.logits(np.arange(5, 9))
    assert not both.alive()
    fakes[1].start()
    assert both.alive()
    assert one.logits(np.arange(5, 9)).shape == (1, 260)


def test_servers_with_different_models_are_no_replicas(fakes, folder):  # noqa: F811
    fakes[1].seed = 1
    with pytest.raises(UnsupportedError, match=f"{fakes[1].url} has another model: it is no replica"):
        RemoteEngine(urls(fakes), folder, QUICK)
    fakes[1].seed, fakes[1].max_logprobs = 0, 30
    with pytest.raises(UnsupportedError, match="tells 20 of the likeliest tokens, others 80"):
        RemoteEngine(urls(fakes), folder, QUICK)
    fakes[1].max_logprobs, fakes[1].models = 100, [{"id": "fake", "max_model_len": 100}]
    with pytest.raises(UnsupportedError, match="a context of 99 tokens, others 511"):
        RemoteEngine(urls(fakes), folder, QUICK)


def test_a_server_that_is_not_there_yet_is_taken_in_later(fakes, folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr("mixlm.engines.remote.server._FIRST_WAIT", 0.0)
    for missing in (0, 1):
        fakes[missing].stop()
        one = RemoteEngine(urls(fakes), folder, QUICK)
        sessions = [one.session() for _ in range(2)]
        sessions[0].logits(np.arange(5, 9))
        assert sessions[0].replica is one.replicas[1 - missing]
        fakes[missing].start()
        sessions[1].logits(np.arange(5, 9))
        assert sessions[1].replica is one.replicas[missing]


def test_a_server_that_comes_back_with_another_model_stays_out(both, fakes, monkeypatch):
    monkeypatch.setattr("mixlm.engines.remote.server._FIRST_WAIT", 0.0)
    one = both.session()
    one.logits(np.arange(5, 9))
    fakes[0].stop()
    fakes[0].seed = 1
    fakes[0].start()
    for last in range(9, 12):
        found = one.logits(np.arange(5, last + 1))
        assert found[0].argmax() == fakes[1].logits([last - 2, last - 1, last]).argmax()
    assert one.replica is both.replicas[1]


def test_a_file_names_servers_by_url():
    def member(**given):
        return parse_config({"members": [given]}, "file").members[0]

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
        yield [(one, one.stdout.readline().strip()) for one in started]
    finally:
        for one in started:
            one.kill()
            one.wait()
            one.stdout.close()


def test_a_server_killed_in_the_middle_of_a_reply_is_replaced_by_its_replica(processes, llama):  # noqa: F811
    stays = load(EngineSpec(llama.listening_address, ""))
    goes = RemoteEngine(EngineSpec(",".join(url for _, url in processes), ""), None, QUICK)
    pair = Ensemble([MemberSpec(stays, "stays"), MemberSpec(goes, "goes")])
    # Not by the same servers, which would have read the text then.
    whole = Ensemble([MemberSpec(stays, "stays"), MemberSpec(stays, "goes")]).generate("three", **OPTIONS)
    stream = pair.stream("three", **OPTIONS)
    begun = [next(stream) for _ in range(8)]
    session = stream.sessions[1]
    home, before = session.replica, len(session.stats.forwards)
    server, _ = processes[goes.replicas.index(home)]
    server.send_signal(signal.SIGKILL)
    server.wait()
    reply = stream.finish()
    assert session.replica is not home
    assert list(reply.tokens[:8]) == begun
    assert [one.data for one in reply.tokens] == [one.data for one in whole.tokens]
    assert reply.usage.members["goes"].dropped == 0
    assert session.stats.forwards[before].tokens >= 8  # the other server had not read the text
    assert all(one.tokens < 20 < one.cached for one in session.stats.forwards[before + 1 :])


def test_sequences_with_one_beginning_keep_their_places(processes):
    _, url = processes[0]
    alone = RemoteEngine(EngineSpec(url, ""), None, QUICK)
    ids = random_ids(alone, 40)
    one = alone.session()
    for end in (30, 32, 34):
        one.logits(ids[:end])
    assert [(work.tokens, work.cached) for work in one.stats.forwards] == [(30, 0), (2, 30), (2, 32)]
    assert alone.details["prefix cache"] == "reported"


def test_a_place_that_was_left_serves_who_begins_alike(processes):
    _, url = processes[0]
    alone = RemoteEngine(EngineSpec(url, ""), None, QUICK)
    ids = random_ids(alone, 40)
    alone.session().logits(ids[:30])
    other = alone.session()
    alone.respond([(other, LogitsRequest(0, ids))])
    assert other.stats.forwards[0].cached == 30


def test_a_certificate_that_nobody_vouches_for_is_refused(folder, tmp_path, monkeypatch):  # noqa: F811
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    words = f"req -x509 -newkey rsa:2048 -nodes -keyout {key} -out {certificate} -days 2 -subj /CN=localhost"
    command = ["openssl", *words.split(), "-addext", "subjectAltName=IP:127.0.0.1"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    one = FakeServer().start(context)
    try:
        with pytest.raises(EngineError, match=r"(?i)certificate"):
            RemoteEngine(EngineSpec(one.url, ""), folder, QUICK)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        remote = RemoteEngine(EngineSpec(one.url, ""), folder, QUICK)
        assert remote.session().logits(np.array([8, 9]))[0].argmax() == one.logits([8, 9]).argmax()
    finally:
        one.stop()


def test_many_threads_may_ask_one_member(both, fakes):
    texts = [np.array([3, 4, at]) for at in range(40)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda ids: both.session().logits(ids)[0].argmax(), texts))
    assert found == [fakes[0].logits(ids.tolist()).argmax() for ids in texts]
