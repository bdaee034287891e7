"""The thread that runs the models: it takes jobs, steps the scheduler, and returns events, such as tokens.

Jobs reach it through an inbox. Events leave it in one call to the event loop for each step. The methods for the event
loop never wait for a model.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from mixlm.generation.generation import Generation
from mixlm.generation.scheduler import Scheduler
from mixlm.server.api_errors import ApiError
from mixlm.server.fair_queue import FairQueue
from mixlm.server.limits import ServerLimits
from mixlm.types import Completion, Token

_log = logging.getLogger("mixlm.server")
# How long a stopping server waits for the current step, seconds.
_STOP_SECONDS = 2.0
CancelReason = Literal["gone", "timeout", "shutdown"]


@dataclass(frozen=True, slots=True)
class JobQueued:
    """All prompts of the job are encoded and fit; its generations are queued. time: of `time.monotonic`."""

    time: float


@dataclass(frozen=True, slots=True)
class GenerationStarted:
    """A generation has left the queue. time: of `time.monotonic`."""

    time: float


@dataclass(frozen=True, slots=True)
class TokensGenerated:
    """New tokens of one generation, and its completion once it is finished.

    forwards: for each member that ran since the previous event, the number of tokens in each forward pass.
    """

    index: int
    tokens: Sequence[Token]
    forwards: Mapping[str, Sequence[int]]
    completion: Completion | None = None


@dataclass(frozen=True, slots=True)
class JobFailed:
    """A generation raised an error, which ends the whole job."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class JobCancelled:
    """The job was cancelled."""

    reason: CancelReason


JobEvent = JobQueued | GenerationStarted | TokensGenerated | JobFailed | JobCancelled


@dataclass(slots=True, eq=False)
class Job:
    """The generations of one request. It belongs to the event loop; the model thread reads only `client`.

    Attributes:
        client: Who sent the request; clients take turns.
        unfinished: Number of generations that have not ended.
        events: What happened to the job, in order.
        started: Whether the model thread has its generations.
        cancelled: Whether the job was cancelled.
    """

    client: str
    unfinished: int
    events: asyncio.Queue[JobEvent] = field(default_factory=asyncio.Queue)
    started: bool = False
    cancelled: bool = False


@dataclass(slots=True, eq=False)
class ActiveGeneration:
    """Which generation of a job this is.

    reported_forwards: of each member, the passes already returned in events. begun: whether it has had a slot. running:
    whether it has one. advanced: whether it has generated anything since it got it.
    """

    job: Job
    index: int
    reported_forwards: list[int]
    begun: bool = False
    running: bool = False
    advanced: bool = False


