from __future__ import annotations

from collections import Counter
from itertools import count, pairwise
from threading import Event
from typing import ClassVar
from unittest.mock import patch

import numpy as np
import pytest
from toys import engine, make_ensemble, toys

from mixlm.engines.base import Engine, Session
from mixlm.engines.batching import respond_batched
from mixlm.engines.toy import ToyEngine
from mixlm.errors import ConfigError, MemoryLimitError, PromptTooLongError
from mixlm.generation.scheduler import Scheduler
from mixlm.routing import PromptRouter
from mixlm.types import Message

PROMPTS = ["ab", "c", "b a", "a", "abc", "cc", "b", "ba", "cab"]
METHODS = [
    {"method": "mixture"},
    {"method": "conventional"},
    {"method": "greedy"},
    {"method": "single"},
    {"method": "speculative", "draft": "m0"},
    {"method": "auto"},
    {"method": "greedy", "draft": "lookup"},
]


def text(completion):
    return [(token.data, token.member, token.text) for token in completion.tokens], completion.finish_reason


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("unit", ["token", "piece"])
def test_completions_written_together_are_those_written_one_by_one(unit, method):
    ensemble = toys(unit, 3)
    options = {"raw": True, "seed": 4, "max_tokens": 25, **method}
    expected = [text(ensemble.generate(prompt, sequence=i, **options)) for i, prompt in enumerate(PROMPTS)]
    assert [text(completion) for completion in ensemble.generate(PROMPTS, **options)] == expected
    for at_once in (1, 2, 5):
        texts = {
            i: text(generation.completion)
            for i, generation in ensemble.generations(PROMPTS, at_once=at_once, **options)
        }
        assert [texts[i] for i in range(len(PROMPTS))] == expected


def test_a_router_that_reads_prompts_works_too():
    ensemble = toys("token", 3, router=PromptRouter(np.full(3, 1 / 3)))
    options = {"raw": True, "seed": 4, "max_tokens": 15}
    expected = [text(ensemble.generate(prompt, sequence=i, **options)) for i, prompt in enumerate(PROMPTS)]
    assert [text(completion) for completion in ensemble.generate(PROMPTS, **options)] == expected


def test_several_prompts_and_one_conversation_are_told_apart():
    ensemble = make_ensemble([ToyEngine(seed=1), ToyEngine(seed=2)])
    turns = [Message("user", "a"), {"role": "assistant", "content": "b"}, Message("user", "c")]
    assert ensemble.generate(turns, seed=1, max_tokens=3).text == ensemble.generate(turns, seed=1, max_tokens=3).text
    several = ensemble.generate([turns, "ab", turns[:1]], seed=1, max_tokens=3)
    assert [text(generation) for generation in several[:1]] == [text(ensemble.generate(turns, seed=1, max_tokens=3))]
    assert len(several) == 3


def test_prompts_are_taken_in_as_there_is_room():
    ensemble, counter = toys("token", 2), count()

    def prompts():
        for prompt in PROMPTS:
            next(counter)
            yield prompt

    completions = ensemble.generations(prompts(), at_once=2, seed=1, raw=True, max_tokens=5)
    next(completions)
    assert next(counter) <= 4


def test_prompts_that_are_refused_leave_their_room_to_those_behind_them():
    ensemble = toys("token", 2)
    refused = ["ab" * 10_000] * 3
    finished = dict(ensemble.generations([*refused, "a", *refused, "b"], at_once=2, seed=1, raw=True, max_tokens=2))
    assert [i for i, generation in sorted(finished.items()) if generation.error is None] == [3, 7]
    assert len(finished) == 8


def counted(method, completions, tokens):
    """Forwards and sequences in them, for two members that run everything that is asked at once."""
    ensemble = make_ensemble([engine(seed=1), engine(seed=2)])
    calls = []

    def together(self, requests):
        calls.append(len(requests))
        return respond_batched(
            requests, lambda parts: [part.session.forward(part.ids, part.last) for part in parts], 99
        )

    with patch.object(ToyEngine, "respond", together):
        options = {"raw": True, "seed": 4, "max_tokens": tokens, "ignore_end": True, "method": method}
        for _ in ensemble.generations(["ab"] * completions, at_once=completions, **options):
            pass
    return len(calls), sum(calls) / len(calls)


