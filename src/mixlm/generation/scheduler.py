"""Many replies at once: continuous batching over members.

Each reply waits for one member, or for several. The engine with the most replies waiting is served next, all of them in
one call; a reply that ends makes room for the next prompt at once. Serving the longest queue is what makes a batched
mixture worth having: stepping all replies in lockstep would read every member's weights at every step. With n equal
members a forward then serves 2/(n + 1) of all replies, against 1/n in conventional: 2n/(n + 1) times as many tokens for
a forward. An engine with a queue of its own, such as a server, is handed each question as it comes, so that it is never
idle while another one works.

A reply's text does not depend on what else is written at the same time: its noise is its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from mixlm.engines.base import Engine, Request, Response, Session, to_response
from mixlm.errors import EngineError, GenerationInterruptedError, MixlmError
from mixlm.generation.generation import Generation
from mixlm.generation.sequence import MemberError

# An engine whose oldest request has seen this many other calls go first is served whatever its queue: on a busy server
# the longest queue may always be another's.
_PATIENCE = 8


@dataclass(slots=True)
class _Waiting:
    """A reply and the questions it waits for."""

    stream: Generation
    requests: list[Request]
    replies: list[Response]
    missing: int
    void: bool = False  # a member was left out, and others were asked


@dataclass(slots=True)
class _Queue:
    """What is asked of one engine. since: the scheduler's count of calls when the oldest of it was asked."""

    engine: Engine
    asked: list[tuple[_Waiting, int]] = field(default_factory=list)
    since: int = 0