class ModelThread:
    """Runs the generations of jobs. The public methods belong to the event loop's thread.

    A job is admitted when its request arrives, and started when it is prepared.

    Attributes:
        draining: Set it to refuse new jobs.
    """

    def __init__(self, limits: ServerLimits) -> None:
        self.draining = False
        self._limits = limits
        # Used by the event loop: jobs that have not ended, and when generations ended lately.
        self._jobs: set[Job] = set()
        self._end_times: deque[float] = deque(maxlen=32)
        # Used by both.
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # None ends the thread
        self._step_start: float | None = None
        # Used by the thread.
        self._queue: FairQueue[Generation] = FairQueue()
        self._active: dict[Generation, ActiveGeneration] = {}
        self._scheduler = Scheduler(limits.max_batch, limits.prefill_chunk)
        self._outbox: list[tuple[Job, JobEvent | None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="mixlm-models", daemon=True)

    # For the event loop.

    def start(self) -> None:
        """Start the thread. Call it where the event loop runs."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after its current step. A step that takes too long is abandoned."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join, _STOP_SECONDS)

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def step_seconds(self) -> float:
        """How long the current step has taken; 0 when the thread is idle."""
        start = self._step_start
        return 0.0 if start is None else time.monotonic() - start

    @property
    def num_unfinished(self) -> int:
        """Number of generations that run or wait."""
        return sum(job.unfinished for job in self._jobs)

    @property
    def num_running(self) -> int:
        """Number of generations that run; read from another thread, so a moment old."""
        return len(self._active) - len(self._queue)

    @property
    def num_waiting(self) -> int:
        """Number of generations that wait in the queue."""
        return len(self._queue)

    def admit(self, job: Job) -> None:
        """Reserve places for a job.

        A full queue still admits a client that has less than its share: the capacity over the number of clients. So
        the places add up to more than the capacity, but not to more than twice as many.

        Raises:
            ApiError: There are not enough places, or the server is stopping.
        """
        if self.draining or not self.is_alive:
            raise ApiError(503, "the server is about to stop", code="stopping", headers={"retry-after": "5"})
        count, capacity = job.unfinished, self._limits.capacity
        total = self.num_unfinished + count
        own = count + sum(other.unfinished for other in self._jobs if other.client == job.client)
        share = capacity // len({job.client, *(other.client for other in self._jobs)})
        if total > capacity and (own > share or total > 2 * capacity):
            seconds = str(self._estimate_wait(count))
            raise ApiError(
                429,
                f"{self.num_unfinished} of {capacity} places for completions are taken; retry in {seconds} s",
                code="queue_full",
                headers={"retry-after": seconds},
            )
        self._jobs.add(job)

    def start_job(self, job: Job, generations: Sequence[Generation]) -> None:
        """Queue the generations of an admitted job."""
        if not job.cancelled:
            job.started = True
            self._inbox.put(partial(self._start, job, generations))

    def fail(self, job: Job, error: Exception) -> None:
        """End an admitted job that could not be prepared."""
        if not job.cancelled:
            job.events.put_nowait(JobFailed(error))
            self._end(job, job.unfinished)

    def cancel(self, job: Job, reason: CancelReason) -> None:
        """Cancel a job that has not ended. Its slots are free after the current step."""
        if job in self._jobs and not job.cancelled:
            job.cancelled = True
            job.events.put_nowait(JobCancelled(reason))
            if job.started:
                self._inbox.put(partial(self._drop, job, None))
            else:
                self._end(job, job.unfinished)

    def cancel_all(self, reason: CancelReason) -> None:
        """Cancel every job."""
        for job in list(self._jobs):
            self.cancel(job, reason)

    def _estimate_wait(self, count: int) -> int:
        """Return in how many seconds `count` more generations may fit, from the rate at which some ended lately."""
        elapsed = time.monotonic() - self._end_times[0] if self._end_times else 1.0
        return max(1, min(60, math.ceil(count * elapsed / max(len(self._end_times), 1))))

    def _deliver(self, events: list[tuple[Job, JobEvent | None]]) -> None:
        """Pass events to their jobs. None means that the generations of a cancelled job have ended."""
        for job, event in events:
            ended = 0
            match event:
                case None | JobFailed():
                    ended = job.unfinished
                case TokensGenerated(completion=Completion()):
                    ended = 1
            if ended:
                self._end_times.extend([time.monotonic()] * ended)
                self._end(job, ended)
            if event is not None and not job.cancelled:
                job.events.put_nowait(event)

    def _end(self, job: Job, count: int) -> None:
        """Free the places of generations that have ended."""
        job.unfinished -= count
        if job.unfinished == 0:
            self._jobs.discard(job)

    # In the thread.

    def _run(self) -> None:
        running = True
        while running:
            try:
                running = self._read_inbox()
                self._share_slots()
                while self._scheduler.free_slots > 0 and len(self._queue):
                    self._run_generation(self._queue.pop())
                if running and not self._scheduler.idle:
                    for generation in self._scheduler.step():
                        self._report(generation)
            except BaseException as error:  # also a panic of a library in Rust: without this thread nothing runs
                self._reset(error)
            self._send_events()

    def _read_inbox(self) -> bool:
        """Process all messages; wait for one when there is nothing else to do. Returns False at the end."""
        while True:
            idle = self._scheduler.idle and not len(self._queue) and not self._outbox
            self._step_start = None if idle else time.monotonic()
            try:
                message = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            self._step_start = time.monotonic()
            if message is None:
                return False
            message()

    def _start(self, job: Job, generations: Sequence[Generation]) -> None:
        self._outbox.append((job, JobQueued(time.monotonic())))
        for index, generation in enumerate(generations):
            self._active[generation] = ActiveGeneration(job, index, [0] * len(generation.sessions))
            self._queue.push(job.client, generation)

    def _run_generation(self, generation: Generation) -> None:
        """Give a generation a slot."""
        active = self._active[generation]
        self._scheduler.add(generation, active.job.client)
        if not active.begun:
            self._outbox.append((active.job, GenerationStarted(time.monotonic())))
        active.begun = active.running = True
        active.advanced = False

    def _share_slots(self) -> None:
        """Where all slots are taken, give one to each client that waits and has none: of a client with several."""
        if self._scheduler.free_slots > 0 or not len(self._queue):
            return
        slots = Counter(active.job.client for active in self._active.values() if active.running)
        for client in [client for client in self._queue.clients if not slots[client]]:
            several = [busy for busy, count in slots.most_common() if count > 1]
            preempted = next(filter(self._preempt_latest, several), None)
            if preempted is None:
                return
            slots[preempted] -= 1
            slots[client] += 1
            self._run_generation(self._queue.pop(client))

    def _preempt_latest(self, client: str) -> bool:
        """Put a client's generation that began last back into the queue, if no call runs for it.

        One that is still prefilled is the last choice: it would begin anew each time.
        """
        running = [
            (generation, active)
            for generation, active in reversed(self._active.items())
            if active.running and active.job.client == client
        ]
        for generation, active in sorted(running, key=lambda item: not item[1].advanced):
            if self._scheduler.preempt(generation):
                active.running = False
                self._queue.push(client, generation, first=True)
                return True
        return False

    def _drop(self, job: Job, event: JobEvent | None) -> None:
        """Drop the generations of a job that is cancelled, or cannot be completed any more."""
        generations = [generation for generation, active in self._active.items() if active.job is job]
        self._queue.remove(generations.__contains__)
        for generation in generations:
            del self._active[generation]
            self._scheduler.cancel(generation)
        self._outbox.append((job, event))

    def _report(self, generation: Generation) -> None:
        """Make an event of a generation's new tokens."""
        active = self._active.get(generation)
        if active is None:
            return
        tokens = list(generation.ready)
        generation.ready.clear()
        if generation.error is not None:
            self._drop(active.job, JobFailed(generation.error))
            return
        completion = generation.completion if generation.finished else None
        if completion is not None:
            del self._active[generation]
        if tokens or completion is not None:
            active.advanced = True
            forwards = self._new_forwards(generation, active)
            self._outbox.append((active.job, TokensGenerated(active.index, tokens, forwards, completion)))

    def _new_forwards(self, generation: Generation, active: ActiveGeneration) -> dict[str, list[int]]:
        """Return the tokens of each forward pass since the previous call, by member."""
        forwards = {}
        for i, (member, session) in enumerate(zip(generation.members, generation.sessions, strict=True)):
            passes = session.stats.forwards
            if len(passes) > active.reported_forwards[i]:
                forwards[member.name] = [forward.tokens for forward in passes[active.reported_forwards[i] :]]
                active.reported_forwards[i] = len(passes)
        return forwards

    def _reset(self, error: BaseException) -> None:
        """After an unexpected error: fail the jobs in progress, and go on with a new scheduler."""
        _log.error("a step failed", exc_info=error)
        jobs = {active.job for active in self._active.values()}
        self._scheduler = Scheduler(self._limits.max_batch, self._limits.prefill_chunk)
        self._queue, self._active = FairQueue(), {}
        self._outbox += [(job, JobFailed(error)) for job in jobs]

    def _send_events(self) -> None:
        if self._outbox and self._loop is not None:
            events, self._outbox = self._outbox, []
            with suppress(RuntimeError):  # the loop has ended, and nobody reads events any more
                self._loop.call_soon_threadsafe(self._deliver, events)