@pytest.mark.slow
def test_the_longest_queue_first_serves_two_thirds_of_the_completions_at_a_time():
    conventional, _ = counted("conventional", 16, 60)
    mixture, served = counted("mixture", 16, 60)
    assert conventional == 2 * 60
    # 2/(n + 1) of 16, as long as all of them are being written; the last completions have fewer companions.
    assert abs(served / (16 * 2 / 3) - 1) < 0.15
    assert conventional / mixture > 1.15


class Slow(ToyEngine):
    """Notes in which order engines are served."""

    served: ClassVar[list[str]] = []

    def respond(self, requests):
        Slow.served.append(self.name)
        return super().respond(requests)


@pytest.mark.slow
def test_an_engine_with_a_short_queue_is_not_forgotten():
    Slow.served = []
    often, seldom = Slow(name="often"), Slow(name="seldom")
    ensemble = make_ensemble([often, seldom], [0.97, 0.03])
    scheduler = Scheduler(40)
    settings = ensemble.settings(raw=True, seed=1, max_tokens=400, ignore_end=True)
    for i in range(40):
        turn = settings.with_sequence_offset(i)
        scheduler.add(ensemble.context(turn).start(ensemble.encode_prompt(" the", turn)))
    for _ in range(300):
        scheduler.step()
    gaps = np.diff([i for i, name in enumerate(Slow.served) if name == "seldom"])
    assert Counter(Slow.served)["seldom"] > 10
    assert gaps.max() <= 60


def test_a_completion_that_fails_does_not_disturb_the_others():
    ensemble = toys("token", 2)
    real = Engine.respond

    def fails(self, requests):
        if any(len(request.ids) == 7 for _, request in requests):
            raise MemoryLimitError("no memory", "smaller")
        return real(self, requests)

    options = {"raw": True, "seed": 4, "max_tokens": 25, "ignore_end": True}
    expected = [text(ensemble.generate(prompt, sequence=i, **options)) for i, prompt in enumerate(PROMPTS[:4])]
    with patch.object(ToyEngine, "respond", fails):
        generations = dict(ensemble.generations(PROMPTS[:4], **options))
        with pytest.raises(MemoryLimitError):
            ensemble.generate(PROMPTS[:4], **options)
    assert all(
        isinstance(generation.error, MemoryLimitError) and generation.finished for generation in generations.values()
    )
    written = [text(generations[i].completion)[0] for i in range(4)]
    assert all(
        token_texts == full[: len(token_texts)] for token_texts, (full, _) in zip(written, expected, strict=True)
    )

    def fails_for_one(self, requests):
        if any(request.ids[1] == 4 for _, request in requests):
            raise MemoryLimitError("no memory", "smaller")
        return real(self, requests)

    with patch.object(ToyEngine, "respond", fails_for_one):
        generations = dict(ensemble.generations(PROMPTS[:4], **options))
    assert [i for i in range(4) if generations[i].error] == [1]
    assert [text(generations[i].completion) for i in (0, 2, 3)] == [expected[i] for i in (0, 2, 3)]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_preempted_completion_goes_on_where_it_was(method):
    ensemble = toys("piece", 3)
    settings = ensemble.settings(raw=True, seed=4, max_tokens=15, **method)
    expected = [text(ensemble.generate(prompt, raw=True, seed=4, max_tokens=15, **method)) for prompt in PROMPTS[:2]]
    generations = [ensemble.context(settings).start(ensemble.encode_prompt(prompt, settings)) for prompt in PROMPTS[:2]]
    scheduler, waiting = Scheduler(1), list(generations)
    while waiting:
        current = waiting.pop(0)
        scheduler.add(current)
        scheduler.step()
        if not current.finished:
            assert scheduler.preempt(current)
            assert {session.num_cached for session in current.sessions} == {0}
            waiting.append(current)
    assert scheduler.idle
    assert [text(generation.completion) for generation in generations] == expected


