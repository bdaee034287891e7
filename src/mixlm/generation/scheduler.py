"""Many generations at once: continuous batching over members.

Each generation waits for one member, or for several. The engine with the most waiting requests is called next, with all
of them; a generation that ends makes room for the next prompt at once. Serving the longest queue is what makes a
batched mixture worthwhile: stepping all sequences in lockstep would read every member's weights at every step. With n
equal members, a forward then yields a token for 2/(n + 1) of the sequences. Conventional decoding needs n forwards for
one token of each sequence, 1/n per forward: the mixture yields 2n/(n + 1) times as many tokens per forward. An engine
with a queue of its own, such as a server, gets each request as it comes, so that it is never idle while another one
works.

A long prompt does not hold up the others: where `prefill_chunk` is set, a call runs at most so many tokens of prompts,
and the decode steps of other sequences run in the same calls and between them. A chunk is a request for a prefix of the
prompt, after which the request itself is queued again. Its size follows the time that calls take (`chunks`). Prompts
of several clients take turns, and the engine that a client's new prompt waits for is called next: however many prompts
another one has sent, it waits for the call in progress. A generation can be preempted between calls: another one takes
its slot, and it goes on later.

A text does not depend on what else is generated at the same time: its noise is its own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mixlm.engines.base import Engine
from mixlm.engines.requests import GenerateRequest, LogitsRequest, Response, ScoreRequest
from mixlm.errors import EngineError, MixlmError
from mixlm.generation.chunks import ChunkSizes
from mixlm.generation.dispatch import Dispatcher, EngineRequest, MemberError, responses_of, to_mixlm_error
from mixlm.generation.generation import Generation
from mixlm.generation.member import address
from mixlm.types import TopKFilter

_Label = TypeVar("_Label")
# An engine whose oldest request has seen this many other calls is served whatever its queue: on a busy server the
# longest queue may always be another's.
_MAX_SKIPPED_CALLS = 8
# A request for more tokens than this is a prefill.
_MAX_DECODE_TOKENS = 16
# A prompt of no more tokens than this runs in one call.
_SHORT_PROMPT = 64
# A prompt whose chunks were lost more often than this is prefilled in one call.
_MAX_LOSSES = 3
# How long a step waits for servers at most, seconds.
_WAIT_SECONDS = 0.1
# The logits of a chunk are not used.
_ONE_LOGIT = TopKFilter(1, np.zeros(0, dtype=np.int64))


@dataclass(slots=True)
class _Waiting:
    """A generation and the responses it waits for. superseded: a member was excluded, and others are requested."""

    generation: Generation
    responses: list[Response]
    missing: int
    superseded: bool = False


class _QueuedRequest(NamedTuple):
    """One request in a queue: whose it is, its place among the requests of that, and where it goes.

    chunked: tokens of it that were run as chunks. losses: how often they were lost. rest: the request that a chunk is a
    part of.
    """

    waiting: _Waiting
    place: int
    addressed: EngineRequest
    chunked: int = 0
    losses: int = 0
    rest: _QueuedRequest | None = None


@dataclass(slots=True)
class _EngineQueue:
    """Requests for one engine.

    since: the scheduler's count of calls when the oldest of them came. chunks: how much of a long prompt a call runs.
    """

    engine: Engine
    requests: list[_QueuedRequest] = field(default_factory=list)
    since: int = 0
    chunks: ChunkSizes = field(default_factory=ChunkSizes)


class _Batch(NamedTuple):
    """The requests of one call.

    prefill_tokens: how many tokens of prompts it runs. chunk: how many of a long one, 0 for none. only_prefills:
    whether every generation waits for its prompt.
    """

    requests: list[_QueuedRequest]
    prefill_tokens: int = 0
    chunk: int = 0
    only_prefills: bool = False


class _Running(NamedTuple):
    queue: _EngineQueue
    batch: _Batch
    call: Future[Any]
    start: float


class Scheduler:
    """Runs generations together.

    Args:
        max_active: Generations in progress; the others wait, in order.
        prefill_chunk: Most tokens of prompts that one call runs; None for no limit, which is fastest overall.
    """

    def __init__(self, max_active: int = 16, prefill_chunk: int | None = None) -> None:
        self.max_active = max_active
        self.prefill_chunk = prefill_chunk
        self._backlog: deque[Generation] = deque()
        self._queues: dict[int, _EngineQueue] = {}
        self._active: list[Generation] = []
        self._preempted: dict[Generation, list[tuple[_EngineQueue, _QueuedRequest]]] = {}
        self._last_chunked: dict[Any, _EngineQueue | None] = {}  # by device: whose call was the last, with a chunk
        self._clients: dict[Generation, str] = {}
        self._last_prefills: dict[str, int] = {}  # by client: the count of calls when a new prompt of it ran last
        self._new: set[Generation] = set()  # those that have had no response since they got a slot
        self._calls = 0
        self._running: dict[Future[Any], _Running] = {}
        self._done: SimpleQueue[Future[Any]] = SimpleQueue()
        self._leaving: list[Generation] = []
        self._dispatcher = Dispatcher()

    @property
    def free_slots(self) -> int:
        """How many more generations could begin now."""
        return self.max_active - len(self._active) - len(self._backlog)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._active and not self._backlog

    def add(self, generation: Generation, client: str = "") -> None:
        """Take in a generation that has not begun, or was preempted. client: whose prompt it is; they take turns."""
        self._clients[generation] = client
        self._backlog.append(generation)

    def cancel(self, generation: Generation) -> None:
        """Drop a generation; its slot is free at once."""
        if generation in self._backlog:
            self._backlog.remove(generation)
        self._preempted.pop(generation, None)
        self._take_requests(generation)
        generation.close()
        self._end(generation)

    def preempt(self, generation: Generation) -> bool:
        """Take the slot of a generation in progress; `add` lets it go on.

        Its KV caches are freed, as those of a generation that ends; it reads its text again, or finds it in a prefix
        cache.

        Returns:
            Whether its slot is free: not while a call runs for it.
        """
        if self._running_calls(generation):
            return False
        self._preempted[generation] = self._take_requests(generation)
        self._active.remove(generation)
        for session in generation.sessions:
            session.close()
        return True

    def _take_requests(self, generation: Generation) -> list[tuple[_EngineQueue, _QueuedRequest]]:
        """Remove the queued requests of a generation; return them with their queues."""
        taken = []
        for queue in self._queues.values():
            taken += [(queue, queued) for queued in queue.requests if queued.waiting.generation is generation]
            queue.requests = [queued for queued in queue.requests if queued.waiting.generation is not generation]
        return taken

    def run(self) -> Iterator[Generation]:
        """Run all generations; yields each when it is finished."""
        while not self.idle:
            yield from (generation for generation in self.step() if generation.finished)

    def run_each(self, begun: Iterator[tuple[_Label, Generation]]) -> Iterator[tuple[_Label, Generation]]:
        """Run generations, each taken when there is room for it; yields each when it is finished, with its label."""
        labels: dict[Generation, _Label] = {}
        while True:
            while self.free_slots and (item := next(begun, None)) is not None:
                if item[1].finished:
                    yield item
                else:
                    labels[item[1]] = item[0]
                    self.add(item[1])
            if self.idle:
                return
            for generation in self.step():
                if generation.finished:
                    yield labels.pop(generation), generation

    def step(self) -> list[Generation]:
        """Call one engine, or one on each device. Returns the generations that advanced or are finished."""
        advanced = self._admit()
        self._call_engines()
        for future in self._wait():
            queue, batch, call, start = self._running.pop(future)
            queue.chunks.record(
                time.perf_counter() - start, batch.prefill_tokens, batch.chunk, alone=batch.only_prefills
            )
            responses = responses_of([queued.addressed for queued in batch.requests], call)
            for queued, response in zip(batch.requests, responses, strict=True):
                if queued.waiting.generation.finished or queued.waiting.superseded:
                    continue  # failed or cancelled meanwhile
                if queued.rest is not None and not isinstance(response, MixlmError):
                    queue.requests.append(queued.rest)  # what is left after a chunk
                elif self._deliver(queued, response):
                    advanced.append(queued.waiting.generation)
            queue.since = self._calls
            leaving, self._leaving = self._leaving, []
            for generation in leaving:
                self._end(generation)
        return advanced

    def _deliver(self, queued: _QueuedRequest, response: Response | MixlmError) -> bool:
        """Hand a response to its generation. Returns whether that advanced or ended."""
        waiting, generation = queued.waiting, queued.waiting.generation
        if isinstance(response, MixlmError):
            waiting.superseded = True
            self._take_requests(generation)
            if isinstance(response, EngineError):
                response = MemberError(queued.addressed.request.member, response)
            self._advance(generation, response)
            return True
        waiting.responses[queued.place] = response
        waiting.missing -= 1
        if waiting.missing:
            return False
        self._advance(generation, waiting.responses)
        return True

    def _admit(self) -> list[Generation]:
        """Begin generations while there are slots. Returns those that ended at once."""
        ended = []
        while self._backlog and len(self._active) < self.max_active:
            generation = self._backlog.popleft()
            self._active.append(generation)
            self._new.add(generation)
            if generation in self._preempted:
                for queue, queued in self._preempted.pop(generation):
                    self._enqueue(queue, queued)
                continue
            self._advance(generation, None)
            if generation.finished:
                ended.append(generation)
        return ended

    def _advance(self, generation: Generation, outcome: list[Response] | MixlmError | None) -> None:
        """Let a generation continue with responses, or without the member that failed; and queue its next requests."""
        try:
            if isinstance(outcome, MemberError):
                generation.continue_without(outcome)
            elif isinstance(outcome, MixlmError):
                raise outcome
            elif outcome is not None:
                self._new.discard(generation)
                generation.resume(outcome)
            requests = generation.requests()
        except Exception as error:  # also of a user's router: it ends this generation alone
            generation.fail(to_mixlm_error(error))
            requests = []
        if generation.finished:
            self._end(generation)
            return
        waiting = _Waiting(generation, [None] * len(requests), len(requests))
        for place, addressed in enumerate(address(requests, generation.members, generation.sessions)):
            queue = self._queues.setdefault(addressed.engine.batch_key, _EngineQueue(addressed.engine))
            queued = _QueuedRequest(waiting, place, addressed)
            if addressed.engine.asynchronous:
                self._call(queue, _Batch([queued]))
                continue
            self._enqueue(queue, queued)

    def _enqueue(self, queue: _EngineQueue, queued: _QueuedRequest) -> None:
        if not queue.requests:
            queue.since = self._calls
        queue.requests.append(queued)

    def _end(self, generation: Generation) -> None:
        """Free the slot. KV caches that another device's thread works on are freed when it is done.

        Requests to a server are cancelled.
        """
        if generation in self._active:
            self._active.remove(generation)
        self._new.discard(generation)
        client = self._clients.pop(generation, None)
        if client is not None and client not in self._clients.values():
            self._last_prefills.pop(client, None)
        running = self._running_calls(generation)
        for run in running:
            if run.queue.engine.asynchronous:
                run.call.cancel()
        if running:
            self._leaving.append(generation)
        else:
            generation.release()

    def _running_calls(self, generation: Generation) -> list[_Running]:
        return [
            run for run in self._running.values() if any(q.waiting.generation is generation for q in run.batch.requests)
        ]

    def _call_engines(self) -> None:
        """Give every idle device its next engine."""
        busy = {run.queue.engine.device for run in self._running.values() if not run.queue.engine.asynchronous}
        waiting = [queue for queue in self._queues.values() if queue.requests]
        for device in {queue.engine.device for queue in waiting} - busy:
            queue = self._next_queue([queue for queue in waiting if queue.engine.device == device])
            batch, queue.requests = self._split(queue)
            self._last_chunked[device] = queue if batch.chunk else None
            for queued in batch.requests:
                if queued.rest is not None or _is_prefill(queued) or queued.waiting.generation in self._new:
                    self._last_prefills[self._clients[queued.waiting.generation]] = self._calls
            self._calls += 1
            self._call(queue, batch)

    def _next_queue(self, queues: list[_EngineQueue]) -> _EngineQueue:
        """Return the queue that has waited too long, else that of a client's new prompt, else the longest."""
        oldest = min(queues, key=lambda queue: queue.since)
        if self._calls - oldest.since >= _MAX_SKIPPED_CALLS:
            return oldest
        latest = max(self._last_prefills.values(), default=-1)
        new = [
            (self._turn(queued), queue)
            for queue in queues
            for queued in queue.requests
            if queued.chunked == 0 and queued.waiting.generation in self._new
        ]
        turn, queue = min(new, key=lambda item: item[0], default=(latest, oldest))
        if turn < latest:
            return queue
        # Where others wait, they are not held up by two chunks in a row.
        others = [queue for queue in queues if queue is not self._last_chunked.get(queue.engine.device)]
        return max(others or queues, key=lambda queue: len(queue.requests))

    def _turn(self, queued: _QueuedRequest) -> int:
        """Return the order of a prefill: the client that had none for longest goes first."""
        return self._last_prefills.get(self._clients[queued.waiting.generation], -1)

    def _split(self, queue: _EngineQueue) -> tuple[_Batch, list[_QueuedRequest]]:
        """Return the requests, or chunks of them, of the next call, and the requests that wait for another one."""
        if self.prefill_chunk is None:
            return _Batch(queue.requests), []
        requests: list[_QueuedRequest] = []
        prefills: list[_QueuedRequest] = []
        for queued in queue.requests:
            (prefills if _is_prefill(queued) else requests).append(queued)
        if not prefills or (queue.chunks.needs_decode_step and requests):
            return _Batch(requests), prefills
        only_prefills = self._only_prefills()
        chunk = min(queue.chunks.alone if only_prefills else queue.chunks.beside, self.prefill_chunk)
        budget = total = min(max(chunk, _SHORT_PROMPT), self.prefill_chunk)
        later: list[_QueuedRequest] = []
        has_chunk = False
        for queued in sorted(prefills, key=self._turn):
            part, tokens = _first_chunk(queued, chunk, total)
            is_chunk = part.rest is not None
            if (tokens <= budget or budget == total) and not (has_chunk and is_chunk):
                requests.append(part)
                budget -= tokens
                has_chunk |= is_chunk
            else:
                later.append(queued)
                budget = 0  # the prefills behind it do not overtake it
        return _Batch(requests, total - budget, chunk if has_chunk else 0, only_prefills), later

    def _only_prefills(self) -> bool:
        """Whether every generation waits for the prefill of a prompt: then none is held up by one."""
        prefilling = {
            queued.waiting.generation
            for queue in self._queues.values()
            for queued in queue.requests
            if _is_prefill(queued)
        }
        running = (queued for run in self._running.values() for queued in run.batch.requests)
        prefilling.update(queued.waiting.generation for queued in running if queued.rest is not None)
        return prefilling.issuperset(self._active)

    def _call(self, queue: _EngineQueue, batch: _Batch) -> None:
        several_devices = len({queue.engine.device for queue in self._queues.values()}) > 1
        start = time.perf_counter()
        call = self._dispatcher.begin([queued.addressed for queued in batch.requests], in_thread=several_devices)
        self._running[call] = _Running(queue, batch, call, start)
        call.add_done_callback(self._done.put)

    def _wait(self) -> list[Future[Any]]:
        """Wait until a call is over; return it, and the others that are by now.

        Return none where nothing runs, or only servers are at work and take long: meanwhile generations may be added or
        cancelled.
        """
        if not self._running:
            return []
        only_servers = all(run.queue.engine.asynchronous for run in self._running.values())
        done: list[Future[Any]] = []
        with suppress(Empty):
            done.append(self._done.get(timeout=_WAIT_SECONDS if only_servers else None))
            while True:
                done.append(self._done.get_nowait())
        return done


