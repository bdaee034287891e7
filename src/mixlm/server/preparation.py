"""What a request needs before its generations can be queued: its body, its schema compiled, and its prompts encoded.

All take time that a client determines, and so does building a whole response. So they run in threads of their own,
within limits, and neither on the event loop nor in the thread of the models.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from mixlm.choices import UnitName
from mixlm.core.grammar_check import CompileLimits
from mixlm.errors import MixlmError, PromptTooLongError, TemplateError, TokenizerError
from mixlm.generation.generation import Generation
from mixlm.server.api_errors import ApiError, to_api_error
from mixlm.server.fair_queue import FairQueue
from mixlm.server.limits import ServerLimits
from mixlm.server.model_registry import ServedModel
from mixlm.server.request_parsing import ParsedRequest

Result = TypeVar("Result")
_NUM_THREADS = 2
# A body of more bytes may take the event loop longer than others should wait: up to half a second for 1 MiB.
_LARGE_BODY = 1 << 15


class FairThreads:
    """Runs blocking functions in a few threads; clients take turns. All methods belong to the event loop.

    The threads are daemons. Unlike those of `asyncio.to_thread`, they do not delay the end of the process.
    """

    def __init__(self) -> None:
        self._num_free = _NUM_THREADS
        self._queue: FairQueue[tuple[Callable[[], Any], float | None, asyncio.Future[Any]]] = FairQueue()

    @property
    def is_busy(self) -> bool:
        """Whether any function runs."""
        return self._num_free < _NUM_THREADS

    async def run(self, client: str, function: Callable[[], Result], *, timeout: float | None = None) -> Result:
        """Return a function's result. Raises TimeoutError if the call, without the time in the queue, takes too long.

        A function cannot be interrupted: after a timeout or a cancellation it keeps its thread until it returns. It is
        not called at all if it was cancelled in the queue.
        """
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._queue.push(client, (function, timeout, future))
        self._start_threads()
        try:
            return await future
        finally:
            self._queue.remove(lambda item: item[2] is future)

    def _start_threads(self) -> None:
        while self._num_free and len(self._queue):
            function, timeout, future = self._queue.pop()
            self._num_free -= 1
            if timeout is not None:
                future.get_loop().call_later(timeout, _set_outcome, future, None, TimeoutError())
            threading.Thread(target=self._call, args=(function, future), name="mixlm-prepare", daemon=True).start()

    def _call(self, function: Callable[[], Any], future: asyncio.Future[Any]) -> None:
        result, error = None, None
        try:
            result = function()
        except Exception as exception:
            error = exception
        except BaseException as panic:  # of a library in Rust: without this the thread would count as busy for ever
            error = RuntimeError(f"a panic: {panic}")
            error.__cause__ = panic
        with suppress(RuntimeError):  # the event loop has ended
            future.get_loop().call_soon_threadsafe(self._finish, future, result, error)

    def _finish(self, future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
        self._num_free += 1
        _set_outcome(future, result, error)
        self._start_threads()


def _set_outcome(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)


class RequestPreparer:
    """Prepares requests; clients take turns. Schemas have threads of their own: prompts do not wait for them."""

    def __init__(self, limits: ServerLimits) -> None:
        self._limits = limits
        self._schema_threads = FairThreads()
        self._prompt_threads = FairThreads()
        self._body_threads = FairThreads()

    @property
    def is_busy(self) -> bool:
        """Whether any of the threads runs."""
        return any(threads.is_busy for threads in (self._schema_threads, self._prompt_threads, self._body_threads))

    async def convert(self, size: int, function: Callable[[], Result], client: str) -> Result:
        """Return what a function makes of a request's body, or of a response. Large ones, by bytes, take a thread."""
        return function() if size < _LARGE_BODY else await self._body_threads.run(client, function)

    async def build_unit(self, model: ServedModel, unit: UnitName | None, client: str) -> None:
        """Build the unit that a request needs, unless it is there. Raises ApiError for one that does not exist."""
        if not model.has_unit(unit):
            await self._schema_threads.run(client, partial(model.with_unit, unit))

    async def prepare(self, request: ParsedRequest, client: str, is_cancelled: Callable[[], bool]) -> list[Generation]:
        """Return the generations of a request, which have not begun.

        is_cancelled: called in a thread between two prompts; True stops the work.

        Raises:
            ApiError: The prompts take too long to encode.
            MixlmError: The ensemble refuses the schema, a prompt or an option.
        """
        limits = self._limits
        language = request.settings.language
        if language is not None:
            grammars = request.ensemble.grammars
            check = CompileLimits(
                max_chars=limits.max_schema_chars,
                timeout=limits.schema_timeout,
                num_vocabularies=grammars.num_vocabularies,
            )
            await self._schema_threads.run(client, partial(grammars.for_language, language, check))
        field = "messages" if request.kind == "chat" else "prompt"
        try:
            encode = partial(_encode, request, is_cancelled)
            return await self._prompt_threads.run(client, encode, timeout=limits.encode_timeout)
        except TimeoutError:
            message = f"the prompt takes longer than {limits.encode_timeout:g} s to encode"
            raise ApiError(400, message, param=field, code="prompt_too_complex") from None
        except MixlmError as error:
            refusal = to_api_error(error)
            unread = isinstance(error, (PromptTooLongError, TokenizerError, TemplateError))
            if unread and refusal.status == 400 and refusal.param is None:
                refusal.param = field
            raise refusal from error


def _encode(request: ParsedRequest, is_cancelled: Callable[[], bool]) -> list[Generation]:
    """Return the generations of a request, each prompt encoded once."""
    generations: list[Generation] = []
    for i, prompt in enumerate(request.prompts):
        if is_cancelled():
            break
        encoded = request.ensemble.encode_prompt(prompt, request.settings)
        for number in range(i * request.n, (i + 1) * request.n):
            settings = request.settings.with_sequence_offset(number)
            generations.append(request.ensemble.context(settings).start(encoded))
    return generations
