from __future__ import annotations

from collections import Counter
from itertools import count
from threading import Event
from typing import ClassVar
from unittest.mock import patch

import numpy as np
import pytest
from toys import engine, ensemble, toys

from mixlm.engines.base import Engine
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
    return [(one.data, one.member, one.text) for one in completion.tokens], completion.finish_reason


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("unit", ["token", "piece"])
def test_replies_written_together_are_those_written_one_by_one(unit, method):
    those = toys(unit, 3)
    options = {"raw": True, "seed": 4, "max_tokens": 25, **method}
    expected = [text(those.generate(prompt, sequence=i, **options)) for i, prompt in enumerate(PROMPTS)]
    assert [text(one) for one in those.generate(PROMPTS, **options)] == expected
    for at_once in (1, 2, 5):
        found = {at: text(one.completion) for at, one in those.generations(PROMPTS, at_once=at_once, **options)}
        assert [found[at] for at in range(len(PROMPTS))] == expected


def test_a_router_that_reads_prompts_works_too():
    those = toys("token", 3, router=PromptRouter(np.full(3, 1 / 3)))
    options = {"raw": True, "seed": 4, "max_tokens": 15}
    expected = [text(those.generate(prompt, sequence=i, **options)) for i, prompt in enumerate(PROMPTS)]
    assert [text(one) for one in those.generate(PROMPTS, **options)] == expected


def test_several_prompts_and_one_conversation_are_told_apart():
    those = ensemble([ToyEngine(seed=1), ToyEngine(seed=2)])
    turns = [Message("user", "a"), {"role": "assistant", "content": "b"}, Message("user", "c")]
    assert those.generate(turns, seed=1, max_tokens=3).text == those.generate(turns, seed=1, max_tokens=3).text
    several = those.generate([turns, "ab", turns[:1]], seed=1, max_tokens=3)
    assert [text(one) for one in several[:1]] == [text(those.generate(turns, seed=1, max_tokens=3))]
    assert len(several) == 3


def test_prompts_are_taken_in_as_there_is_room():
    those, taken = toys("token", 2), count()

    def prompts():
        for prompt in PROMPTS:
            next(taken)
            yield prompt

    replies = those.generations(prompts(), at_once=2, seed=1, raw=True, max_tokens=5)
    next(replies)
    assert next(taken) <= 4


def counted(method, replies, tokens):
    """Forwards and sequences in them, for two members that run everything that is asked at once."""
    those = ensemble([engine(seed=1), engine(seed=2)])
    calls = []

    def together(self, requests):
        calls.append(len(requests))
        return respond_batched(requests, lambda parts: [one.session.forward(one.ids, one.last) for one in parts], 99)

    with patch.object(ToyEngine, "respond", together):
        options = {"raw": True, "seed": 4, "max_tokens": tokens, "ignore_end": True, "method": method}
        for _ in those.generations(["ab"] * replies, at_once=replies, **options):
            pass
    return len(calls), sum(calls) / len(calls)


def test_the_longest_queue_first_serves_two_thirds_of_the_replies_at_a_time():
    conventional, _ = counted("conventional", 16, 60)
    mixture, served = counted("mixture", 16, 60)
    assert conventional == 2 * 60
    # 2/(n + 1) of 16, as long as all of them are being written; the last replies have fewer companions.
    assert abs(served / (16 * 2 / 3) - 1) < 0.15
    assert conventional / mixture > 1.15


class Slow(ToyEngine):
    """Notes in which order engines are served."""

    served: ClassVar[list[str]] = []

    def respond(self, requests):
        Slow.served.append(self.name)
        return super().respond(requests)


def test_an_engine_with_a_short_queue_is_not_forgotten():
    Slow.served = []
    often, seldom = Slow(name="often"), Slow(name="seldom")
    those = ensemble([often, seldom], [0.97, 0.03])
    scheduler = Scheduler(40)
    settings = those.settings(raw=True, seed=1, max_tokens=400, ignore_end=True)
    for i in range(40):
        one = settings.with_turn(i)
        scheduler.add(those.context(one).start(those.encode_prompt(" the", one)))
    for _ in range(300):
        scheduler.step()
    gaps = np.diff([at for at, name in enumerate(Slow.served) if name == "seldom"])
    assert Counter(Slow.served)["seldom"] > 10
    assert gaps.max() <= 60


