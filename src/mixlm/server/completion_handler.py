"""Handles one request for completions, from its job to the end of the response.

Generation never waits for the reader: while a client reads slowly, tokens collect here, and it holds no slot. A client
that disconnects is noticed at once, whatever the response is waiting for.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from starlette.types import Message, Receive, Scope, Send

from mixlm.server.api_errors import ApiError, to_api_error
from mixlm.server.completions_format import CompletionsFormat, finish_reason, summed_usage
from mixlm.server.limits import ServerLimits
from mixlm.server.metrics import ServerMetrics
from mixlm.server.model_thread import (
    GenerationStarted,
    Job,
    JobCancelled,
    JobEvent,
    JobFailed,
    JobQueued,
    ModelThread,
    TokensGenerated,
)
from mixlm.server.preparation import RequestPreparer
from mixlm.server.request_parsing import ParsedRequest
from mixlm.server.request_record import RequestRecord
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


@dataclass(eq=False)
class CompletionHandler:
    """An ASGI application that answers one request; it completes the record of the request as events arrive."""

    request: ParsedRequest
    responses: CompletionsFormat
    model_thread: ModelThread
    preparer: RequestPreparer
    metrics: ServerMetrics
    limits: ServerLimits
    record: RequestRecord

    def __post_init__(self) -> None:
        self._job = Job(self.record.client, self.request.num_completions)
        self._completions: dict[int, Completion] = {}
        self._work: Counter[tuple[str, str]] = Counter()
        self._prefilled: set[tuple[int, str]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request. Raises ApiError or MixlmError as long as nothing has been sent."""
        self.record.model = self.request.model.name
        self.record.completions = self.request.num_completions
        self.model_thread.admit(self._job)
        cancel = partial(self.model_thread.cancel, self._job)  # does nothing to a job that has ended
        seconds = self.limits.request_timeout - (time.monotonic() - self.record.arrived)
        timer = asyncio.get_running_loop().call_later(seconds, cancel, "timeout")
        tasks = [asyncio.create_task(self._prepare()), asyncio.create_task(self._watch_for_disconnect(receive))]
        try:
            await (self._send_stream(send) if self.request.stream else self._send_whole(send))
        except ClientGoneError:
            self._record_cancelled(JobCancelled("gone"))
        finally:
            timer.cancel()
            for task in tasks:
                task.cancel()
            cancel("gone")
            self._record_work()
            await asyncio.wait(tasks)

    async def _prepare(self) -> None:
        """Hand the generations to the model thread; errors become an event of the job."""
        job = self._job
        try:
            generations = await self.preparer.prepare(self.request, job.client, lambda: job.cancelled)
        except Exception as error:
            self.model_thread.fail(job, error)
        else:
            self.model_thread.start_job(job, generations)

    async def _watch_for_disconnect(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.model_thread.cancel(self._job, "gone")

    @property
    def _is_finished(self) -> bool:
        return len(self._completions) == self.request.num_completions

    @property
    def _in_order(self) -> list[Completion]:
        return [self._completions[i] for i in range(self.request.num_completions)]

    async def _send_whole(self, send: Send) -> None:
        while not self._is_finished:
            self._process(await self._job.events.get())
        completions = self._in_order
        body = await self._build(completions, lambda: self.responses.response(completions))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self._send(send, {"type": "http.response.start", "status": 200, "headers": headers})
        await self._send(send, {"type": "http.response.body", "body": body})

    async def _send_stream(self, send: Send) -> None:
        self._process(await self._job.events.get())  # queued; an error here still becomes a response of its own
        await self._send(send, {"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        chunks = self.responses.first_chunks()
        try:
            while True:
                await self._send_chunks(send, chunks)
                if self._is_finished:
                    break
                chunks = await self._next_chunks()
            completions = self._in_order
            chunks = await self._build(completions, lambda: self.responses.last_chunks(completions))
        except ClientGoneError:
            raise
        except Exception as error:
            # The status has been sent, so the error is an event.
            api_error = to_api_error(error, self.record.request_id)
            api_error.rename(self.record.field_names)
            self.metrics.count_error(api_error.status, api_error.code)
            self.record.error = api_error.code
            chunks = self.responses.error_chunks(api_error)
        await self._send_chunks(send, chunks)
        await self._send(send, {"type": "http.response.body", "body": b""})

    async def _build(self, completions: Sequence[Completion], build: Callable[[], Result]) -> Result:
        """Return what a function builds of whole completions; where that is large, beside the event loop."""
        entries = sum(len(completion.tokens) + len(completion.prompt) for completion in completions)
        size = _ENTRY_BYTES * entries * (1 + self.request.settings.top_logprobs)
        return await self.preparer.convert(size, build, self.record.client)

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
        forwards = {member: len(passes) for member, passes in event.forwards.items()}
        chunks: list[bytes] = []
        for token in event.tokens:
            chunks += self.responses.token_chunks(event.index, token, forwards)
            forwards = {}  # tokens that arrive together come from the same forward passes; the first one reports them
        if event.completion is not None:
            build = partial(self.responses.final_chunks, event.index, event.completion, forwards)
            chunks += await self._build([event.completion], build)
        return chunks

    def _process(self, event: JobEvent) -> None:
        """Record an event. Raises the error that ends the response."""
        match event:
            case JobQueued():
                self.record.prepared = event.time
            case GenerationStarted():
                waited = event.time - (self.record.prepared or event.time)
                self.metrics.queue_seconds.labels(self.request.model.name).observe(waited)
                if self.record.started is None:
                    self.record.started = event.time
            case JobFailed():
                raise event.error
            case JobCancelled():
                raise self._record_cancelled(event)
            case TokensGenerated():
                self._record_tokens(event)

    def _record_tokens(self, event: TokensGenerated) -> None:
        model = self.request.model.name
        if self.record.first_token is None and (event.tokens or event.completion):
            self.record.first_token = time.monotonic()
            self.metrics.first_token_seconds.labels(model).observe(self.record.first_token - self.record.arrived)
        self.metrics.count_tokens(model, event.tokens)
        self._work.update(("tokens", token.member) for token in event.tokens)
        for member, passes in event.forwards.items():
            self._work["forwards", member] += len(passes)
            self._work["forward_tokens", member] += sum(passes)
            prefilled = (event.index, member) in self._prefilled
            self._prefilled.add((event.index, member))
            self.metrics.count_forwards(model, member, passes, prefilled=prefilled)
        if event.completion is not None:
            self._completions[event.index] = event.completion
            self.metrics.count_completion(model, event.completion)

    def _record_cancelled(self, event: JobCancelled) -> Exception:
        """Record once why the job was cancelled; return the error for the client."""
        if self.record.cancelled is None:
            self.record.cancelled = event.reason
            self.metrics.cancelled.labels(event.reason).inc()
        if event.reason == "timeout":
            return ApiError(504, f"the request took longer than {self.limits.request_timeout:g} s", code="timeout")
        if event.reason == "shutdown":
            return ApiError(503, "the server stopped before the completion was finished", code="stopping")
        return ClientGoneError()

    def _record_work(self) -> None:
        """Complete the record, for the log and the trace: settings and numbers, no prompts and no generated text."""
        request, record, completions = self.request, self.record, list(self._completions.values())
        usage, members = summed_usage(completions, request.n), request.ensemble.names
        work = {
            quantity: [self._work[quantity, member] for member in members]
            for quantity in ("tokens", "forwards", "forward_tokens")
        }
        record.tokens, record.finished = sum(work["tokens"]), len(completions)
        record.trace_attributes = {
            "gen_ai.operation.name": "chat" if request.kind == "chat" else "text_completion",
            "gen_ai.request.model": request.model.name,
            "gen_ai.response.id": self.responses.response_id,
            "gen_ai.response.finish_reasons": [finish_reason(completion) for completion in completions],
            "gen_ai.usage.input_tokens": usage["prompt_tokens"],
            "gen_ai.usage.output_tokens": record.tokens,
            "mixlm.method": request.settings.method,
            "mixlm.unit": request.ensemble.unit.name,
            "mixlm.completions": request.num_completions,
            "mixlm.replies": request.num_completions,
            "mixlm.stream": request.stream,
            "mixlm.members": list(members),
            **{f"mixlm.member.{quantity}": counts for quantity, counts in work.items()},
            "mixlm.draft_tokens.drafted": usage["mixlm"]["drafted"],
            "mixlm.draft_tokens.accepted": usage["mixlm"]["accepted"],
            "mixlm.guesses.checked": usage["mixlm"]["drafted"],
            "mixlm.guesses.accepted": usage["mixlm"]["accepted"],
            **({"mixlm.cancelled": record.cancelled, "mixlm.closed": record.cancelled} if record.cancelled else {}),
        }

    async def _send_chunks(self, send: Send, chunks: list[bytes]) -> None:
        if chunks:
            await self._send(send, {"type": "http.response.body", "body": b"".join(chunks), "more_body": True})

    async def _send(self, send: Send, message: Message) -> None:
        """Send a message. Raises ClientGoneError for a client that does not take it in time."""
        try:
            async with asyncio.timeout(self.limits.send_timeout):
                await send(message)
        except TimeoutError:
            raise ClientGoneError from None