def test_a_completion_is_preempted_amid_its_prompt_and_cancelled_while_it_waits():
    ensemble = make_ensemble([engine(seed=1)])
    options = {"raw": True, "seed": 4, "max_tokens": 5}
    [expected] = run_in_chunks(ensemble, ["ab" * 100], 1000, **options)
    settings = ensemble.settings(**options)
    for goes_on in (True, False):
        generation = ensemble.context(settings).start(ensemble.encode_prompt("ab" * 100, settings))
        scheduler = Scheduler(1, 16)
        scheduler.add(generation)
        scheduler.step()
        assert generation.sessions[0].num_cached == 16
        assert scheduler.preempt(generation)
        assert (scheduler.free_slots, scheduler.idle) == (1, True)
        if goes_on:
            scheduler.add(generation)
            assert list(scheduler.run()) == [generation]
            assert text(generation.completion) == text(expected.completion)
        else:
            scheduler.cancel(generation)
            assert generation.finished
            assert scheduler.step() == []


def test_a_cancelled_completion_makes_room_at_once():
    ensemble = toys("token", 2)
    scheduler, settings = Scheduler(2), ensemble.settings(raw=True, seed=4, max_tokens=50, ignore_end=True)
    streams = [ensemble.context(settings).start(ensemble.encode_prompt("ab", settings)) for _ in range(4)]
    for stream in streams:
        scheduler.add(stream)
    scheduler.step()
    assert scheduler.free_slots == -2
    scheduler.cancel(streams[0])
    scheduler.cancel(streams[3])
    assert scheduler.free_slots == 0
    finished = list(scheduler.run())
    assert finished == [streams[1], streams[2]] or finished == [streams[2], streams[1]]
    assert len(streams[1].completion.tokens) == 50
    assert scheduler.idle


def test_a_cancelled_completion_keeps_its_caches_while_another_thread_is_at_work_on_them():
    """Two devices; the second one's forward is held up while the completion is given up."""
    first, second = engine(seed=1), engine(seed=2)
    second.device = "other"
    gate, real = Event(), second.respond

    def held(requests):
        gate.wait(10)
        return real(requests)

    second.respond = held
    ensemble = make_ensemble([first, second])
    settings = ensemble.settings(raw=True, seed=1, max_tokens=5, method="conventional")
    stream, scheduler = ensemble.context(settings).start(ensemble.encode_prompt("ab", settings)), Scheduler(1)
    scheduler.add(stream)
    scheduler.step()  # the first member's answer; the second is still at it
    with patch.object(stream, "release", wraps=stream.release) as release:
        scheduler.cancel(stream)
        assert (scheduler.free_slots, stream.finished, release.call_count) == (1, True, 0)
        gate.set()
        scheduler.step()
        assert release.call_count == 1


def test_caches_are_freed_when_a_completion_ends():
    ensemble = toys("token", 2)
    for _, stream in ensemble.generations(PROMPTS, raw=True, seed=1, max_tokens=5):
        assert all(session.num_cached == 0 for session in stream.sessions)
        assert stream.completion.usage.members["m0"].forwards >= 0


def test_what_cannot_be_written_is_said_at_once():
    ensemble = toys("token", 2)
    with pytest.raises(ConfigError, match="at_once is 0"):
        next(ensemble.generations(PROMPTS, at_once=0))
    short = make_ensemble([engine(seed=1, context_length=6)])
    with pytest.raises(PromptTooLongError):
        short.generate(["a", "abababababab" * 3], raw=True)


