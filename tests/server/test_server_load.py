"""Many clients, few slots: queues, refusals, timeouts, clients that leave, and the end."""

from __future__ import annotations

import asyncio
import itertools
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from serving import HELLO, EndlessToy, endless, events, raw, request_bytes, running, wait

from mixlm.core.options import GenerationOptions
from mixlm.engines.toy import ToySession
from mixlm.ensemble import Ensemble, MemberSpec
from mixlm.errors import EngineError, MemoryLimitError
from mixlm.loading import load
from mixlm.server.api_errors import ApiError
from mixlm.server.fair_queue import Line
from mixlm.server.jobs import Begun, Closed, Order, Task, Wrote
from mixlm.server.limits import Limits
from mixlm.server.model_thread import Worker


def test_clients_take_turns():
    line = Line()
    for client, item in [("a", 1), ("a", 2), ("a", 3), ("b", 4), ("c", 5), ("b", 6)]:
        line.push(client, item)
    assert len(line) == 6
    line.remove(lambda item: item == 5)
    assert [line.pop() for _ in range(5)] == [1, 4, 2, 6, 3]
    with pytest.raises(IndexError):
        line.pop()


def test_replies_written_together_are_those_written_alone():
    with running(load("toy:1", "toy:2"), at_once=4) as one, ThreadPoolExecutor(12) as pool:
        asked = [{"seed": i, "max_tokens": 20, "messages": [{"role": "user", "content": f"m{i}"}]} for i in range(24)]
        together = list(pool.map(lambda body: one.chat(**body).json()["choices"], asked))
        assert together == [one.chat(**body).json()["choices"] for body in asked]


def test_a_full_queue_says_when_to_come_again():
    with running(endless(0.01), at_once=1, queue=1) as one, ThreadPoolExecutor(4) as pool:
        first, second = (pool.submit(one.chat, max_tokens=30) for _ in range(2))
        one.wait(lambda: one.server.worker.unended == 2)
        third = one.chat()
        assert third.status_code == 429
        assert third.json()["error"]["code"] == "queue_full"
        assert 1 <= int(third.headers["retry-after"]) <= 60
        assert first.result().status_code == second.result().status_code == 200
        assert one.chat(max_tokens=2).status_code == 200
        # What can never fit is not told to come again.
        assert one.chat(n=3).json()["error"]["code"] == "too_many_replies"
        assert one.chat(n=3).status_code == 400


class Gated(EndlessToy):
    """A toy whose forwards wait to be let through, one by one."""

    def __init__(self) -> None:
        super().__init__(1)
        self.gate = threading.Semaphore(0)

    def session(self):
        session = super().session()
        plain = session._forward

        def forward(ids, last):
            self.begun = getattr(self, "begun", 0) + 1
            self.gate.acquire(timeout=20)
            return plain(ids, last)

        session._forward = forward
        return session


def test_a_client_that_asks_for_much_does_not_hold_up_the_others():
    """One slot; the order of 20 came first. The single one is third: behind the one that had begun, and one more."""
    engine, ended = Gated(), []
    ensemble = Ensemble([MemberSpec(engine, "m")])

    async def follow(order, name):
        left = len(order.tasks)
        while left:
            if isinstance(event := await order.events.get(), Wrote) and event.completion is not None:
                ended.append(name)
                left -= 1

    async def run():
        worker = Worker(Limits(at_once=1))
        worker.start()
        task = Task("x", ensemble.settings(max_tokens=1, seed=1))
        many, single = Order("a", ensemble, [task] * 20), Order("b", ensemble, [task])
        worker.submit(many)
        worker.submit(single)
        engine.gate.release(21)
        await asyncio.gather(follow(many, "many"), follow(single, "single"))
        await worker.stop()

    asyncio.run(run())
    assert ended.index("single") <= 2


def test_the_slot_of_a_reply_that_is_given_up_is_free_within_one_step():
    engine = Gated()
    ensemble = Ensemble([MemberSpec(engine, "m")])

    async def run():
        worker = Worker(Limits(at_once=1))
        worker.start()
        task = Task("x", ensemble.settings(seed=1))
        gone, next_one = (
            Order("a", ensemble, [task]),
            Order("b", ensemble, [Task("y", ensemble.settings(max_tokens=1))]),
        )
        worker.submit(gone)
        worker.submit(next_one)
        engine.gate.release(2)
        while getattr(engine, "begun", 0) < 3:
            await asyncio.sleep(0.001)
        worker.close(gone, "gone")  # in the midst of its third forward
        engine.gate.release(2)  # the rest of that, and the first of the one that waits
        while next_one.left:
            await asyncio.sleep(0.001)
        assert engine.begun == 4  # not one more for the reply that nobody wants
        assert worker.unended == worker.writing == worker.waiting == 0
        seen = [gone.events.get_nowait() for _ in range(gone.events.qsize())]
        assert isinstance(seen[0], Begun)
        assert seen[-1] == Closed("gone")
        await worker.stop()

    asyncio.run(run())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(stream):
    with running(endless(0.005), at_once=1, queue=4) as one:
        connection = raw(one.url, request_bytes({"messages": HELLO, "stream": stream, "max_tokens": 3000}))
        one.wait(lambda: one.server.worker.writing == 1)
        waiting = raw(one.url, request_bytes({"messages": HELLO, "stream": stream, "max_tokens": 3000}))
        one.wait(lambda: one.server.worker.waiting == 1)
        waiting.close()  # also one that has not begun
        one.wait(lambda: one.server.worker.waiting == 0)
        assert one.server.worker.writing == 1
        connection.close()
        start = time.monotonic()
        assert one.chat(max_tokens=1).status_code == 200
        assert time.monotonic() - start < 5  # the reply that was left would have taken 15 s and more
        assert one.metric("mixlm_closed_total", reason="gone") == 2
        assert one.metric("mixlm_requests_total", status="200" if stream else "499") >= 1
        assert one.server.worker.unended == 0


