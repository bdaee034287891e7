"""The thread that owns the models: it takes orders in, lets the scheduler step, and hands tokens back.

Orders reach it through an inbox, and events leave it in one call to the event loop for each step. The methods that the
event loop calls never wait for a model.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

from mixlm.errors import MixlmError
from mixlm.generation.generation import Generation
from mixlm.generation.scheduler import Scheduler
from mixlm.server.api_errors import ApiError
from mixlm.server.fair_queue import Line
from mixlm.server.jobs import Begun, Closed, Event, Failed, Order, Reason, Started, Task, Wrote
from mixlm.server.limits import Limits

_log = logging.getLogger("mixlm.server")


@dataclass(slots=True, eq=False)
class Place:
    """Which reply of an order a stream writes. forwards: those of each member that have been passed on."""

    order: Order
    index: int
    forwards: list[int]


class Worker:
    """Writes the replies that orders ask for. `submit`, `close` and `close_all` are for the event loop's thread."""

    def __init__(self, limits: Limits) -> None:
        self.draining = False
        self._limits = limits
        self._open: set[Order] = set()  # the event loop's
        self._unended = 0  # the event loop's: replies of the above
        self._ends: deque[float] = deque(maxlen=32)  # the event loop's: when replies ended, seconds
        self._inbox: queue.SimpleQueue[tuple[str, Order | None]] = queue.SimpleQueue()
        self._line: Line[tuple[Order, Generation]] = Line()
        self._places: dict[Generation, Place] = {}
        self._scheduler = Scheduler(limits.at_once)
        self._out: list[tuple[Order, Event | None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="mixlm-models", daemon=True)

    # What the event loop asks.

    def start(self) -> None:
        """Begin. To be called where the event loop runs."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End the thread behind the step it is in."""
        self._inbox.put(("stop", None))
        await asyncio.to_thread(self._thread.join)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def unended(self) -> int:
        """Replies that are being written or wait."""
        return self._unended

    @property
    def writing(self) -> int:
        """Replies that are being written. Read from another thread, so a moment old."""
        return len(self._places) - len(self._line)

    @property
    def waiting(self) -> int:
        """Replies that wait for their turn."""
        return len(self._line)

    def submit(self, order: Order) -> None:
        """Take in an order. Raises ApiError where there is no room for it, or the server is about to stop."""
        if self.draining or not self.alive:
            raise ApiError(503, "the server is about to stop", code="stopping", headers={"retry-after": "5"})
        count, most = len(order.tasks), self._limits.most
        if count > most:
            raise ApiError(
                400, f"{count} replies were asked for; one request may ask for {most}", code="too_many_replies"
            )
        if self._unended + count > most:
            wait = str(self._seconds_until(count))
            raise ApiError(
                429,
                f"{self._unended} replies are in progress or wait, and {most} may; try again in {wait} s",
                code="queue_full",
                headers={"retry-after": wait},
            )
        self._unended += count
        self._open.add(order)
        self._inbox.put(("order", order))

    def close(self, order: Order, reason: Reason) -> None:
        """Give an order up. Its slots are free once the thread is through with the step it is in."""
        if order in self._open and not order.closed:
            order.closed = True
            order.events.put_nowait(Closed(reason))
            self._inbox.put(("close", order))

    def close_all(self, reason: Reason) -> None:
        """Give everything up."""
        for order in list(self._open):
            self.close(order, reason)

    def _seconds_until(self, count: int) -> int:
        """Return a guess of when there is room for more replies, in whole seconds: by how often some ended lately."""
        since = time.monotonic() - self._ends[0] if self._ends else 1.0
        return max(1, min(60, math.ceil(count * since / max(len(self._ends), 1))))

    def _deliver(self, out: list[tuple[Order, Event | None]]) -> None:
        """Pass events on. None says that one reply of an order that was given up is over."""
        for order, event in out:
            ended = 0
            if event is None or (isinstance(event, Wrote) and event.completion is not None):
                ended = 1
            elif isinstance(event, Failed):
                ended = order.left
            if ended:
                self._ends.append(time.monotonic())
            order.left -= ended
            self._unended -= ended
            if order.left == 0:
                self._open.discard(order)
            if event is not None and not order.closed:
                order.events.put_nowait(event)

    # What the thread does.

    def _run(self) -> None:
        going = True
        while going:
            try:
                going = self._take_in()
                while self._scheduler.room > 0 and len(self._line):
                    order, stream = self._line.pop()
                    self._scheduler.add(stream)
                    self._out.append((order, Started(time.monotonic())))
                if going and not self._scheduler.idle:
                    for stream in self._scheduler.step():
                        self._report(stream)
            except Exception as error:
                self._broken(error)
            self._send()

    def _take_in(self) -> bool:
        """Empty the inbox; wait for something to come when there is nothing else to do. False when it is over."""
        while True:
            wait = self._scheduler.idle and not len(self._line) and not self._out
            try:
                what, order = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if order is None:
                return False
            (self._begin if what == "order" else self._give_up)(order)

    def _begin(self, order: Order) -> None:
        """Read an order's prompts and put its replies in line; all of them or none."""
        try:
            streams: list[Generation] = []
            before: Task | None = None
            for task in order.tasks:
                # Several replies to one prompt follow each other, and it is read once.
                if before is None or task.prompt is not before.prompt:
                    prompts = order.ensemble.prompts(task.prompt, task.settings)
                before = task
                streams.append(order.ensemble.writer(task.settings).stream(prompts))
        except Exception as error:
            if not isinstance(error, MixlmError):
                _log.exception("a request could not be prepared")
            self._out.append((order, Failed(error)))
            return
        self._out.append((order, Begun(time.monotonic())))
        for index, stream in enumerate(streams):
            self._places[stream] = Place(order, index, [0] * len(stream.sessions))
            self._line.push(order.client, (order, stream))

    def _give_up(self, order: Order) -> None:
        self._line.remove(lambda item: item[0] is order)
        for stream in [one for one, place in self._places.items() if place.order is order]:
            del self._places[stream]
            self._scheduler.cancel(stream)
            self._out.append((order, None))

    def _report(self, stream: Generation) -> None:
        """Pass on what a reply has got."""
        place = self._places.get(stream)
        if place is None:
            return
        order, index = place.order, place.index
        tokens = list(stream.ready)
        stream.ready.clear()
        if stream.error is not None:
            self._fail(order, stream.error)
        elif stream.finished:
            del self._places[stream]
            self._out.append((order, Wrote(index, tokens, self._forwards(stream, place), stream.completion)))
        elif tokens:
            self._out.append((order, Wrote(index, tokens, self._forwards(stream, place))))

    def _forwards(self, stream: Generation, place: Place) -> dict[str, list[int]]:
        """Return the tokens of each pass that members ran for a reply since this was last asked."""
        new = {}
        for at, (member, session) in enumerate(zip(stream.members, stream.sessions, strict=True)):
            log = session.stats.forwards
            if len(log) > place.forwards[at]:
                new[member.name] = [one.tokens for one in log[place.forwards[at] :]]
                place.forwards[at] = len(log)
        return new

    def _fail(self, order: Order, error: BaseException) -> None:
        """End a whole order: its other replies are of no use to anyone."""
        self._line.remove(lambda item: item[0] is order)
        for stream in [one for one, place in self._places.items() if place.order is order]:
            del self._places[stream]
            self._scheduler.cancel(stream)
        self._out.append((order, Failed(error)))

    def _broken(self, error: Exception) -> None:
        """Something unexpected: what was in progress is lost, and a new scheduler takes what comes."""
        _log.error("a step failed", exc_info=error)
        lost = {place.order for place in self._places.values()}
        self._scheduler, self._line, self._places = Scheduler(self._limits.at_once), Line(), {}
        self._out += [(order, Failed(error)) for order in lost]

    def _send(self) -> None:
        if self._out and self._loop is not None:
            out, self._out = self._out, []
            with suppress(RuntimeError):  # the loop has ended: nobody reads this any more
                self._loop.call_soon_threadsafe(self._deliver, out)
