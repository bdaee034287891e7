from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest

from mixlm.binding import LoadedMember
from mixlm.engines.toy import ToyEngine
from mixlm.ensemble import Ensemble
from mixlm.errors import ConfigError, EngineError, GenerationInterruptedError
from mixlm.generation.scheduler import Scheduler
from mixlm.generation.unavailable import UnavailableMembers, check_alive

PROMPT = "the river"


class Flaky(ToyEngine):
    """A toy that stops answering at its `fails`-th forward and responds again after `back` looks at it."""

    def __init__(self, seed: int, fails: int | None = None, back: int | None = None) -> None:
        super().__init__(seed=seed, name=f"toy-{seed}")
        self.fails, self.back = fails, back
        self.forwards = self.looks = 0
        self.down = False
        self.on_forward = self.count_or_fail

    def count_or_fail(self, ids: np.ndarray, last: int) -> None:
        self.forwards += 1
        self.down = self.down or self.forwards == self.fails
        if self.down:
            raise EngineError("the line is dead", "plug it in")

    def alive(self) -> bool:
        self.looks += 1
        if self.back is not None and self.looks > self.back:
            self.down, self.fails = False, None
        return not self.down


def make_ensemble(fails: int | None = 3, back: int | None = None, other: int | None = None) -> Ensemble:
    engines = [Flaky(1), Flaky(2, fails, back), Flaky(3, other)]
    return Ensemble([LoadedMember(engine, engine.name) for engine in engines], [0.4, 0.4, 0.2])


def options(**overrides):
    return {"seed": 5, "max_tokens": 20, "ignore_end": True, **overrides}


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    def check_now(engine):
        check: Future = Future()
        check.set_result(engine.alive())
        return check

    monkeypatch.setattr("mixlm.generation.unavailable._FIRST_WAIT", 0.0)
    monkeypatch.setattr("mixlm.generation.unavailable.check_alive", check_now)


@pytest.mark.parametrize("method", ["mixture", "conventional", "single", "greedy", "speculative"])
def test_a_completion_ends_with_what_was_written(method):
    healthy = make_ensemble(None).generate(PROMPT, **options(method=method))
    ensemble = make_ensemble(3)
    ensemble.weights = np.array([0.2, 0.6, 0.2])
    stream = ensemble.stream(PROMPT, **options(method=method))
    with pytest.raises(
        GenerationInterruptedError, match="toy-2 failed in the middle of a generation: the line is dead"
    ) as raised:
        stream.finish()
    cut = raised.value.completion
    assert cut == stream.completion
    assert cut.finish_reason == "error"
    assert raised.value.hint == "plug it in"
    assert stream.finished
    assert next(stream, None) is None
    if method != "single":
        written = [token.data for token in cut.tokens]
        assert 2 <= len(written) < 20
        assert written == [token.data for token in healthy.tokens][: len(written)]


@pytest.mark.parametrize(
    ("method", "draft"),
    [
        ("mixture", None),
        ("conventional", None),
        ("greedy", None),
        ("speculative", None),
        ("greedy", "toy-2"),
        ("speculative", "toy-2"),
    ],
)
def test_a_completion_goes_on_without_a_member_and_nothing_is_written_twice(method, draft, caplog):
    caplog.set_level(logging.WARNING, "mixlm")
    healthy = make_ensemble(None).generate(PROMPT, **options(method=method, draft=draft))
    fails = 3 if draft is None else 18  # behind the first block
    completion = make_ensemble(fails).generate(PROMPT, **options(method=method, draft=draft, on_failure="drop"))
    dropped = {name: member.dropped for name, member in completion.usage.members.items()}
    assert len(completion.tokens) == 20
    assert dropped["toy-1"] == dropped["toy-3"] == 0
    assert 0 < dropped["toy-2"] < 20
    before = 20 - dropped["toy-2"]
    assert [token.data for token in completion.tokens[:before]] == [token.data for token in healthy.tokens[:before]]
    assert not any(token.member == "toy-2" for token in completion.tokens[before:])
    assert caplog.messages == ["toy-2 is excluded from a generation: the line is dead"]
    assert completion.as_dict()["usage"]["members"]["toy-2"]["dropped"] == dropped["toy-2"]


