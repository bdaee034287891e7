"""Load: queues, limits, timeouts, disconnects, failures and shutdown."""

from __future__ import annotations

import asyncio
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from serving import HELLO, EndlessToy, endless, events, raw_connection, request_bytes, running, wait

from mixlm.binding import LoadedMember
from mixlm.core.options import GenerationOptions
from mixlm.ensemble import Ensemble
from mixlm.errors import EngineError, MemoryLimitError
from mixlm.loading import load
from mixlm.server.api_errors import ApiError
from mixlm.server.fair_queue import FairQueue
from mixlm.server.limits import ServerLimits
from mixlm.server.model_thread import Job, JobCancelled, JobQueued, ModelThread, TokensGenerated


def test_clients_take_turns():
    line = FairQueue()
    for client, item in [("a", 1), ("a", 2), ("a", 3), ("b", 4), ("c", 5), ("b", 6)]:
        line.push(client, item)
    assert len(line) == 6
    line.remove(lambda item: item == 5)
    assert [line.pop() for _ in range(5)] == [1, 4, 2, 6, 3]


@pytest.mark.slow
def test_batched_completions_are_those_generated_alone():
    with running(load("toy:1", "toy:2"), max_batch=4) as server, ThreadPoolExecutor(12) as pool:
        bodies = [{"seed": i, "max_tokens": 20, "messages": [{"role": "user", "content": f"m{i}"}]} for i in range(24)]
        together = list(pool.map(lambda body: server.chat(**body).json()["choices"], bodies))
        assert together == [server.chat(**body).json()["choices"] for body in bodies]


@pytest.mark.slow
def test_a_full_queue_says_when_to_retry():
    with running(endless(0.01), max_batch=1, max_queue=1) as server, ThreadPoolExecutor(4) as pool:
        first, second = (pool.submit(server.chat, max_tokens=30) for _ in range(2))
        wait(lambda: server.app.model_thread.num_unfinished == 2)
        third = server.chat()
        assert third.status_code == 429
        assert third.json()["error"]["code"] == "queue_full"
        assert 1 <= int(third.headers["retry-after"]) <= 60
        assert first.result().status_code == second.result().status_code == 200
        assert server.chat(max_tokens=2).status_code == 200
        # A request that can never fit is not asked to retry.
        assert server.chat(n=3).json()["error"]["code"] == "too_many_completions"
        assert server.chat(n=3).status_code == 400


def test_too_many_completions_are_refused_before_they_are_prepared(toys, monkeypatch):
    monkeypatch.setattr(GenerationOptions, "with_sequence_offset", None)
    for fields, param in (({"prompt": ["a"] * 2048, "n": 128}, "prompt"), ({"n": 81}, "n")):
        error = toys.complete(**fields).json()["error"]
        assert (error["param"], error["code"]) == (param, "too_many_completions")


class Gated(EndlessToy):
    """A toy whose forwards wait for permits."""

    def __init__(self) -> None:
        super().__init__(1)
        self.gate = threading.Semaphore(0)
        self.on_forward = self.wait_for_permit

    def wait_for_permit(self, ids, last):
        self.begun = getattr(self, "begun", 0) + 1
        self.gate.acquire(timeout=20)


def submit(model_thread, job, ensemble, **options):
    """Admit a job, and start it: all its generations are of the same options."""
    settings = ensemble.settings(**options)
    prompt = ensemble.encode_prompt("x", settings)
    model_thread.admit(job)
    model_thread.start_job(job, [ensemble.context(settings).start(prompt) for _ in range(job.unfinished)])


def test_a_client_with_many_generations_does_not_delay_the_others():
    """One slot; the job of 20 came first. The single one is third: after the running one, and one more."""
    engine, ended = Gated(), []
    ensemble = Ensemble([LoadedMember(engine, "m")])

    class RecordingQueue(asyncio.Queue):
        """Records whose completions end, in the order of the events; readers may lag behind."""

        def __init__(self, name):
            super().__init__()
            self.name = name

        def put_nowait(self, event):
            if isinstance(event, TokensGenerated) and event.completion is not None:
                ended.append(self.name)
            super().put_nowait(event)

    async def run():
        model_thread = ModelThread(ServerLimits(max_batch=1))
        model_thread.start()
        jobs = {"many": Job("a", 20), "single": Job("b", 1)}
        for name, job in jobs.items():
            job.events = RecordingQueue(name)
            submit(model_thread, job, ensemble, max_tokens=1, seed=1)
        engine.gate.release(21)
        while any(job.unfinished for job in jobs.values()):
            await asyncio.sleep(0.001)
        await model_thread.stop()

    asyncio.run(run())
    assert ended.index("single") <= 2