def test_a_request_that_takes_too_long_is_ended():
    with running(endless(0.01), timeout=0.3) as one:
        late = one.chat(max_tokens=3000)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        *tokens, last = events(one.chat(max_tokens=3000, stream=True))
        assert len(tokens) > 5
        assert last["error"]["code"] == "timeout"
        one.wait(lambda: one.server.worker.unended == 0)
        assert one.metric("mixlm_closed_total", reason="timeout") == 2


def test_an_engine_that_fails_ends_its_reply_and_no_other(caplog):
    class Failing(EndlessToy):
        error: Exception = MemoryLimitError("no memory left")

        def session(self):
            session = super().session()
            plain = session._forward

            def forward(ids, last):
                if len(session._context) + len(ids) > 60:
                    raise self.error
                return plain(ids, last)

            session._forward = forward
            return session

    engine = Failing(1)
    with running(Ensemble([MemberSpec(engine, "m")])) as one, ThreadPoolExecutor(2) as pool:
        failed = one.complete("x", max_tokens=100)
        assert (failed.status_code, failed.json()["error"]["code"]) == (503, "out_of_memory")
        *_, last = events(one.complete("x", max_tokens=100, stream=True))
        assert last["error"]["code"] == "out_of_memory"
        good, bad = pool.submit(one.complete, "x", max_tokens=50), pool.submit(one.complete, "x", max_tokens=100)
        assert (good.result().status_code, bad.result().status_code) == (200, 503)
        # What nobody expected says nothing to clients, and the server goes on.
        Failing.error = RuntimeError("secret detail")
        failed = one.complete("x", max_tokens=100)
        assert failed.status_code == 500
        assert "secret" not in failed.text
        assert one.complete("x", max_tokens=50).status_code == 200
        assert one.client.get("/health").status_code == 200
        assert one.metric("mixlm_errors_total", status="500") == 1
    assert "a step failed" in caplog.text


