"""Sends requests to engines: all that is requested of an engine at one moment goes to it in one call.

Engines on devices of their own run at the same time. On one device they would only share it, so they run in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, TypeVar

from mixlm.engines.base import Engine, Session
from mixlm.engines.requests import Request, Response, to_response
from mixlm.errors import EngineError, MemoryLimitError, MixlmError

_MAX_THREADS = 32

T = TypeVar("T")
# Yields requests, is sent their responses in the same order, returns a result.
RequestFlow = Generator[list[Request], list[Response], T]


class MemberError(EngineError):
    """A member's engine failed. member: its index."""

    def __init__(self, member: int, error: EngineError) -> None:
        super().__init__(error.message, error.hint)
        self.member = member
        self.__cause__ = error


class EngineRequest(NamedTuple):
    """A request, with the engine and the session that respond to it."""

    engine: Engine
    session: Session
    request: Request


class Dispatcher:
    """Sends requests to engines. It starts its threads when engines on several devices are called."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def respond(self, requests: Sequence[EngineRequest]) -> list[Response]:
        """Return the response of each request, in order. Raises MemberError for the first engine that failed."""
        batches: dict[int, list[int]] = {}
        for index, request in enumerate(requests):
            batches.setdefault(request.engine.batch_key, []).append(index)
        calls = [[requests[index] for index in indices] for indices in batches.values()]
        if len(calls) > 1 and len({call[0].engine.device for call in calls}) == len(calls):
            futures = [self._threads.submit(_respond, call) for call in calls]
            wait(futures)  # where one fails, the others still work on their sessions
            results = [future.result() for future in futures]
        else:
            results = [_respond(call) for call in calls]
        responses: list[Response] = [None] * len(requests)
        for indices, batch in zip(batches.values(), results, strict=True):
            for index, response in zip(indices, batch, strict=True):
                responses[index] = response
        return responses

    def begin(self, requests: Sequence[EngineRequest], *, in_thread: bool) -> Future[Any]:
        """Begin a call to the engine of these requests; one request for an asynchronous engine.

        `responses_of` reads its result. in_thread: return at once; otherwise the call is over when this returns.
        """
        engine = requests[0].engine
        if engine.asynchronous:
            return _submit(requests[0])
        if in_thread:
            return self._threads.submit(_respond_each, requests)
        done: Future[list[Response | MixlmError]] = Future()
        done.set_result(_respond_each(requests))
        return done

    @property
    def _threads(self) -> ThreadPoolExecutor:
        # They live as long as the dispatcher: starting them for each token would cost more than they save.
        self._pool = self._pool or ThreadPoolExecutor(_MAX_THREADS)
        return self._pool


def responses_of(requests: Sequence[EngineRequest], call: Future[Any]) -> list[Response | MixlmError]:
    """Return the response or the error of each request of a call that is over."""
    if not requests[0].engine.asynchronous:
        return list(call.result())
    try:
        return [to_response(requests[0].request, call.result())]
    except Exception as error:
        return [to_mixlm_error(error)]


class UnexpectedEngineError(EngineError):
    """An engine failed with an error that is not one of mixlm's; its message is of the cause, which it keeps."""


def to_mixlm_error(error: Exception) -> MixlmError:
    """Return the error itself if it is one of mixlm's, else one that it is the cause of."""
    if isinstance(error, MixlmError):
        return error
    if isinstance(error, MemoryError):
        wrapped: MixlmError = MemoryLimitError("there is too little memory", "use smaller members")
    else:
        lines = str(error).strip().splitlines()
        wrapped = UnexpectedEngineError(f"unexpected {type(error).__name__}" + (f": {lines[0]}" if lines else ""))
    wrapped.__cause__ = error
    return wrapped


def _call(requests: Sequence[EngineRequest]) -> list[Response]:
    for engine, _, request in requests:
        engine.vocabulary.check_rows(request.ids, engine.name)
    return requests[0].engine.respond([(session, request) for _, session, request in requests])


def _submit(request: EngineRequest) -> Future[Any]:
    """Start a request of an asynchronous engine; what is raised here is in the future."""
    try:
        request.engine.vocabulary.check_rows(request.request.ids, request.engine.name)
        return request.engine.submit(request.session, request.request)
    except Exception as error:
        failed: Future[Any] = Future()
        failed.set_exception(error)
        return failed


def _respond(requests: Sequence[EngineRequest]) -> list[Response]:
    try:
        return _call(requests)
    except Exception as raised:
        error = to_mixlm_error(raised)
        if isinstance(error, EngineError):
            raise MemberError(requests[0].request.member, error) from error
        raise error from error.__cause__


def _respond_each(requests: Sequence[EngineRequest]) -> list[Response | MixlmError]:
    """Respond to all in one call; where it fails, to each by itself: one sequence's error is not the others'."""
    try:
        return _call(requests)
    except Exception as error:
        if len(requests) == 1:
            return [to_mixlm_error(error)]
    return [response for request in requests for response in _respond_each([request])]


def drive(flow: RequestFlow[T], respond: Callable[[list[Request]], list[Response]]) -> T:
    """Run a flow to its end. respond: returns the responses to requests, in order."""
    try:
        requests = next(flow)
        while True:
            requests = flow.send(respond(requests))
    except StopIteration as stop:
        result: T = stop.value
        return result