@pytest.mark.parametrize("failing", range(3, 9))
def test_the_word_of_a_member_that_is_gone_is_taken_over(failing):
    ensemble = make_ensemble(failing)
    ensemble = Ensemble(ensemble.members, [0.2, 0.6, 0.2], unit="word")
    healthy = Ensemble(make_ensemble(None).members, [0.2, 0.6, 0.2], unit="word").generate(PROMPT, **options())
    completion = ensemble.generate(PROMPT, **options(on_failure="drop"))
    before = 20 - completion.usage.members["toy-2"].dropped
    assert len(completion.tokens) == 20
    assert 0 < before < 20
    assert [token.data for token in completion.tokens[:before]] == [token.data for token in healthy.tokens[:before]]
    assert not any(token.member == "toy-2" for token in completion.tokens[before:])


def test_the_rest_is_the_distribution_of_the_others():
    # From the first position on without the member: the others' own ensemble, with the same noise.
    completion = make_ensemble(1).generate(PROMPT, **options(method="conventional", on_failure="drop"))
    engines = [Flaky(1), Flaky(3)]
    pair = Ensemble([LoadedMember(engine, engine.name) for engine in engines], [0.4, 0.2])
    two = pair.generate(PROMPT, **options(method="conventional"))
    assert [token.data for token in completion.tokens] == [token.data for token in two.tokens]
    np.testing.assert_allclose([token.logprob for token in completion.tokens], [token.logprob for token in two.tokens])


def test_a_member_comes_back_when_it_answers_again(caplog):
    caplog.set_level(logging.WARNING, "mixlm")
    completion = make_ensemble(3, back=2).generate(PROMPT, **options(max_tokens=40, on_failure="drop"))
    dropped = completion.usage.members["toy-2"].dropped
    assert 0 < dropped < 10
    assert any(token.member == "toy-2" for token in completion.tokens[-20:])
    assert caplog.messages[-1] == "toy-2 responds again"


def test_a_completion_ends_where_nobody_is_left():
    engines = [Flaky(1, 4), Flaky(2, 3)]
    pair = Ensemble([LoadedMember(engine, engine.name) for engine in engines])
    with pytest.raises(
        GenerationInterruptedError, match="every member that has weight here has stopped answering"
    ) as raised:
        pair.generate(PROMPT, **options(on_failure="drop"))
    assert len(raised.value.completion.tokens) >= 4


def test_a_member_that_must_write_cannot_be_left_out():
    ensemble = make_ensemble(3)
    ensemble.weights = np.array([0.2, 0.6, 0.2])
    with pytest.raises(GenerationInterruptedError):
        ensemble.generate(PROMPT, **options(method="single", on_failure="drop"))


@pytest.mark.parametrize("method", ["mixture", "conventional"])
def test_completions_that_are_written_together_go_on_or_end_each_by_itself(method):
    alone = make_ensemble(None)
    expected = [alone.generate(PROMPT, **options(method=method, sequence=i)).tokens[0].data for i in range(4)]
    for on_failure in ("drop", "error"):
        ensemble = make_ensemble(6)
        scheduler = Scheduler()
        streams = [
            ensemble.stream(PROMPT, **options(method=method, sequence=i, on_failure=on_failure)) for i in range(4)
        ]
        for stream in streams:
            scheduler.add(stream)
        assert {id(stream) for stream in scheduler.run()} == {id(stream) for stream in streams}
        for stream, first in zip(streams, expected, strict=True):
            tokens = stream.completion.tokens
            if on_failure == "drop":
                assert stream.error is None
                assert len(tokens) == 20
                assert stream.completion.usage.members["toy-2"].dropped > 0
            else:
                assert isinstance(stream.error, GenerationInterruptedError)
                assert stream.error.completion.tokens == tokens
                assert len(tokens) < 20
            if tokens:
                assert tokens[0].data == first