def test_small_requests_are_answered_without_delay(toys):
    """A head and a body in packets of their own must not wait for each other: that takes 40 ms."""
    times = []
    for _ in range(15):
        start = time.perf_counter()
        assert toys.chat(max_tokens=1).status_code == 200
        times.append(time.perf_counter() - start)
    assert sorted(times)[len(times) // 3] < 0.03


def test_health_and_readiness():
    with running(endless()) as one:
        assert one.client.get("/health").json() == {"status": "ok"}
        assert one.client.get("/ready").json() == {"status": "ready"}
        one.server.worker.draining = True
        assert one.client.get("/ready").status_code == 503
        assert one.client.get("/health").status_code == 200
        refused = one.chat()
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")


def test_told_to_stop_replies_are_finished(process):
    one = process("-m", "toy:1", "-m", "toy:2", before=SLOW)
    with httpx.stream("POST", one.url + "/v1/chat/completions", json={**ASKED, "max_tokens": 100}) as response:
        found = events(response)
        next(found)
        # A request that is on its way when the server is told to stop is not begun any more.
        late = request_bytes({"messages": HELLO})
        half = raw(one.url, late[:-2])
        time.sleep(0.2)
        one.send(signal.SIGTERM)
        time.sleep(0.4)
        half.sendall(late[-2:])
        assert half.recv(15) == b"HTTP/1.1 503 Se"
        half.close()
        assert sum(len(chunk["choices"][0]["mixlm"]["members"]) for chunk in found) == 100
    assert one.end() == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(one.url + "/health")


def test_told_to_stop_replies_that_take_too_long_are_ended_cleanly(process):
    one = process("-m", "toy:1", "--grace", "0.3", before=SLOW)
    whole = ThreadPoolExecutor(1).submit(
        httpx.post, one.url + "/v1/chat/completions", json={"messages": HELLO, "max_tokens": 3000}, timeout=30
    )
    with httpx.stream("POST", one.url + "/v1/chat/completions", json={**ASKED, "max_tokens": 3000}) as response:
        found = events(response)
        next(found)
        one.send(signal.SIGTERM)
        *_, last = found
    assert last["error"]["code"] == "stopping"
    assert whole.result().status_code == 503
    assert one.end() == 0
    # What was written of them counts, though none was finished.
    asked = [line for line in one.log if line["event"] == "request"]
    assert [(line["closed"], line["finished"]) for line in asked] == [("shutdown", 0)] * 2
    assert all(line["tokens"] > 0 for line in asked)


def test_killed_and_started_again_the_same_seed_gives_the_same_text(process):
    before = process("-m", "toy:1", "-m", "toy:2", before=SLOW)
    body = {"messages": HELLO, "seed": 9, "max_tokens": 30}
    text = httpx.post(before.url + "/v1/chat/completions", json=body).json()["choices"]
    with httpx.stream("POST", before.url + "/v1/chat/completions", json={**ASKED, "max_tokens": 2000}) as response:
        found = events(response)
        next(found)
        before.send(signal.SIGKILL)
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
            list(found)
    assert before.end() == -signal.SIGKILL
    after = process("-m", "toy:1", "-m", "toy:2", port=before.port, before=SLOW)
    assert after.port == before.port
    assert httpx.post(after.url + "/v1/chat/completions", json=body).json()["choices"] == text


def test_the_log_says_what_happened_and_never_what_was_said(process):
    one = process("-m", "toy:1", "-m", "toy:2")
    secret = "mysecretword"
    body = {"messages": [{"role": "user", "content": secret}], "max_tokens": 4, "seed": 1}
    response = httpx.post(one.url + "/v1/chat/completions", json=body, headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    strange = httpx.post(one.url + "/v1/chat/completions", json={secret: 1}, headers={"x-request-id": "no good"})
    assert strange.headers["x-request-id"] != "no good"
    assert httpx.get(one.url + f"/{secret}").status_code == 404
    one.send(signal.SIGTERM)
    one.end()
    wait(lambda: len(one.log) == 3)
    first = one.log[0]
    assert {key: first[key] for key in ("request", "status", "path", "model", "tokens", "replies", "client")} == {
        "request": "mine-1",
        "status": 200,
        "path": "/v1/chat/completions",
        "model": "toy:1+toy:2",
        "tokens": response.json()["usage"]["completion_tokens"],
        "replies": 1,
        "client": "127.0.0.1",
    }
    assert [line["error"] for line in one.log[1:]] == ["invalid_value", "not_found"]
    text = "".join(one.lines)
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
    assert toys.metric("mixlm_forwards_total") - forwards == sum(one["forwards"] for one in usage.values())
    assert toys.metric("mixlm_time_to_first_token_seconds_count") - first == 1
    assert toys.metric("mixlm_writing") == toys.metric("mixlm_waiting") == 0
    assert toys.metric("mixlm_forward_tokens_total") - run == sum(one["forward_tokens"] for one in usage.values())
    # Of each of the two replies, the first pass of each member read the prompt.
    passes = sum(one["forwards"] for one in usage.values())
    assert passes - 4 <= toys.metric("mixlm_catch_up_tokens_count") - caught_up < passes
    toys.chat(max_tokens=20, mixlm={"method": "speculative", "draft": "toy:1"})
    assert toys.metric("mixlm_guesses_total") > 0
    assert toys.metric("mixlm_requests_total", path="/v1/chat/completions", status="200") >= 3


def test_what_is_given_up_counts_too():
    with running(endless(0.005)) as one:
        with one.client.stream("POST", "/v1/chat/completions", json={"messages": HELLO, "stream": True}) as response:
            found = events(response)
            for _ in range(6):
                next(found)
        one.wait(lambda: one.server.worker.unended == 0)
        assert one.metric("mixlm_replies_total") == 0
        assert one.metric("mixlm_forwards_total") >= one.metric("mixlm_tokens_total") >= 4


def test_nothing_is_admitted_that_the_thread_is_not_there_for():
    worker = Worker(Limits())
    with pytest.raises(ApiError, match="about to stop"):
        worker.submit(None)  # type: ignore[arg-type]


ASKED = {"messages": HELLO, "seed": 1, "stream": True}
SLOW = """
import time
from mixlm.engines import toy
plain = toy.ToySession._forward
def forward(self, ids, last):
    time.sleep(0.02)
    out = plain(self, ids, last)
    out[:, -1] = -100
    return out
toy.ToySession._forward = forward
"""


def test_what_was_written_without_a_member_is_told():
    class Failing(EndlessToy):
        def session(self) -> ToySession:
            session = super().session()
            forward, count = session._forward, itertools.count()

            def failing(ids: np.ndarray, last: int) -> np.ndarray:
                if next(count) == 3:
                    raise EngineError("the line is dead")
                return forward(ids, last)

            session._forward = failing
            return session

        def alive(self) -> bool:
            return False

    pair = Ensemble(
        [MemberSpec(EndlessToy(1), "stays"), MemberSpec(Failing(2), "goes")],
        defaults=GenerationOptions(on_failure="drop"),
    )
    with running(pair) as server:
        members = server.chat(max_tokens=20, seed=1).json()["usage"]["mixlm"]["members"]
    assert members["stays"]["tokens"] + members["goes"]["tokens"] == 20
    assert (members["stays"]["dropped"], members["goes"]["dropped"] > 5) == (0, True)