class Scheduler:
    """Writes replies together. most: replies in progress; the others wait their turn, in order."""

    def __init__(self, max_active: int = 16) -> None:
        self.max_active = max_active
        self._backlog: deque[Generation] = deque()
        self._queues: dict[int, _Queue] = {}
        self._active: list[Generation] = []
        self._calls = 0
        self._running: dict[Future[Any], tuple[_Queue, list[tuple[_Waiting, int]]]] = {}
        self._done: SimpleQueue[Future[Any]] = SimpleQueue()
        self._leaving: list[Generation] = []
        self._threads: ThreadPoolExecutor | None = None

    @property
    def free_slots(self) -> int:
        """How many more replies could begin now."""
        return self.max_active - len(self._active) - len(self._backlog)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._active and not self._backlog

    def add(self, stream: Generation) -> None:
        """Take in a reply that has not begun."""
        self._backlog.append(stream)

    def cancel(self, stream: Generation) -> None:
        """Drop a reply; its place is free at once."""
        if stream in self._backlog:
            self._backlog.remove(stream)
        for queue in self._queues.values():
            queue.asked = [one for one in queue.asked if one[0].stream is not stream]
        stream.close()
        self._end(stream)

    def run(self) -> Iterator[Generation]:
        """Write all replies; give each when it is finished."""
        while not self.idle:
            yield from (one for one in self.step() if one.finished)

    def step(self) -> list[Generation]:
        """Make one call to an engine, or one for each device. Returns the replies that got further or are finished."""
        moved = self._admit()
        self._start()
        for future in self._finished():
            queue, served = self._running.pop(future)
            for (waiting, at), reply in zip(served, self._found(future, queue.engine, served), strict=True):
                if waiting.stream.finished or waiting.void:
                    continue  # failed or cancelled meanwhile
                if isinstance(reply, EngineError):
                    self._without(waiting, at, reply)
                    moved.append(waiting.stream)
                    continue
                if isinstance(reply, MixlmError):
                    waiting.stream.fail(reply)
                    moved.append(waiting.stream)
                    self._end(waiting.stream)
                    continue
                waiting.replies[at] = reply
                waiting.missing -= 1
                if waiting.missing == 0:
                    moved.append(waiting.stream)
                    self._advance(waiting.stream, waiting.replies)
            queue.since = self._calls
            leaving, self._leaving = self._leaving, []
            for stream in leaving:
                self._end(stream)
        return moved

    def _without(self, waiting: _Waiting, at: int, error: EngineError) -> None:
        """Let a reply go on without the member that failed, if it may: what it asked is void, and it asks anew."""
        try:
            waiting.stream.continue_without(MemberError(waiting.requests[at].member, error))
        except GenerationInterruptedError:
            self._end(waiting.stream)
            return
        waiting.void = True
        for queue in self._queues.values():
            queue.asked = [one for one in queue.asked if one[0] is not waiting]
        self._advance(waiting.stream, None)

    def _admit(self) -> list[Generation]:
        """Begin replies while there is room. Returns those that ended at once."""
        ended = []
        while self._backlog and len(self._active) < self.max_active:
            stream = self._backlog.popleft()
            self._active.append(stream)
            self._advance(stream, None)
            if stream.finished:
                ended.append(stream)
        return ended

    def _advance(self, stream: Generation, replies: list[Response] | None) -> None:
        """Let a reply go on, and queue what it asks next."""
        try:
            if replies is not None:
                stream.resume(replies)
            requests = stream.requests()
        except MixlmError as error:
            stream.fail(error)
            requests = []
        if stream.finished:
            self._end(stream)
            return
        waiting = _Waiting(stream, requests, [None] * len(requests), len(requests))
        for at, request in enumerate(requests):
            engine = stream.members[request.member].engine
            queue = self._queues.setdefault(engine.batch_key, _Queue(engine))
            if engine.asynchronous:
                self._wait_for(engine.submit(stream.sessions[request.member], request), queue, [(waiting, at)])
                continue
            if not queue.asked:
                queue.since = self._calls
            queue.asked.append((waiting, at))

    def _wait_for(self, future: Future[Any], queue: _Queue, served: list[tuple[_Waiting, int]]) -> None:
        self._running[future] = (queue, served)
        future.add_done_callback(self._done.put)

    def _found(
        self, future: Future[Any], engine: Engine, served: Sequence[tuple[_Waiting, int]]
    ) -> list[Response | MixlmError]:
        """Return the replies of a call that is over."""
        if not engine.asynchronous:
            return list(future.result())
        [(waiting, at)] = served
        try:
            return [to_response(waiting.requests[at], future.result())]
        except MixlmError as error:
            return [error]

    def _end(self, stream: Generation) -> None:
        """Make room. Caches that another device's thread is at work on are freed when it is done."""
        if stream in self._active:
            self._active.remove(stream)
        if any(one.stream is stream for _, served in self._running.values() for one, _ in served):
            self._leaving.append(stream)
        else:
            stream.release()

    def _start(self) -> None:
        """Give every idle device the engine with the longest queue, or the one that waited longest."""
        busy = {queue.engine.device for queue, _ in self._running.values() if not queue.engine.asynchronous}
        for device in {queue.engine.device for queue in self._queues.values() if queue.asked} - busy:
            queues = [one for one in self._queues.values() if one.asked and one.engine.device == device]
            oldest = min(queues, key=lambda one: one.since)
            patient = self._calls - oldest.since < _PATIENCE
            queue = max(queues, key=lambda one: len(one.asked)) if patient else oldest
            served, queue.asked = queue.asked, []
            self._calls += 1
            asked = [
                (waiting.stream.sessions[waiting.requests[at].member], waiting.requests[at]) for waiting, at in served
            ]
            self._wait_for(self._submit(queue.engine, asked), queue, served)

    def _submit(self, engine: Engine, asked: list[tuple[Session, Request]]) -> Future[list[Response | MixlmError]]:
        devices = {queue.engine.device for queue in self._queues.values()}
        if len(devices) > 1:
            self._threads = self._threads or ThreadPoolExecutor()
            return self._threads.submit(_answered, engine, asked)
        done: Future[list[Response | MixlmError]] = Future()
        done.set_result(_answered(engine, asked))
        return done

    def _finished(self) -> list[Future[Any]]:
        """Wait for a call to be over; return it, and the others that are by now."""
        if not self._running:
            return []
        found = [self._done.get()]
        while not self._done.empty():
            found.append(self._done.get())
        return found


def _answered(engine: Engine, asked: Sequence[tuple[Session, Request]]) -> list[Response | MixlmError]:
    """Answer all; where that fails, each by itself, so that one reply's trouble is not the others'."""
    try:
        return engine.respond(asked)
    except MixlmError as error:
        if len(asked) == 1:
            return [error]
    return [one for each in asked for one in _answered(engine, [each])]
