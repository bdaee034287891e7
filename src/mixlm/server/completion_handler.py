"""One request, from the order it becomes to the end of its response.

Writing a reply never waits for its reader: tokens collect here while a slow client takes them, so that it holds no
slot. A client that goes away is noticed at once, whatever the response is doing.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from mixlm.server.api_errors import ApiError, of_error
from mixlm.server.jobs import Begun, Closed, Event, Failed, Order, Started, Wrote
from mixlm.server.limits import Limits
from mixlm.server.metrics import Metrics
from mixlm.server.model_thread import Worker
from mixlm.server.request_parsing import Asked
from mixlm.server.responses import DONE, Answer, as_json, event
from mixlm.server.tracing import Steps
from mixlm.types import Completion

# A client that reads nothing for this long is told that the response is still coming; so is every proxy in between.
_SILENCE = 15.0
_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class GoneError(Exception):
    """The client went away, or takes nothing of what is sent."""


class Exchange:
    """Answers one request. note: what the log is to say about it; filled in as it becomes known.

    arrived: when the request came, on the clock of `time.monotonic`.
    """

    def __init__(self, asked: Asked, worker: Worker, metrics: Metrics, limits: Limits, note: dict[str, Any]) -> None:
        self._asked = asked
        self._worker = worker
        self._metrics = metrics
        self._limits = limits
        self._note = note
        self._order = Order(note["client"], asked.ensemble, asked.tasks)
        self._answer = Answer(asked, note["request"])
        self._done: dict[int, Completion] = {}
        self._steps = Steps()
        self._work: Counter[tuple[str, str]] = Counter()
        self._begun: set[tuple[int, str]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run as an ASGI application. Raises ApiError or MixlmError as long as nothing has been sent."""
        self._note |= {"model": self._asked.served.name, "replies": len(self._asked.tasks), "steps": self._steps}
        self._worker.submit(self._order)
        try:
            async with self._watched(receive):
                await (self._streamed(send) if self._asked.stream else self._at_once(send))
        except GoneError:
            self._worker.close(self._order, "gone")
            self._closed(Closed("gone"))
        finally:
            self._worker.close(self._order, "gone")  # where something above failed; nothing otherwise
            self._figures()

    @asynccontextmanager
    async def _watched(self, receive: Receive) -> AsyncIterator[None]:
        """Give the order up when the client goes away or its time is over."""
        left = self._limits.timeout - (time.monotonic() - self._note["arrived"])
        timer = asyncio.get_running_loop().call_later(left, self._worker.close, self._order, "timeout")
        watcher = asyncio.create_task(self._wait_for_end(receive))
        try:
            yield
        finally:
            timer.cancel()
            watcher.cancel()
            with suppress(asyncio.CancelledError):
                await watcher

    async def _wait_for_end(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._worker.close(self._order, "gone")

    async def _at_once(self, send: Send) -> None:
        while len(self._done) < len(self._asked.tasks):
            self._take(await self._order.events.get())
        whole = self._answer.whole([self._done[i] for i in range(len(self._done))])
        body = as_json(whole)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self._send(send, {"type": "http.response.start", "status": 200, "headers": headers})
        await self._send(send, {"type": "http.response.body", "body": body})

    async def _streamed(self, send: Send) -> None:
        self._take(await self._order.events.get())  # that it has begun; a problem becomes a response of its own
        await self._send(send, {"type": "http.response.start", "status": 200, "headers": _STREAM})
        parts = self._answer.first()
        try:
            while True:
                await self._part(send, b"".join(parts))
                if len(self._done) == len(self._asked.tasks):
                    break
                parts = await self._next()
        except GoneError:
            raise
        except Exception as error:
            # The status has been sent: what happened can only be an event.
            problem = of_error(error)
            self._metrics.problem(problem.status, problem.code)
            self._note["error"] = problem.code
            await self._part(send, event(problem.body()) + DONE)
        else:
            totals = [self._answer.totals([self._done[i] for i in range(len(self._done))])]
            await self._part(send, b"".join([*(totals if self._asked.include_usage else ()), DONE]))
        await self._send(send, {"type": "http.response.body", "body": b""})

    async def _next(self) -> list[bytes]:
        """Wait for what comes, and return the parts of everything that has come by then."""
        events = self._order.events
        try:
            async with asyncio.timeout(_SILENCE):
                parts = self._parts(await events.get())
        except TimeoutError:
            return [b": still here\n\n"]
        while not events.empty():
            parts += self._parts(events.get_nowait())
        return parts

    def _parts(self, event: Event) -> list[bytes]:
        self._take(event)
        if not isinstance(event, Wrote):
            return []
        # Several tokens that come at once were found by the same passes.
        parts = [
            self._answer.token(event.index, one, {} if i else event.forwards) for i, one in enumerate(event.tokens)
        ]
        if event.completion is not None:
            parts.append(self._answer.last(event.index, event.completion, {} if parts else event.forwards))
        return parts

    def _take(self, event: Event) -> None:
        """Take down what an event says. Raises what ends the response."""
        if isinstance(event, Begun):
            self._steps.prepared = event.at
            return
        if isinstance(event, Started):
            self._started(event.at)
            return
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Closed):
            raise self._closed(event)
        name = self._asked.served.name
        if self._steps.first is None and (event.tokens or event.completion):
            self._steps.first = time.monotonic()
            self._note["first"] = round(self._steps.first - self._note["arrived"], 4)
            self._metrics.first(name, self._note["first"])
        self._metrics.wrote(name, event.tokens)
        self._ran(event)
        self._work.update(("tokens", one.member) for one in event.tokens)
        if event.completion is not None:
            self._done[event.index] = event.completion
            self._metrics.finished(name, event.completion)

    def _ran(self, event: Wrote) -> None:
        """Count forward passes; a member's first for a reply reads the prompt."""
        for member, tokens in event.forwards.items():
            self._work["forwards", member] += len(tokens)
            self._work["forward_tokens", member] += sum(tokens)
            begun = (event.index, member) in self._begun
            self._begun.add((event.index, member))
            self._metrics.ran(self._asked.served.name, member, tokens, begun=begun)

    def _started(self, at: float) -> None:
        """Take down how long a reply waited for its turn; the log says it of a request's first."""
        waited = at - (self._steps.prepared or at)
        self._metrics.queued(self._asked.served.name, waited)
        if self._steps.started is None:
            self._steps.started = at
            self._note["queued"] = round(waited, 4)

    def _closed(self, event: Closed) -> Exception:
        """Note why the order was given up, once, and return what that is to the client."""
        if "closed" not in self._note:
            self._note["closed"] = event.reason
            self._metrics.closed(event.reason)
        if event.reason == "timeout":
            return ApiError(504, f"the reply took longer than {self._limits.timeout:g} s", code="timeout")
        if event.reason == "shutdown":
            return ApiError(503, "the server stopped before the reply was finished", code="stopping")
        return GoneError()

    def _figures(self) -> None:
        done = list(self._done.values())
        self._note["tokens"] = sum(count for (what, _), count in self._work.items() if what == "tokens")
        self._note["finished"] = len(done)
        self._steps.attributes = self._answer.attributes(done, self._work, self._note.get("closed"))

    async def _part(self, send: Send, data: bytes) -> None:
        if data:
            await self._send(send, {"type": "http.response.body", "body": data, "more_body": True})

    async def _send(self, send: Send, message: Message) -> None:
        """Send, and give up on a client that takes nothing."""
        try:
            async with asyncio.timeout(self._limits.send):
                await send(message)
        except TimeoutError:
            raise GoneError from None