def test_the_slot_of_a_cancelled_generation_is_free_after_the_step():
    engine = Gated()
    ensemble = Ensemble([LoadedMember(engine, "m")])

    async def run():
        model_thread = ModelThread(ServerLimits(max_batch=1))
        model_thread.start()
        gone, next_job = (Job("a", 1), Job("b", 1))
        submit(model_thread, gone, ensemble, seed=1)
        submit(model_thread, next_job, ensemble, max_tokens=1)
        engine.gate.release(2)
        while getattr(engine, "begun", 0) < 3:
            await asyncio.sleep(0.001)
        model_thread.cancel(gone, "gone")  # during its third forward
        engine.gate.release(2)  # the rest of it, and the first of the waiting job
        while next_job.unfinished:
            await asyncio.sleep(0.001)
        assert engine.begun == 4  # no further forward for the cancelled generation
        assert model_thread.num_unfinished == model_thread.num_running == model_thread.num_waiting == 0
        seen = [gone.events.get_nowait() for _ in range(gone.events.qsize())]
        assert isinstance(seen[0], JobQueued)
        assert seen[-1] == JobCancelled("gone")
        await model_thread.stop()

    asyncio.run(run())


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnected_client_frees_its_slot(stream):
    with running(endless(0.005), max_batch=1, max_queue=4) as server:
        connection = raw_connection(
            server.url, request_bytes({"messages": HELLO, "stream": stream, "max_tokens": 3000})
        )
        wait(lambda: server.app.model_thread.num_running == 1)
        waiting = raw_connection(server.url, request_bytes({"messages": HELLO, "stream": stream, "max_tokens": 3000}))
        wait(lambda: server.app.model_thread.num_waiting == 1)
        waiting.close()  # also one that has not started
        wait(lambda: server.app.model_thread.num_waiting == 0)
        assert server.app.model_thread.num_running == 1
        connection.close()
        start = time.monotonic()
        assert server.chat(max_tokens=1).status_code == 200
        assert time.monotonic() - start < 5  # the abandoned completion would take 15 s and more
        assert server.metric("mixlm_cancelled_total", reason="gone") == 2
        assert server.metric("mixlm_requests_total", status="200" if stream else "499") >= 1
        assert server.app.model_thread.num_unfinished == 0


@pytest.mark.slow
def test_a_request_that_takes_too_long_is_ended():
    with running(endless(0.01), request_timeout=0.3) as server:
        late = server.chat(max_tokens=3000)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        *tokens, last = events(server.chat(max_tokens=3000, stream=True))
        assert len(tokens) > 5
        assert last["error"]["code"] == "timeout"
        wait(lambda: server.app.model_thread.num_unfinished == 0)
        assert server.metric("mixlm_cancelled_total", reason="timeout") == 2


@pytest.mark.slow
def test_a_failing_engine_ends_its_completion_and_no_other(caplog):
    class Failing(EndlessToy):
        error: Exception = MemoryLimitError("no memory left")

        def session(self):
            session = super().session()
            plain = session.forward

            def forward(ids, last):
                if session.num_cached + len(ids) > 60:
                    raise self.error
                return plain(ids, last)

            session.forward = forward
            return session

    engine = Failing(1)
    with running(Ensemble([LoadedMember(engine, "m")])) as server, ThreadPoolExecutor(2) as pool:
        failed = server.complete("x", max_tokens=100)
        assert (failed.status_code, failed.json()["error"]["code"]) == (503, "out_of_memory")
        *_, last = events(server.complete("x", max_tokens=100, stream=True))
        assert last["error"]["code"] == "out_of_memory"
        good, bad = pool.submit(server.complete, "x", max_tokens=50), pool.submit(server.complete, "x", max_tokens=100)
        assert (good.result().status_code, bad.result().status_code) == (200, 503)
        # Unexpected errors reveal nothing to clients, and the server goes on.
        Failing.error = RuntimeError("secret detail")
        failed = server.complete("x", max_tokens=100)
        assert failed.status_code == 500
        assert "secret" not in failed.text
        assert server.complete("x", max_tokens=50).status_code == 200
        assert server.client.get("/health").status_code == 200
        assert server.metric("mixlm_errors_total", status="500") == 1
    [record] = [record for record in caplog.records if record.exc_info and "secret detail" in str(record.exc_info[1])]
    assert (record.name, record.fields["request"]) == ("mixlm.server", failed.headers["x-request-id"])