def _missing(queued: _QueuedRequest) -> tuple[int, int]:
    """Return how many tokens of a request are in the KV cache, and how many are not."""
    session, request = queued.addressed.session, queued.addressed.request
    cached = session.cached_tokens(request.ids, request.last)
    return cached, len(request.ids) - cached


def _is_prefill(queued: _QueuedRequest) -> bool:
    """Whether a request is a prefill, and not a decode step or the catch-up of a few tokens."""
    if isinstance(queued.addressed.request, GenerateRequest | ScoreRequest):
        return False
    return _missing(queued)[1] > _MAX_DECODE_TOKENS


def _first_chunk(queued: _QueuedRequest, chunk: int, total: int) -> tuple[_QueuedRequest, int]:
    """Return the part of a prefill that runs next, and how many tokens that has: all of it if not too many.

    chunk, total: tokens of one chunk, and of all in a call.
    """
    session, request = queued.addressed.session, queued.addressed.request
    cached, missing = _missing(queued)
    # A session may lose its KV cache between chunks, as a slot of llama.cpp: it begins again, but not for ever.
    losses = queued.losses + (cached < queued.chunked)
    short = queued.chunked == 0 and missing <= min(_SHORT_PROMPT, total)
    if short or missing - request.last < chunk or losses > _MAX_LOSSES or not session.can_chunk(request.ids):
        return queued, missing
    prefix = request.ids[: cached + chunk]
    addressed = queued.addressed._replace(request=LogitsRequest(request.member, prefix, 1, _ONE_LOGIT))
    rest = queued._replace(chunked=len(prefix), losses=losses)
    return _QueuedRequest(queued.waiting, queued.place, addressed, rest=rest), chunk
