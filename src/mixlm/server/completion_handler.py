"""Handles one request for completions, from its job to the end of the response.

Generation never waits for the reader: while a client reads slowly, tokens collect here, and it holds no slot. A client
that disconnects is noticed at once, whatever the response is waiting for.

The server-sent events are written here, without a library for them: they are one line each, and such a library would
neither watch for the disconnect nor limit the time of a send.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

from starlette.types import Message, Receive, Scope, Send

from mixlm.server.api_errors import ApiError, to_api_error
from mixlm.server.completions_format import trace_attributes
from mixlm.server.jobs import GenerationStarted, Job, JobCancelled, JobEvent, JobFailed, JobQueued, TokensGenerated
from mixlm.server.limits import ServerLimits
from mixlm.server.metrics import ServerMetrics
from mixlm.server.model_thread import ModelThread
from mixlm.server.preparation import RequestPreparer
from mixlm.server.request_parsing import ParsedRequest
from mixlm.server.request_record import RequestRecord
from mixlm.server.response_format import ResponseFormat
from mixlm.types import Completion

Result = TypeVar("Result")
# After this many seconds without an event, a comment keeps the connection of a stream open, through proxies too.
_KEEP_ALIVE_SECONDS = 15.0
_ENTRY_BYTES = 50  # about what a token, or one of its most likely ones, takes in a response
_MAX_EVENT_TOKENS = 32  # of a stream, in one step of the event loop
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class ClientGoneError(Exception):
    """The client disconnected, or does not take what is sent."""


class CompletionHandler:
    """An ASGI application that answers one request; it completes the record of the request as events arrive."""

    def __init__(  # noqa: PLR0913, PLR0917 - the parts of a server
        self,
        request: ParsedRequest,
        responses: ResponseFormat,
        model_thread: ModelThread,
        preparer: RequestPreparer,
        metrics: ServerMetrics,
        limits: ServerLimits,
        record: RequestRecord,
    ) -> None:
        self._request = request
        self._model_thread = model_thread
        self._preparer = preparer
        self._metrics = metrics
        self._limits = limits
        self._record = record
        self._job = Job(record.client, len(request.tasks))
        self._responses = responses
        self._completions: dict[int, Completion] = {}
        self._work: Counter[tuple[str, str]] = Counter()
        self._prefilled: set[tuple[int, str]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request. Raises ApiError or MixlmError as long as nothing has been sent."""
        self._record.model = self._request.model.name
        self._record.completions = len(self._request.tasks)
        self._model_thread.admit(self._job)
        preparation = asyncio.create_task(self._prepare())
        try:
            async with self._cancelled_when_over(receive):
                await (self._send_stream(send) if self._request.stream else self._send_whole(send))
        except ClientGoneError:
            self._record_cancelled(JobCancelled("gone"))
        finally:
            preparation.cancel()
            self._model_thread.cancel(self._job, "gone")  # does nothing to a job that has ended
            self._record_work()

    async def _prepare(self) -> None:
        """Hand the generations to the model thread; errors become an event of the job."""
        job = self._job
        try:
            generations = await self._preparer.prepare(self._request, job.client, lambda: job.cancelled)
        except Exception as error:
            self._model_thread.fail(job, error)
        else:
            self._model_thread.start_job(job, generations)

    @asynccontextmanager
    async def _cancelled_when_over(self, receive: Receive) -> AsyncIterator[None]:
        """Cancel the job when the client disconnects, or when the request takes too long."""
        seconds = self._limits.request_timeout - (time.monotonic() - self._record.arrived)
        timer = asyncio.get_running_loop().call_later(seconds, self._model_thread.cancel, self._job, "timeout")
        watcher = asyncio.create_task(self._watch_for_disconnect(receive))
        try:
            yield
        finally:
            timer.cancel()
            watcher.cancel()
            with suppress(asyncio.CancelledError):
                await watcher

    async def _watch_for_disconnect(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._model_thread.cancel(self._job, "gone")

    @property
    def _is_finished(self) -> bool:
        return len(self._completions) == len(self._request.tasks)

    @property
    def _in_order(self) -> list[Completion]:
        return [self._completions[i] for i in range(len(self._request.tasks))]

    async def _send_whole(self, send: Send) -> None:
        while not self._is_finished:
            self._process(await self._job.events.get())
        completions = self._in_order
        body = await self._build(completions, lambda: self._responses.response(completions))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self._send(send, {"type": "http.response.start", "status": 200, "headers": headers})
        await self._send(send, {"type": "http.response.body", "body": body})

    async def _send_stream(self, send: Send) -> None:
        self._process(await self._job.events.get())  # queued; an error here still becomes a response of its own
        await self._send(send, {"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        chunks = self._responses.first_chunks()
        try:
            while True:
                await self._send_chunks(send, chunks)
                if self._is_finished:
                    break
                chunks = await self._next_chunks()
            completions = self._in_order
            chunks = await self._build(completions, lambda: self._responses.last_chunks(completions))
        except ClientGoneError:
            raise
        except Exception as error:
            # The status has been sent, so the error is an event.
            api_error = to_api_error(error)
            self._metrics.count_error(api_error.status, api_error.code)
            self._record.error = api_error.code
            chunks = self._responses.error_chunks(api_error)
        await self._send_chunks(send, chunks)
        await self._send(send, {"type": "http.response.body", "body": b""})

    async def _build(self, completions: Sequence[Completion], build: Callable[[], Result]) -> Result:
        """Return what a function builds of whole completions; where that is large, beside the event loop."""
        entries = sum(len(completion.tokens) + len(completion.prompt) for completion in completions)
        size = _ENTRY_BYTES * entries * (1 + self._request.top_logprobs)
        return await self._preparer.convert(size, build, self._record.client)

    async def _next_chunks(self) -> list[bytes]:
        """Wait for an event; return the chunks of the events that have arrived by then, of many the first ones."""
        events, tokens = self._job.events, 0
        chunks: list[bytes] = []
        await asyncio.sleep(0)  # others have their turn, also where events wait and the client takes all at once
        try:
            async with asyncio.timeout(_KEEP_ALIVE_SECONDS):
                event = await events.get()
        except TimeoutError:
            return [b": keep-alive\n\n"]
        while True:
            chunks += await self._chunks(event)
            tokens += len(event.tokens) if isinstance(event, TokensGenerated) else 0
            if events.empty() or tokens >= _MAX_EVENT_TOKENS:
                return chunks
            event = events.get_nowait()

    async def _chunks(self, event: JobEvent) -> list[bytes]:
        self._process(event)
        if not isinstance(event, TokensGenerated):
            return []
        # Tokens that arrive together come from the same forward passes; the first one reports them.
        chunks: list[bytes] = []
        for i, token in enumerate(event.tokens):
            chunks += self._responses.token_chunks(event.index, token, {} if i else event.forwards)
        completion = event.completion
        if completion is not None:
            forwards = {} if event.tokens else event.forwards
            chunks += await self._build(
                [completion], lambda: self._responses.final_chunks(event.index, completion, forwards)
            )
        return chunks

    def _process(self, event: JobEvent) -> None:
        """Record an event. Raises the error that ends the response."""
        match event:
            case JobQueued():
                self._record.prepared = event.time
            case GenerationStarted():
                queued = self._record.prepared
                self._metrics.observe_queue_time(
                    self._request.model.name, event.time - (event.time if queued is None else queued)
                )
                if self._record.started is None:
                    self._record.started = event.time
            case JobFailed():
                raise event.error
            case JobCancelled():
                raise self._record_cancelled(event)
            case TokensGenerated():
                self._record_tokens(event)

    def _record_tokens(self, event: TokensGenerated) -> None:
        model = self._request.model.name
        if self._record.first_token is None and (event.tokens or event.completion):
            self._record.first_token = time.monotonic()
            self._metrics.observe_first_token(model, self._record.first_token - self._record.arrived)
        self._metrics.count_tokens(model, event.tokens)
        self._work.update(("tokens", token.member) for token in event.tokens)
        for member, passes in event.forwards.items():
            self._work["forwards", member] += len(passes)
            self._work["forward_tokens", member] += sum(passes)
            prefilled = (event.index, member) in self._prefilled
            self._prefilled.add((event.index, member))
            self._metrics.count_forwards(model, member, passes, prefilled=prefilled)
        if event.completion is not None:
            self._completions[event.index] = event.completion
            self._metrics.count_completion(model, event.completion)

    def _record_cancelled(self, event: JobCancelled) -> Exception:
        """Record once why the job was cancelled; return the error for the client."""
        if self._record.cancelled is None:
            self._record.cancelled = event.reason
            self._metrics.count_cancelled(event.reason)
        if event.reason == "timeout":
            return ApiError(504, f"the request took longer than {self._limits.request_timeout:g} s", code="timeout")
        if event.reason == "shutdown":
            return ApiError(503, "the server stopped before the completion was finished", code="stopping")
        return ClientGoneError()

    def _record_work(self) -> None:
        completions = list(self._completions.values())
        self._record.tokens = sum(count for (quantity, _), count in self._work.items() if quantity == "tokens")
        self._record.finished = len(completions)
        self._record.trace_attributes = trace_attributes(
            self._request, self._responses.response_id, completions, self._work, self._record.cancelled
        )

    async def _send_chunks(self, send: Send, chunks: list[bytes]) -> None:
        if chunks:
            await self._send(send, {"type": "http.response.body", "body": b"".join(chunks), "more_body": True})

    async def _send(self, send: Send, message: Message) -> None:
        """Send a message. Raises ClientGoneError for a client that does not take it in time."""
        try:
            async with asyncio.timeout(self._limits.send_timeout):
                await send(message)
        except TimeoutError:
            raise ClientGoneError from None