@pytest.mark.slow
def test_small_requests_are_answered_without_delay(toys):
    """The head and the body of a response must not wait for each other (Nagle, 40 ms)."""
    times = []
    for _ in range(15):
        start = time.perf_counter()
        assert toys.chat(max_tokens=1).status_code == 200
        times.append(time.perf_counter() - start)
    assert sorted(times)[len(times) // 3] < 0.03


def test_health_and_readiness():
    with running(endless()) as server:
        assert server.client.get("/health").json() == {"status": "ok"}
        assert server.client.get("/ready").json() == {"status": "ready"}
        server.app.model_thread.draining = True
        assert server.client.get("/ready").status_code == 503
        assert server.client.get("/health").status_code == 200
        refused = server.chat()
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")


@pytest.mark.slow
def test_sigterm_lets_completions_finish(start_process):
    server = start_process("-m", "toy:1", "-m", "toy:2", preamble=SLOW)
    with httpx.stream("POST", server.url + "/v1/chat/completions", json={**STREAMED, "max_tokens": 100}) as response:
        chunks = events(response)
        next(chunks)
        # A request that is still arriving at SIGTERM is refused.
        late = request_bytes({"messages": HELLO})
        half = raw_connection(server.url, late[:-2])
        time.sleep(0.2)
        server.send_signal(signal.SIGTERM)
        time.sleep(0.4)
        half.sendall(late[-2:])
        assert half.recv(15) == b"HTTP/1.1 503 Se"
        half.close()
        assert sum(len(chunk["choices"][0]["mixlm"]["members"]) for chunk in chunks) == 100
    assert server.wait() == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url + "/health")


@pytest.mark.slow
def test_completions_that_exceed_the_grace_period_end_with_an_error(start_process):
    server = start_process("-m", "toy:1", "--grace", "0.3", preamble=SLOW)
    whole = ThreadPoolExecutor(1).submit(
        httpx.post, server.url + "/v1/chat/completions", json={"messages": HELLO, "max_tokens": 3000}, timeout=30
    )
    with httpx.stream("POST", server.url + "/v1/chat/completions", json={**STREAMED, "max_tokens": 3000}) as response:
        chunks = events(response)
        next(chunks)
        server.send_signal(signal.SIGTERM)
        *_, last = chunks
    assert last["error"]["code"] == "stopping"
    assert whole.result().status_code == 503
    assert server.wait() == 0
    # Their tokens count, though none was finished.
    lines = [line for line in server.log if line["event"] == "request"]
    assert [(line["cancelled"], line["finished"]) for line in lines] == [("shutdown", 0)] * 2
    assert all(line["tokens"] > 0 for line in lines)


@pytest.mark.slow
def test_after_a_kill_and_restart_the_same_seed_gives_the_same_text(start_process):
    before = start_process("-m", "toy:1", "-m", "toy:2", preamble=SLOW)
    body = {"messages": HELLO, "seed": 9, "max_tokens": 30}
    text = httpx.post(before.url + "/v1/chat/completions", json=body).json()["choices"]
    with httpx.stream("POST", before.url + "/v1/chat/completions", json={**STREAMED, "max_tokens": 2000}) as response:
        chunks = events(response)
        next(chunks)
        before.send_signal(signal.SIGKILL)
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
            list(chunks)
    assert before.wait() == -signal.SIGKILL
    after = start_process("-m", "toy:1", "-m", "toy:2", port=before.port, preamble=SLOW)
    assert after.port == before.port
    assert httpx.post(after.url + "/v1/chat/completions", json=body).json()["choices"] == text


