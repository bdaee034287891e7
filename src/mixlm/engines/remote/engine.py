"""A member behind servers: llama.cpp's, vLLM's, SGLang's, or what speaks as they do.

Every question is a request for one token with the likeliest N, by ids. The server's own prefix cache does the catching
up, so a sequence stays with one server where there are several with the model. When that one fails, it goes on with
another, which reads the text anew.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import os
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from mixlm.engines.base import (
    Forward,
    GenerateRequest,
    GenerateResponse,
    LogitsRequest,
    Request,
    Response,
    Session,
    complete,
)
from mixlm.engines.remote.http_client import ClientLimits, EventLoopThread, HttpClient
from mixlm.engines.remote.server import PROBE, CandidatesResponse, ModelServer, TokenizerProbe
from mixlm.engines.spec import EngineSpec
from mixlm.engines.tokenizer_setup import Read, load_tokenizer
from mixlm.engines.topk_only import PartialEngine, PartialSession
from mixlm.errors import ConfigError, EngineError, MixlmError, UnsupportedError
from mixlm.types import Candidates, Ids, LogitsRows, Sampling, TopKFilter

_log = logging.getLogger("mixlm")
_T = TypeVar("_T")


class RemoteEngine(PartialEngine):
    """A model behind `http://host:port` or `https://host:port`, `#name` behind it where the server has several.

    Several URLs with commas between them are replicas: servers that have the same model.
    tokenizer: folder of the model's tokenizer; where the server tells the path of its model and this machine has it,
    that is taken when the folder is left out.

    Raises EngineError when no server answers, UnsupportedError when one lacks something, by name, ConfigError when it
    has another model or the key is not there, TokenizerError when the tokenizer is another's.
    """

    at_once = True

    def __init__(self, spec: EngineSpec, folder: Path | None, limits: ClientLimits | None = None) -> None:
        self.limits = limits or ClientLimits(answer=spec.timeout)
        key = _key(spec)
        self._loop = EventLoopThread()
        self.servers: list[ModelServer] = []
        for url in spec.model.split(","):
            base, _, wanted = url.strip().partition("#")
            wire = HttpClient(base.rstrip("/").removesuffix("/v1"), self._loop, key, self.limits)
            self.servers.append(ModelServer(wire, wanted))
        self._closing = weakref.finalize(self.servers[0], _close, self._loop, [one.wire for one in self.servers])
        first = self._loop.wait(self._meet())
        self.name = spec.name or first.model.rpartition("/")[2].removesuffix(".gguf")
        self.device = ",".join(one.wire.base for one in self.servers)  # members behind different servers work at once
        folder = folder or first.folder()
        if folder is None:
            raise ConfigError(
                f"the tokenizer of {self.name} at {first.wire.base} is not known",
                "give its folder: tokenizer = PATH, beside model",
            )
        self._tokenizer = load_tokenizer(str(folder), self.name)
        self._rows = max(len(self._tokenizer), int((first.card.get("meta") or {}).get("n_vocab") or 0))
        self._read = Read.of(self._tokenizer, self.name, str(folder))
        self._set_prompts(spec)
        self.prepare()
        self.context_length = spec.context or first.context()
        probe, start = (self.encoder.encode(text).ids for text in (PROBE.encode(), b"A"))
        known = self.vocabulary.tokens, self.vocabulary.ends
        self._reader = TokenizerProbe(probe, start, self.whole_character(), *known, str(folder))
        # More than there are is more than some servers survive.
        self._wanted = min(spec.candidates + self.spare, self.vocabulary.size)
        self._loop.wait(first.try_out(self._reader, self._wanted))
        self.most = first.told if first.limited else None
        self.spare = min(self.spare, first.told // 5)
        self.candidates = min(spec.candidates, first.told - self.spare)
        self._reference = first
        self._loop.wait(self._join_others())
        self.details = {
            "engine": first.dialect,
            "device": self.device,
            "dtype": "the server's",
            "prefix cache": "reported" if first.reports_cached else "not reported",
            **({"draws by itself": first.served.draws} if first.served.draws else {}),
        }
        self._joining = asyncio.Lock()

    def session(self) -> RemoteSession:
        """Begin a sequence. A server keeps nothing of it but what its prefix cache holds."""
        return RemoteSession(self)

    def sharing(self, spec: EngineSpec) -> RemoteEngine:
        """Return an engine on the same servers, with prompts of its own."""
        shared = copy.copy(self)
        shared.name = spec.name or self.name
        shared._set_prompts(replace(spec, name=shared.name))
        return shared

    def _set_prompts(self, spec: EngineSpec) -> None:
        spec = replace(spec, name=self.name)
        self.notes = tuple(self._read.give(self, self._tokenizer, spec, self._rows, ()))

    @property
    def runs(self) -> int:
        """Engines that differ in their prompts alone run as one."""
        return id(self.servers)

    def wait(self, task: Coroutine[Any, Any, _T]) -> _T:
        """Run a task where requests are sent from, and return what it returns."""
        return self._loop.wait(task)

    def begin(self, session: Session, request: Request) -> Future[Any]:
        """Send one question; many may be on their way at once."""
        # The caller's array is a view of a buffer that may go on changing when the question is no longer waited for.
        return self._loop.start(self._found(session, replace(request, ids=request.ids.copy())))

    def answer(self, requests: Sequence[tuple[Session, Request]]) -> list[Response]:
        """Send questions at once, those of one session in turn."""
        if not all(isinstance(session, RemoteSession) for session, _ in requests):
            return super().respond(requests)  # something stands in front of the sessions
        futures = [self.begin(session, request) for session, request in requests]
        errors = [one.exception() for one in futures]  # all are waited for, also those beside one that failed
        for error in errors:
            if error is not None:
                raise error
        return [complete(request, one.result()) for (_, request), one in zip(requests, futures, strict=True)]

    def writes(self, sampling: Sampling, banned: Ids) -> bool:
        """Whether the servers draw by themselves what the options mean, and tell what they drew."""
        return self._reference.served.writes(sampling, banned)

    def alive(self) -> bool:
        """Whether a server answers, with the model that it had."""
        return self._loop.wait(self._any_alive())

    async def likeliest(self, session: RemoteSession, ids: Ids, count: int) -> CandidatesResponse:
        """Ask for at least the `count` likeliest tokens after `ids`."""
        return await self._answered(session, lambda server: server.likeliest(session, ids, count))

    async def drawn(self, session: RemoteSession, run: GenerateRequest) -> GenerateResponse:
        """Let a server draw up to `length` tokens."""
        length = min(run.length, self.context_length + 1 - len(run.ids))
        ends = sorted(self.vocabulary.ends)
        return await self._answered(session, lambda server: server.write(session, replace(run, length=length), ends))

    async def _answered(self, session: RemoteSession, ask: Callable[[ModelServer], Awaitable[_T]]) -> _T:
        """Ask the session's own server, and another one where that fails."""
        tried: list[ModelServer] = []
        while True:
            server = session.home
            if server is None or not server.ready:
                server = await self._another(tried)
                session.move(server)
            try:
                return await ask(server)
            except EngineError as error:
                if len(self.servers) == 1:
                    raise
                if server.ready:
                    server.failed()
                    _log.warning("%s: a server is left out: %s", self.name, error.message)
                tried.append(server)
                session.move(None)
                if all(one in tried or not (one.ready or one.due) for one in self.servers):
                    raise

    async def _another(self, tried: Sequence[ModelServer]) -> ModelServer:
        """Return the server with the fewest sequences among those that answer."""
        if len(self.servers) == 1:
            return self.servers[0]
        async with self._joining:
            for one in self.servers:
                if not one.ready and one.due and one not in tried and not await self._join(one):
                    one.failed()
        ready = [one for one in self.servers if one.ready and one not in tried]
        if not ready:
            raise EngineError(f"none of the {len(self.servers)} servers of {self.name} answers")
        return min(ready, key=lambda one: len(one.homes))

    async def _meet(self) -> ModelServer:
        """Return the first server that answers. Raises EngineError of the last one when none does."""
        for at, one in enumerate(self.servers):
            try:
                await one.meet()
                return one
            except EngineError:
                if at == len(self.servers) - 1:
                    raise
                one.failed()
        raise AssertionError

    async def _join_others(self) -> None:
        for one in self.servers:
            if one is self._reference or not one.due:
                continue
            try:
                await self._tried_out(one)
            except EngineError as error:
                one.failed()
                _log.warning("%s: a server is left out: %s", self.name, error.message)

    async def _join(self, server: ModelServer) -> bool:
        """Take a server in that does not take part, or no longer. Returns whether it has the model."""
        try:
            if (await server.wire.ask("GET", "/v1/models", seconds=2.0)).status != 200:
                return False
            await self._tried_out(server)
        except MixlmError as error:
            _log.warning("%s: %s stays left out: %s", self.name, server.wire.base, error.message)
            return False
        _log.warning("%s: %s takes part", self.name, server.wire.base)
        return True

    async def _tried_out(self, server: ModelServer) -> None:
        """Find out whether a server is a replica. Raises UnsupportedError, or what trying it out raises."""
        await server.meet()
        await server.try_out(self._reader, self._wanted)
        said = None
        if not server.has_what(self._reference):
            said = "has another model"
        elif server.told < self.candidates + self.spare:
            said = f"tells {server.told} of the likeliest tokens, others {self.candidates + self.spare}"
        elif server.context() < self.context_length:
            said = f"has a context of {server.context()} tokens, others {self.context_length}"
        elif server.served.draws != self._reference.served.draws:
            said = f"draws by itself: {server.served.draws}, others: {self._reference.served.draws}"
        if said is not None:
            server.ready = False
            raise UnsupportedError(f"{server.wire.base} {said}: it is no replica", "servers of one member are alike")

    async def _any_alive(self) -> bool:
        if len(self.servers) == 1:
            return await self.servers[0].alive()
        return any(await asyncio.gather(*[self._join(one) for one in self.servers]))

    async def _found(self, session: Session, request: Request) -> Any:
        assert isinstance(session, RemoteSession)
        async with session.turn:
            if isinstance(request, GenerateRequest):
                return await session.drawn(request)
            return await session.asked(
                request.ids, request.last if isinstance(request, LogitsRequest) else 1, request.cut
            )