LONG = [("ab c" * 30)[: 40 + 9 * i] for i in range(4)]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_prompts_in_chunks_give_the_texts_of_whole_prompts(method):
    ensemble = toys("token", 3)
    options = {"raw": True, "seed": 4, "max_tokens": 25, **method}
    expected = [ensemble.generate(prompt, sequence=i, **options) for i, prompt in enumerate(LONG)]
    lengths: list[int] = []
    for member in ensemble.members:
        member.engine.on_forward = lambda ids, last: lengths.append(len(ids))
    generations = run_in_chunks(ensemble, LONG, 20, **options)
    assert [text(generation.completion) for generation in generations] == [text(completion) for completion in expected]
    assert max(lengths) <= 40  # a last part has fewer than a chunk, and the positions that are requested
    for generation, completion in zip(generations, expected, strict=True):
        members = generation.completion.usage.members
        for name, usage in completion.usage.members.items():
            assert (members[name].prompt_tokens, members[name].tokens) == (usage.prompt_tokens, usage.tokens)
            if "draft" not in method and method["method"] != "auto":
                assert members[name].forward_tokens == usage.forward_tokens


def run_in_chunks(ensemble, prompts, chunk, **options):
    scheduler, generations = Scheduler(10, chunk), []
    for i, prompt in enumerate(prompts):
        settings = ensemble.settings(**options).with_sequence_offset(i)
        generations.append(ensemble.context(settings).start(ensemble.encode_prompt(prompt, settings)))
        scheduler.add(generations[-1])
    assert len(list(scheduler.run())) == len(prompts)
    return generations


@pytest.mark.parametrize("router", [None, PromptRouter(np.ones(1))], ids=["fixed", "by prompt"])
def test_others_write_while_a_long_prompt_is_prefilled(router):
    ensemble = make_ensemble([engine(seed=1)], router=router)
    calls: list[int] = []
    real = Engine.respond

    def respond(self, requests):
        before = [session.stats.tokens for session, _ in requests]
        responses = real(self, requests)
        calls.append(sum(session.stats.tokens - n for (session, _), n in zip(requests, before, strict=True)))
        return responses

    scheduler = Scheduler(10, 64)
    options = ensemble.settings(raw=True, seed=1, max_tokens=1000, ignore_end=True)

    def start(prompt):
        generation = ensemble.context(options).start(ensemble.encode_prompt(prompt, options))
        scheduler.add(generation)
        return generation

    with patch.object(ToyEngine, "respond", respond):
        writing = start("ab")
        for _ in range(5):
            scheduler.step()
        late = [start("abc" * 200), start("cab" * 200)]
        calls.clear()
        count, steps = len(writing.completion.tokens), 0
        while not all(generation.completion.tokens for generation in late):
            scheduler.step()
            steps += 1
        assert len(writing.completion.tokens) - count == steps  # one each step
        assert max(calls) <= 64 + 16
        scheduler.cancel(writing)


@pytest.mark.parametrize(
    ("call_seconds", "token_seconds", "others", "sizes"),
    [
        (10, 1, 1, [4, 8, 13, 16, 18, *[19] * 17]),  # the time of two decode steps is 20 tokens
        (10, 0.1, 1, [4, 8, 16, 32, 64, 113, 150]),
        (10, 0.001, 1, [4, 8, 16, 32, 64, 128]),
        (0, 0.001, 0, [64, 126, 177]),  # a quarter of a second
        (0, 0.007, 0, [64, 48, 41, 38, 37, 36, *[36] * 3]),
    ],
)
def test_chunks_are_as_long_as_others_can_wait(call_seconds, token_seconds, others, sizes):
    """A clock that counts decode steps, and the tokens of prompts."""
    ensemble = make_ensemble([engine(seed=1)])
    clock, prefills = 0.0, []

    def on_forward(ids, last):
        nonlocal clock
        clock += call_seconds if len(ids) == 1 else token_seconds * len(ids)
        if len(ids) > 1:
            prefills.append(len(ids))

    ensemble.members[0].engine.on_forward = on_forward
    scheduler, options = Scheduler(10, 256), ensemble.settings(raw=True, seed=1, max_tokens=1000, ignore_end=True)

    def start(prompt):
        generation = ensemble.context(options).start(ensemble.encode_prompt(prompt, options))
        scheduler.add(generation)
        return generation

    with patch("mixlm.generation.scheduler.time") as time:
        time.perf_counter = lambda: clock
        for _ in range(others):
            start("a")
        for _ in range(60):
            scheduler.step()
        prefills.clear()
        late = start("abc" * 200)
        while not late.completion.tokens:
            scheduler.step()
    assert prefills[: len(sizes)] == sizes
    assert len(prefills) == len(sizes) + 1
    assert sum(prefills) == 401