@pytest.mark.slow
def test_the_log_holds_no_prompt_and_no_generated_text(start_process):
    server = start_process("-m", "toy:1", "-m", "toy:2")
    secret = "mysecretword"
    body = {"messages": [{"role": "user", "content": secret}], "max_tokens": 4, "seed": 1}
    response = httpx.post(server.url + "/v1/chat/completions", json=body, headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    strange = httpx.post(server.url + "/v1/chat/completions", json={secret: 1}, headers={"x-request-id": "no good"})
    assert strange.headers["x-request-id"] != "no good"
    assert httpx.get(server.url + f"/{secret}").status_code == 404
    server.send_signal(signal.SIGTERM)
    server.wait()
    wait(lambda: len(server.log) == 3)
    first = server.log[0]
    assert {key: first[key] for key in ("request", "status", "path", "model", "tokens", "completions", "client")} == {
        "request": "mine-1",
        "status": 200,
        "path": "/v1/chat/completions",
        "model": "toy:1+toy:2",
        "tokens": response.json()["usage"]["completion_tokens"],
        "completions": 1,
        "client": "127.0.0.1",
    }
    assert [line["error"] for line in server.log[1:]] == ["unknown_field", "not_found"]
    text = "".join(server.lines)
    assert secret not in text
    assert response.json()["choices"][0]["message"]["content"] not in text


def test_metrics_add_up(toys):
    toys.chat(seed=1, max_tokens=5)
    before = {name: toys.metric("mixlm_tokens_total", member=name) for name in ("toy:1", "toy:2")}
    forwards, run = toys.metric("mixlm_forwards_total"), toys.metric("mixlm_forward_tokens_total")
    caught_up = toys.metric("mixlm_catch_up_tokens_count")
    first = toys.metric("mixlm_time_to_first_token_seconds_count")
    usage = toys.chat(seed=2, max_tokens=25, n=2).json()["usage"]["mixlm"]["members"]
    for name, count in before.items():
        assert toys.metric("mixlm_tokens_total", member=name) - count == usage[name]["tokens"]
    assert toys.metric("mixlm_forwards_total") - forwards == sum(member["forwards"] for member in usage.values())
    assert toys.metric("mixlm_time_to_first_token_seconds_count") - first == 1
    assert toys.metric("mixlm_running") == toys.metric("mixlm_waiting") == 0
    assert toys.metric("mixlm_forward_tokens_total") - run == sum(usage["forward_tokens"] for usage in usage.values())
    # In each of the two generations, each member's first pass is the prefill.
    passes = sum(member["forwards"] for member in usage.values())
    assert passes - 4 <= toys.metric("mixlm_catch_up_tokens_count") - caught_up < passes
    toys.chat(seed=2, max_tokens=20, mixlm={"method": "speculative", "draft": "toy:1"})
    assert toys.metric("mixlm_draft_tokens_total") > 0
    assert toys.metric("mixlm_requests_total", path="/v1/chat/completions", status="200") >= 3


def test_cancelled_work_counts():
    with running(endless(0.005)) as server:
        with server.client.stream("POST", "/v1/chat/completions", json={"messages": HELLO, "stream": True}) as response:
            chunks = events(response)
            for _ in range(6):
                next(chunks)
        wait(lambda: server.app.model_thread.num_unfinished == 0)
        assert server.metric("mixlm_completions_total") == 0
        assert server.metric("mixlm_forwards_total") >= server.metric("mixlm_tokens_total") >= 4


def test_jobs_that_fail_before_they_start_do_not_shorten_the_wait():
    async def run():
        model_thread = ModelThread(ServerLimits(max_batch=1, max_queue=3))
        model_thread.start()
        model_thread.admit(Job("a", 1))
        for _ in range(40):
            model_thread.admit(job := Job("a", 1))
            model_thread.fail(job, EngineError("refused"))
        with pytest.raises(ApiError) as refused:
            model_thread.admit(Job("a", 4))
        await model_thread.stop()
        assert refused.value.headers["retry-after"] == "4"

    asyncio.run(run())


def test_jobs_are_refused_while_the_thread_does_not_run():
    model_thread = ModelThread(ServerLimits())
    with pytest.raises(ApiError, match="about to stop"):
        model_thread.admit(None)  # type: ignore[arg-type]


STREAMED = {"messages": HELLO, "seed": 1, "stream": True}
SLOW = """
import time
from mixlm.engines import toy
plain = toy.ToySession.forward
def forward(self, ids, last):
    time.sleep(0.02)
    out = plain(self, ids, last)
    out[:, -1] = -100
    return out
toy.ToySession.forward = forward
"""


def test_usage_counts_tokens_generated_without_a_member():
    class LosingConnection(EndlessToy):
        def count_and_wait(self, ids: np.ndarray, last: int) -> None:
            super().count_and_wait(ids, last)
            if self.forwards == 4:
                raise EngineError("the connection is lost")

        def alive(self) -> bool:
            return False

    pair = Ensemble(
        [LoadedMember(EndlessToy(1), "stays"), LoadedMember(LosingConnection(2), "goes")],
        defaults=GenerationOptions(on_failure="drop"),
    )
    with running(pair) as server:
        members = server.chat(max_tokens=20, seed=1).json()["usage"]["mixlm"]["members"]
    assert members["stays"]["tokens"] + members["goes"]["tokens"] == 20
    assert (members["stays"]["dropped"], members["goes"]["dropped"] > 5) == (0, True)


def test_only_whole_requests_have_buckets_of_minutes(toys):
    toys.chat(max_tokens=1)
    wait(lambda: toys.metric("mixlm_request_seconds_count") > 0)
    buckets = re.findall(r'^(\w+)_bucket{.*le="600.0"', toys.client.get("/metrics").text, re.MULTILINE)
    assert set(buckets) == {"mixlm_request_seconds"}


def test_older_names_of_metrics_go_on_counting(toys):
    toys.chat(max_tokens=8, mixlm={"method": "speculative", "draft": "toy:1"})
    names = {"mixlm_draft_tokens": "mixlm_guesses", "mixlm_completions": "mixlm_replies"}
    for name, old in names.items():
        assert toys.metric(f"{name}_total") == toys.metric(f"{old}_total") > 0
    assert toys.metric("mixlm_running") == toys.metric("mixlm_writing")
    usage = toys.chat(max_tokens=8, mixlm={"method": "speculative", "draft": "toy:1"}).json()["usage"]["mixlm"]
    assert usage["drafted"] == usage["checked"]