class RemoteSession(PartialSession):
    """One sequence. Its server is told all of it at every question, or what is new where it has mixlm's route.

    home: the server that it stays with.
    """

    def __init__(self, engine: RemoteEngine) -> None:
        super().__init__(engine)
        self._engine = engine
        self.turn = asyncio.Lock()
        self.home: ModelServer | None = None

    def move(self, server: ModelServer | None) -> None:
        """Stay with another server."""
        if self.home is not None:
            self.home.leave(self)
        self.home = server
        if server is not None:
            server.homes.add(self)

    def forget(self) -> None:
        """Start anew."""
        super().reset()
        self.move(None)

    def write(self, run: GenerateRequest) -> GenerateResponse:
        """Let a server write."""
        return self._engine.wait(self.drawn(run))

    async def drawn(self, run: GenerateRequest) -> GenerateResponse:
        """Do what `write` does, without keeping anyone waiting."""
        start = time.perf_counter()
        written = await self._engine.drawn(self, run)
        self.wrote(run.ids, written, time.perf_counter() - start)
        return written

    async def asked(self, ids: Ids, last: int, cut: TopKFilter | None) -> LogitsRows:
        """Do what `rows` does, without keeping anyone waiting."""
        keep = self.rollback(ids, last)
        if keep is None:
            return self.latest
        start = time.perf_counter()
        wanted, cached = self.wanted(ids[keep:], last, cut), keep
        try:
            question = next(wanted)
            while True:
                told = await self._engine.likeliest(self, *question)
                cached = cached if told.cached is None else min(told.cached, len(ids) - 1)
                question = wanted.send(told.likeliest)
        except StopIteration as done:
            out: LogitsRows = done.value
        except BaseException:
            self.forget()
            raise
        seconds = time.perf_counter() - start
        whole = None if isinstance(out, list) else out
        self.settle(ids, whole, Forward(len(ids) - keep, keep, seconds))
        self.stats.forwards[-1] = Forward(len(ids) - cached, cached, seconds)  # as the server tells
        return out

    def _likeliest(self, ids: Ids, count: int) -> Candidates:
        return self._engine.wait(self._engine.likeliest(self, ids, count)).likeliest


def _close(loop: EventLoopThread, wires: Sequence[HttpClient]) -> None:
    async def closing() -> None:
        for one in wires:
            await one.close()

    loop.close(closing())


def _key(spec: EngineSpec) -> str | None:
    if spec.key_env is None:
        return None
    key = os.environ.get(spec.key_env)
    if not key:
        raise ConfigError(f"the environment variable {spec.key_env} is not set, and key_env names it")
    return key