def test_a_member_that_others_wait_for_runs_between_two_chunks_of_another():
    ensemble = make_ensemble([engine(seed=1), engine(seed=2)])
    calls: list[tuple[int, int]] = []  # each call's engine, and the most tokens that it ran of a sequence
    real = Engine.respond

    def respond(self, requests):
        before = [session.stats.tokens for session, _ in requests]
        responses = real(self, requests)
        calls.append((id(self), max(s.stats.tokens - n for (s, _), n in zip(requests, before, strict=True))))
        return responses

    scheduler = Scheduler(9, 64)

    def start(prompt, seed):
        settings = ensemble.settings(raw=True, seed=seed, max_tokens=1000, ignore_end=True)
        generation = ensemble.context(settings).start(ensemble.encode_prompt(prompt, settings))
        scheduler.add(generation)
        return generation

    ticks = count()  # every call takes as long, so chunks become as large as they may be
    with patch.object(ToyEngine, "respond", respond), patch("mixlm.generation.scheduler.time") as time:
        time.perf_counter = lambda: float(next(ticks))
        for seed, prompt in enumerate("abcabcab"):
            start(prompt, seed)
        for _ in range(20):
            scheduler.step()
        late = start("abc" * 400, 9)
        while not late.completion.tokens:
            scheduler.step()
    chunked = [name if tokens == 64 else 0 for name, tokens in calls]
    assert sum(map(bool, chunked)) > 5
    assert not any(a and a == b for a, b in pairwise(chunked))


def starter(ensemble, scheduler):
    """Return a function that adds a generation of a text, a seed and a client."""

    def start(text, seed, client):
        settings = ensemble.settings(raw=True, seed=seed, max_tokens=1000, ignore_end=True)
        generation = ensemble.context(settings).start(ensemble.encode_prompt(text, settings))
        scheduler.add(generation, client)
        return generation

    return start


@pytest.mark.parametrize(("prompt", "steps"), [("abc" * 10, 1), ("abc" * 200, 15)], ids=["short", "long"])
@pytest.mark.parametrize("late", range(4))
def test_a_client_does_not_wait_for_the_prompts_of_another(prompt, steps, late):
    """A short prompt is the next to run, and a long one gets every second chunk."""
    ensemble = make_ensemble([engine(seed=1), engine(seed=2)])
    scheduler = Scheduler(9, 64)
    start = starter(ensemble, scheduler)

    with patch("mixlm.generation.scheduler.time") as time:
        time.perf_counter = lambda: 0.0  # chunks are as large as they may be
        for seed in range(8):
            start("abc" * 2000, seed, "many")
        for _ in range(20 + late):
            scheduler.step()
        single, taken = start(prompt, late, "single"), 0
        while not single.completion.tokens:
            scheduler.step()
            taken += 1
    assert taken <= steps


@pytest.mark.parametrize(
    "router", [None, lambda prompt, text: np.eye(2)[int(len(text) > 0)]], ids=["weights", "in turn"]
)
def test_a_client_does_not_wait_for_the_prompts_of_another_on_a_later_member(router):
    """Both members read its prompt soon, also where the first tokens of all are sampled before the second one does."""
    ensemble = make_ensemble([engine(seed=1), engine(seed=2)], router=router)
    scheduler = Scheduler(9, 64)
    start = starter(ensemble, scheduler)

    with patch("mixlm.generation.scheduler.time") as time:
        time.perf_counter = lambda: 0.0
        many = [start("abc" * 700, seed, "many") for seed in range(8)]
        while not all(generation.completion.tokens for generation in many):
            scheduler.step()
        single, taken = start("abc" * 200, 0, "single"), 0
        while len({token.member for token in single.completion.tokens}) < 2:
            scheduler.step()
            taken += 1
    assert taken <= 60


