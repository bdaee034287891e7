"""Threads for work that would delay the event loop and the models: schemas, units, and the encoding of prompts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from mixlm.server.fair_queue import FairQueue

Result = TypeVar("Result")


class FairThreads:
    """Runs blocking functions in a few threads; clients take turns. All methods belong to the event loop.

    The threads are daemons. Unlike those of `asyncio.to_thread`, they do not delay the end of the process.
    """

    def __init__(self, num_threads: int) -> None:
        self._num_threads = self._num_free = num_threads
        self._queue: FairQueue[tuple[Callable[[], Any], float | None, asyncio.Future[Any]]] = FairQueue()

    @property
    def is_busy(self) -> bool:
        """Whether any function runs."""
        return self._num_free < self._num_threads

    async def run(self, client: str, function: Callable[[], Result], *, timeout: float | None = None) -> Result:
        """Return a function's result.

        A function cannot be interrupted: after a timeout or a cancellation it keeps its thread until it returns. It is
        not called at all if it was cancelled in the queue.

        Args:
            client: For whom it runs.
            function: Called in a thread.
            timeout: Seconds for the call, without the time in the queue; None for no limit.

        Raises:
            TimeoutError: The call takes longer.
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