def test_a_reply_that_fails_does_not_disturb_the_others():
    those = toys("token", 2)
    real = Engine.respond

    def fails(self, requests):
        if any(len(request.ids) == 7 for _, request in requests):
            raise MemoryLimitError("no memory", "smaller")
        return real(self, requests)

    options = {"raw": True, "seed": 4, "max_tokens": 25, "ignore_end": True}
    expected = [text(those.generate(prompt, sequence=i, **options)) for i, prompt in enumerate(PROMPTS[:4])]
    with patch.object(ToyEngine, "respond", fails):
        found = dict(those.generations(PROMPTS[:4], **options))
        with pytest.raises(MemoryLimitError):
            those.generate(PROMPTS[:4], **options)
    assert all(isinstance(one.error, MemoryLimitError) and one.finished for one in found.values())
    written = [text(found[at].completion)[0] for at in range(4)]
    assert all(one == full[: len(one)] for one, (full, _) in zip(written, expected, strict=True))

    def fails_for_one(self, requests):
        if any(request.ids[1] == 4 for _, request in requests):
            raise MemoryLimitError("no memory", "smaller")
        return real(self, requests)

    with patch.object(ToyEngine, "respond", fails_for_one):
        found = dict(those.generations(PROMPTS[:4], **options))
    assert [at for at in range(4) if found[at].error] == [1]
    assert [text(found[at].completion) for at in (0, 2, 3)] == [expected[at] for at in (0, 2, 3)]


def test_a_cancelled_reply_makes_room_at_once():
    those = toys("token", 2)
    scheduler, settings = Scheduler(2), those.settings(raw=True, seed=4, max_tokens=50, ignore_end=True)
    streams = [those.context(settings).start(those.encode_prompt("ab", settings)) for _ in range(4)]
    for one in streams:
        scheduler.add(one)
    scheduler.step()
    assert scheduler.free_slots == -2
    scheduler.cancel(streams[0])
    scheduler.cancel(streams[3])
    assert scheduler.free_slots == 0
    finished = list(scheduler.run())
    assert finished == [streams[1], streams[2]] or finished == [streams[2], streams[1]]
    assert len(streams[1].completion.tokens) == 50
    assert scheduler.idle


def test_a_cancelled_reply_keeps_its_caches_while_another_thread_is_at_work_on_them():
    """Two devices; the second one's forward is held up while the reply is given up."""
    first, second = engine(seed=1), engine(seed=2)
    second.device = "other"
    gate, real = Event(), second.respond

    def held(requests):
        gate.wait(10)
        return real(requests)

    second.respond = held
    those = ensemble([first, second])
    settings = those.settings(raw=True, seed=1, max_tokens=5, method="conventional")
    stream, scheduler = those.context(settings).start(those.encode_prompt("ab", settings)), Scheduler(1)
    scheduler.add(stream)
    scheduler.step()  # the first member's answer; the second is still at it
    with patch.object(stream, "release", wraps=stream.release) as release:
        scheduler.cancel(stream)
        assert (scheduler.free_slots, stream.finished, release.call_count) == (1, True, 0)
        gate.set()
        scheduler.step()
        assert release.call_count == 1


def test_caches_are_freed_when_a_reply_ends():
    those = toys("token", 2)
    for _, stream in those.generations(PROMPTS, raw=True, seed=1, max_tokens=5):
        assert all(not session._context for session in stream.sessions)
        assert stream.completion.usage.members["m0"].forwards >= 0


def test_what_cannot_be_written_is_said_at_once():
    those = toys("token", 2)
    with pytest.raises(ConfigError, match="at_once is 0"):
        next(those.generations(PROMPTS, at_once=0))
    short = ensemble([engine(seed=1, context_length=6)])
    with pytest.raises(PromptTooLongError):
        short.generate(["a", "abababababab" * 3], raw=True)