def test_chunks_of_several_prompts_grow_as_those_of_one():
    ensemble = make_ensemble([engine(seed=1)])
    clock = 0.0

    def on_forward(ids, last):
        nonlocal clock
        clock += 10 if len(ids) == 1 else 0.1 * len(ids)

    ensemble.members[0].engine.on_forward = on_forward
    settings = ensemble.settings(raw=True, seed=1, max_tokens=1000, ignore_end=True)

    def steps(prompts):
        scheduler = Scheduler(10, 256)
        generations = [
            ensemble.context(settings).start(ensemble.encode_prompt(prompt, settings)) for prompt in ("a", *prompts)
        ]
        for generation in generations[:1]:
            scheduler.add(generation)
        for _ in range(30):
            scheduler.step()
        for generation in generations[1:]:
            scheduler.add(generation)
        count = 0
        while not all(generation.completion.tokens for generation in generations):
            scheduler.step()
            count += 1
        return count

    with patch("mixlm.generation.scheduler.time") as time:
        time.perf_counter = lambda: clock
        alone = steps(["abc" * 300])
        assert steps(["abc" * 300, "cab" * 300]) < 2 * alone + 5
        # Beside two more that are generated: that a decode step takes longer by then is seen after 16 chunks.
        assert steps(["abc" * 300, "ab" * 15, "ab" * 20]) < 60


def test_a_cancelled_prompt_stops_within_a_chunk():
    ensemble = make_ensemble([engine(seed=1)])
    lengths: list[int] = []
    ensemble.members[0].engine.on_forward = lambda ids, last: lengths.append(len(ids))
    scheduler, settings = Scheduler(2, 16), ensemble.settings(raw=True, seed=4, max_tokens=5)
    generation = ensemble.context(settings).start(ensemble.encode_prompt("ab" * 100, settings))
    scheduler.add(generation)
    scheduler.step()
    scheduler.step()
    scheduler.cancel(generation)
    assert scheduler.idle
    assert scheduler.step() == []
    assert lengths == [16, 16]


def test_an_engine_that_fails_in_a_chunk_ends_that_generation_alone():
    ensemble = make_ensemble([engine(seed=1)])
    options = {"raw": True, "seed": 4, "max_tokens": 5}

    def fails(ids, last):
        if len(ids) == 16:
            raise RuntimeError("broken")

    [expected] = run_in_chunks(ensemble, ["ab"], 16, **options)
    ensemble.members[0].engine.on_forward = fails
    scheduler = Scheduler(2, 16)
    settings = ensemble.settings(**options)
    generations = [ensemble.context(settings).start(ensemble.encode_prompt(p, settings)) for p in ("ab", "ab" * 50)]
    for generation in generations:
        scheduler.add(generation)
    assert len(list(scheduler.run())) == 2
    assert text(generations[0].completion) == text(expected.completion)
    assert "broken" in generations[1].error.message


def test_a_prompt_whose_chunks_are_lost_is_prefilled_in_the_end():
    ensemble = make_ensemble([engine(seed=1)])
    options = {"raw": True, "seed": 4, "max_tokens": 5}
    [expected] = run_in_chunks(ensemble, ["ab" * 100], 1000, **options)
    lengths: list[int] = []
    ensemble.members[0].engine.on_forward = lambda ids, last: lengths.append(len(ids))
    with patch.object(Session, "cached_tokens", lambda self, ids, last=1: 0):  # as where another one takes its slot
        [generation] = run_in_chunks(ensemble, ["ab" * 100], 16, **options)
    assert text(generation.completion) == text(expected.completion)
    assert len(lengths) < 20