def test_a_choice_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="on_failure is 'ignore'; it must be one of error, drop"):
        make_ensemble().generate(PROMPT, on_failure="ignore")


def test_a_member_is_asked_after_ever_longer_times(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("mixlm.generation.unavailable._FIRST_WAIT", 0.5)
    monkeypatch.setattr("mixlm.generation.unavailable.time.monotonic", lambda: now[0])
    looks = []
    engine = SimpleNamespace(alive=lambda: bool(looks.append(now[0])))
    absent = UnavailableMembers([SimpleNamespace(name="one", engine=engine)])
    absent.exclude(0, EngineError("gone"))
    for step in range(1, 2000):
        now[0] = step / 10
        absent.retry()
    gaps = np.diff([0.0, *looks])
    np.testing.assert_allclose(gaps[:7], [0.5, 1, 2, 4, 8, 16, 30], atol=0.11)
    np.testing.assert_allclose(gaps[7:], 30, atol=0.11)


class Hanging(Flaky):
    """A member that is asked whether it is alive, and answers when `answers` is set."""

    def __init__(self, seed: int, fails: int | None = None) -> None:
        super().__init__(seed, fails)
        self.answers = threading.Event()

    def alive(self) -> bool:
        self.looks += 1
        return self.answers.wait(20)


def test_whether_a_member_is_alive_is_asked_once_and_holds_up_no_sequence(monkeypatch):
    monkeypatch.setattr("mixlm.generation.unavailable.check_alive", check_alive)
    hanging = Hanging(2, 3)
    pair = Ensemble([LoadedMember(Flaky(1), "stays"), LoadedMember(hanging, "goes")])
    scheduler = Scheduler()
    streams = [pair.stream(PROMPT, **options(sequence=i, on_failure="drop")) for i in range(3)]
    for stream in streams:
        scheduler.add(stream)
    list(scheduler.run())
    assert [stream.error for stream in streams] == [None] * 3
    check = check_alive(hanging)
    assert (hanging.looks, check.done()) == (1, False)
    sequences = [UnavailableMembers([SimpleNamespace(name="goes", engine=hanging)]) for _ in range(2)]
    for absent in sequences:
        absent.exclude(0, EngineError("gone"))
        absent.retry()
        assert 0 in absent
    hanging.answers.set()
    assert check.result(5)
    for absent in sequences:
        absent.retry()
        assert 0 not in absent
    assert hanging.looks == 1


class FailingRouter:
    """A router that fails at the second position."""

    def begin(self, context):
        positions = iter([np.array([0.0, 1.0, 0.0])])
        return lambda state: next(positions)


def test_what_fails_after_a_member_ends_that_generation_alone():
    ensemble = make_ensemble(1)
    scheduler = Scheduler()
    for router in (FailingRouter(), None):
        of_one = ensemble if router is None else Ensemble(ensemble.members, router=router)
        settings = of_one.settings(**options(on_failure="drop"))
        scheduler.add(of_one.context(settings).start(of_one.encode_prompt(PROMPT, settings)))
    errors = [generation.error for generation in scheduler.run()]
    assert sorted("the router FailingRouter failed" in str(error) for error in errors) == [False, True]
    assert errors.count(None) == 1


def test_a_forward_of_another_device_is_over_before_its_session_is_used_again():
    ensemble = make_ensemble(3)
    failing, working = (member.engine for member in ensemble.members[1:])
    failing.device = "elsewhere"
    running, at_once = [], []
    count_or_fail = failing.on_forward

    def fail_first(ids, last):
        time.sleep(0.001)
        count_or_fail(ids, last)

    def work(ids, last):
        running.append(0)
        at_once.append(len(running))
        time.sleep(0.03)
        running.pop()

    failing.on_forward, working.on_forward = fail_first, work
    pair = Ensemble([LoadedMember(failing, "failing"), LoadedMember(working, "working")])
    pair.generate(PROMPT, **options(method="conventional", on_failure="drop", max_tokens=5))
    assert set(at_once) == {1}
