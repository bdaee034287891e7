"""Generations for asyncio: a thread runs the models, and tokens come to the event loop as they are written.

All generations of an ensemble that are in progress at the same time are batched by one `Scheduler`. The thread starts
with the first of them and ends with the last.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any

from mixlm.generation.dispatch import to_mixlm_error
from mixlm.generation.generation import Generation
from mixlm.generation.scheduler import Scheduler
from mixlm.types import Completion, Token


class AsyncGeneration(AsyncIterator[Token]):
    """A completion in progress: an asynchronous iterator over its tokens. `completion` is complete after the last one.

    It ends when it is closed (`aclose`, or at the end of `async with`), when the task that waits for it is cancelled,
    and when nobody refers to it any more.

    >>> async for token in ensemble.astream("The sky is", max_tokens=20):    # doctest: +SKIP
    ...     print(token.text, end="")
    """

    def __init__(self, runner: BackgroundRunner, start: Callable[[], Generation]) -> None:
        self._runner = runner
        self._channel = _Channel(start)
        self._tokens: deque[Token] = deque()
        self._is_over = False

    def __repr__(self) -> str:
        if self._channel.generation is None:
            return "<AsyncGeneration that has not begun>"
        return repr(self._channel.generation).replace("<", "<Async", 1)

    def _repr_html_(self) -> str:
        """Return the text so far for a notebook."""
        return "" if self._channel.generation is None else self._channel.generation._repr_html_()

    async def __anext__(self) -> Token:
        if self._channel.loop is None:
            self._channel.loop = asyncio.get_running_loop()
            self._runner.submit(self._channel)
        while not self._tokens:
            if self._is_over:
                raise StopAsyncIteration
            try:
                news = await self._channel.news.get()
            except asyncio.CancelledError:
                self._cancel()
                raise
            if isinstance(news, list):
                self._tokens += news
                continue
            self._is_over = True
            if news is not None:
                raise news
        return self._tokens.popleft()

    async def __aenter__(self) -> AsyncGeneration:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._cancel()

    async def aclose(self) -> None:
        """End it, and free the members' KV caches; the completion holds what was written."""
        self._cancel()

    async def finish(self) -> Completion:
        """Generate the rest and return the completion."""
        async for _ in self:
            pass
        return self.completion

    @property
    def completion(self) -> Completion:
        """The completion so far. Raises RuntimeError before the first token."""
        if self._channel.generation is None:
            raise RuntimeError("the generation has not begun: iterate over it")
        return self._channel.generation.completion

    def _cancel(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._runner.cancel(self._channel)


class _Channel:
    """Between the thread, which begins a generation and puts what it writes, and the event loop, which takes it."""

    def __init__(self, start: Callable[[], Generation]) -> None:
        self.start = start
        self.loop: asyncio.AbstractEventLoop | None = None
        self.news: asyncio.Queue[list[Token] | BaseException | None] = asyncio.Queue()
        self.generation: Generation | None = None

    def put(self, news: list[Token] | BaseException | None) -> None:
        """Pass on tokens, the error that ended the generation, or None at its end."""
        assert self.loop is not None
        with suppress(RuntimeError):  # the event loop is closed
            self.loop.call_soon_threadsafe(self.news.put_nowait, news)


class BackgroundRunner:
    """Runs generations in a thread of its own. at_once: how many in progress; others wait."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._lock = threading.RLock()  # an abandoned generation may be collected in the thread that holds it
        self._arrived: list[_Channel] = []
        self._cancelled: list[_Channel] = []
        self._is_running = False

    def submit(self, channel: _Channel) -> None:
        """Take in a generation."""
        with self._lock:
            self._arrived.append(channel)
            if not self._is_running:
                self._is_running = True
                threading.Thread(target=self._run, name="mixlm generations", daemon=True).start()

    def cancel(self, channel: _Channel) -> None:
        """End a generation at the next step of the models, if it is there."""
        with self._lock:
            if channel in self._arrived:
                self._arrived.remove(channel)
            elif self._is_running:
                self._cancelled.append(channel)

    def _run(self) -> None:
        scheduler = Scheduler(self._at_once)
        running: dict[Generation, _Channel] = {}
        while True:
            with self._lock:
                if not self._arrived and scheduler.idle:
                    self._cancelled.clear()
                    self._is_running = False
                    return
                arrived, self._arrived = self._arrived, []
                cancelled, self._cancelled = self._cancelled, []
            for channel in arrived:
                try:
                    channel.generation = channel.start()
                except Exception as error:
                    channel.put(to_mixlm_error(error))
                    continue
                running[channel.generation] = channel
                scheduler.add(channel.generation)
            for channel in cancelled:
                if channel.generation in running:
                    scheduler.cancel(channel.generation)
                    del running[channel.generation]
            try:
                advanced = scheduler.step()
            except BaseException as error:  # nobody may wait for ever
                for channel in running.values():
                    channel.put(error)
                scheduler, running = Scheduler(self._at_once), {}
                continue
            for generation in advanced:
                if generation in running:
                    _pass_on(generation, running)


def _pass_on(generation: Generation, running: dict[Generation, _Channel]) -> None:
    """Put what a generation has written since, and its end."""
    tokens = [generation.ready.popleft() for _ in range(len(generation.ready))]
    if tokens:
        running[generation].put(tokens)
    if generation.finished:
        running.pop(generation).put(generation.error)


async def finish_all(generations: Sequence[AsyncGeneration]) -> list[Completion]:
    """Return the completions of generations that run together; none goes on after the first error."""
    try:
        completions: list[Any] = await asyncio.gather(*(generation.finish() for generation in generations))
    finally:
        for generation in generations:
            await generation.aclose()
    return completions
