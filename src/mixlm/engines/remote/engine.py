"""A member behind servers: llama.cpp's, vLLM's, SGLang's, or others with the same API.

A request for logits asks a server for one token with the top N, by ids. The server's own prefix cache does the
catching up, so a sequence stays with one server where several have the model. When that one fails, the sequence goes on
with another, which prefills the text anew.
"""

from __future__ import annotations

import asyncio
import os
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np

from mixlm.engines.base import EngineSpec, Session, TextInterface
from mixlm.engines.registry import is_remote
from mixlm.engines.remote.http_client import ClientLimits, EventLoopThread
from mixlm.engines.remote.model_info import ModelInfo, read_model_info, tokenizer_folder_of
from mixlm.engines.remote.probing import PROBE_TEXT, probe
from mixlm.engines.remote.replica import Replica, ReplicaSet
from mixlm.engines.remote.server import ModelServer, TokenizerProbe, TopTokens
from mixlm.engines.requests import (
    AllowedIds,
    Forward,
    GenerateRequest,
    GenerateResponse,
    Request,
    Response,
    ScoreRequest,
    to_response,
)
from mixlm.engines.tokenizer_setup import TokenizerSetup
from mixlm.engines.topk_only import TokenScores, TopKOnlyEngine, TopKOnlySession, TopTokensQuery
from mixlm.errors import ConfigError, EngineError, RequestRefusedError, UnsupportedError
from mixlm.models.resolve import resolve
from mixlm.types import Candidates, Ids, LogitsRows, Sampling, TopKFilter

_T = TypeVar("_T")


def load(spec: EngineSpec) -> RemoteEngine:
    """Connect to the servers that `spec.model` names by their URLs. Raises ConfigError where it names none."""
    if not is_remote(spec.model):
        raise ConfigError(
            f"{spec.model!r} is no server", "give its URL: http://host:port, with #NAME for one of several"
        )
    for url in spec.model.split(","):
        _check_url(url)
    if spec.engine not in ("auto", "remote"):
        raise ConfigError(f"engine is {spec.engine!r}, and {spec.model} is a server", "leave engine out")
    if spec.tokenizer is None:
        return RemoteEngine(spec, None)
    return RemoteEngine(spec, tokenizer_folder_of(spec.tokenizer) or Path(resolve(spec.tokenizer).path_or_id))


def _check_url(url: str) -> None:
    """Raise ConfigError for a URL without a host, or with a port that is no number of one."""
    try:
        parts = urlsplit(url.strip())
        complete = bool(parts.hostname) and parts.port != 0
    except ValueError:
        complete = False
    if not complete:
        raise ConfigError(f"{url!r} is not the URL of a server", "give http://host:port, with #NAME for one of several")


class RemoteEngine(TopKOnlyEngine):
    """A model behind `http://host:port` or `https://host:port`, `#name` after it where the server has several.

    Several URLs with commas between them are replicas: servers that have the same model.

    Args:
        folder: of the model's tokenizer; where the server says the path of its model and this machine has it, None
            takes that.

    Raises:
        EngineError: no server answers.
        UnsupportedError: a server lacks something, which is named.
        ConfigError: a server has another model, or the key is not there.
        TokenizerError: the tokenizer is another's.
    """

    asynchronous = True

    def __init__(self, spec: EngineSpec, folder: Path | None, limits: ClientLimits | None = None) -> None:
        limits = limits or ClientLimits(response=spec.timeout)
        key = _read_key(spec)
        self._loop = EventLoopThread()
        self.replicas = self._loop.run(_create_replicas(spec.model.split(","), key, limits))
        try:
            self._connect(spec, folder)
        except BaseException:
            _close(self._loop, self.replicas)
            raise
        self._closing = weakref.finalize(self.replica_set, _close, self._loop, self.replicas)

    def _connect(self, spec: EngineSpec, folder: Path | None) -> None:
        first, info = self._loop.run(_find_first(self.replicas))
        name = spec.name or info.name.rpartition("/")[2].removesuffix(".gguf")
        # Members behind different servers run at the same time.
        self.device = ",".join(replica.client.base_url for replica in self.replicas)
        folder = folder or info.tokenizer_folder()
        if folder is None:
            raise ConfigError(
                f"the tokenizer of {name} at {first.client.base_url} is not known",
                "give its folder: tokenizer = PATH, beside model",
            )
        self._tokenizer = TokenizerSetup.load(str(folder), name)
        self._vocab_size = max(len(self._tokenizer.tokenizer), info.vocabulary_size)
        context_length = spec.context or info.context_length
        if not context_length:
            raise UnsupportedError(
                "the server does not say how many tokens its context holds", "give it: context = N, beside model"
            )
        super().__init__(name, self.text_interface(replace(spec, name=name)), context_length)
        ids, first_ids = (self.encoder.encode(text).ids for text in (PROBE_TEXT.encode(), b"A"))
        tokenizer = TokenizerProbe(ids, first_ids, self.vocabulary.tokens, str(folder))
        # Some servers do not survive a request for more tokens than there are.
        count = min(spec.candidates + self.extra_tokens, self.vocabulary.size)
        probe_server = partial(probe, tokenizer=tokenizer, count=count)
        self._server = server = self._loop.run(probe_server(first.client, info))
        first.use(server)
        self.max_top_k = server.limit
        self.extra_tokens = min(self.extra_tokens, server.max_logprobs // 5)
        self.top_k_limit = min(spec.candidates, server.max_logprobs - self.extra_tokens)
        self.takes_ids = server.takes_ids
        self.max_unlisted = server.max_logprobs
        self.replica_set = ReplicaSet(self.name, self.replicas, server, self.context_length, probe_server)
        self._loop.run(self.replica_set.connect_others())
        self.details = {
            "engine": server.name,
            "device": self.device,
            "dtype": "the server's",
            "prefix cache": "reported" if server.reports_cached else "not reported",
            "samples itself": server.samples,
        }

    def session(self) -> RemoteSession:
        """Begin a sequence. A server keeps nothing of it but what its prefix cache holds."""
        return RemoteSession(self)

    def text_interface(self, spec: EngineSpec) -> TextInterface:
        """Return the prompts and the vocabulary of a spec on this model."""
        return self._tokenizer.text_interface(spec, self._vocab_size)

    @property
    def scores_texts(self) -> bool:
        """True: where a server returns no log-probabilities of a prompt, it says so when it is asked."""
        return True

    @property
    def batch_key(self) -> int:
        """Engines that differ in their prompts alone run as one."""
        return id(self.replicas)

    def run(self, task: Coroutine[Any, Any, _T]) -> _T:
        """Run a task in the event loop that sends the requests, and return its result."""
        return self._loop.run(task)

    def submit(self, session: Session, request: Request) -> Future[Any]:
        """Send one request; many may be in flight at once."""
        # The caller's array is a view of a buffer that may change when the response is no longer waited for.
        return self._loop.submit(self._send(session, replace(request, ids=request.ids.copy())))

    def respond(self, requests: Sequence[tuple[Session, Request]]) -> list[Response]:
        """Send requests at once, those of one session in turn."""
        if not all(isinstance(session, RemoteSession) for session, _ in requests):
            return super().respond(requests)  # something wraps the sessions
        futures = [self.submit(session, request) for session, request in requests]
        wait(futures)  # also those beside one that failed
        return [to_response(request, future.result()) for (_, request), future in zip(requests, futures, strict=True)]

    def samples_itself(self, sampling: Sampling, banned: Ids) -> bool:
        """Whether the servers sample themselves as the options say, and report the log-probabilities."""
        return self._server.samples_itself(sampling, banned)

    def alive(self) -> bool:
        """Whether a server answers, with the model that it had."""
        return self._loop.run(self.replica_set.is_any_alive())

    async def _send(self, session: Session, request: Request) -> Any:
        assert isinstance(session, RemoteSession)
        async with session.lock:
            if isinstance(request, GenerateRequest):
                return await session.generate_async(request)
            if isinstance(request, ScoreRequest):
                return (await session.token_scores_async(request.ids)).logprobs
            return await session.logits_rows_async(request.ids, request.last, request.top_k_filter, request.allowed)


class RemoteSession(TopKOnlySession):
    """One sequence. A server receives all of it with every request, or what is new where it has mixlm's route.

    replica: the server that it stays with. lock: held by the request that is in flight.
    """

    def __init__(self, engine: RemoteEngine) -> None:
        super().__init__(engine)
        self._engine = engine
        self.lock = asyncio.Lock()
        self.replica: Replica | None = None

    async def ask(self, send: Callable[[ModelServer], Awaitable[_T]]) -> _T:
        """Ask the sequence's own server, and another one where that fails.

        Raises:
            EngineError: no server answers.
        """
        replica_set = self._engine.replica_set
        failed: list[Replica] = []
        while True:
            if self.replica is None or not self.replica.is_ready:
                self._move(await replica_set.choose(failed))
            replica = self.replica
            assert replica is not None
            assert replica.server is not None
            try:
                response = await send(replica.server)
                await replica.server.check()
                return response
            except EngineError as error:
                if isinstance(error, RequestRefusedError) or len(self._engine.replicas) == 1:
                    raise  # others are like this one, or there are none
                failed.append(replica)
                self._move(None)
                replica_set.exclude(replica, error)
                if not replica_set.can_answer(failed):
                    raise

    def _move(self, replica: Replica | None) -> None:
        """Stay with another server."""
        if self.replica is not None:
            self.replica.release(self)
        self.replica = replica
        if replica is not None:
            replica.sessions.add(self)

    def reset(self) -> None:
        """Start anew."""
        super().reset()
        self._move(None)

    def generate(self, request: GenerateRequest) -> GenerateResponse:
        """Let a server sample tokens."""
        return self._engine.run(self.generate_async(request))

    async def generate_async(self, request: GenerateRequest) -> GenerateResponse:
        """Do what `generate` does, without blocking."""
        engine, start = self._engine, time.perf_counter()
        ends = sorted(engine.vocabulary.end_ids)
        sent = replace(request, max_tokens=min(request.max_tokens, engine.context_length + 1 - len(request.ids)))
        response = await self.ask(lambda server: server.generate(self, sent, ends))
        self.record_generation(request.ids, response, time.perf_counter() - start)
        return response

    async def logits_rows_async(
        self, ids: Ids, last: int, top_k_filter: TopKFilter | None, allowed: AllowedIds = ()
    ) -> LogitsRows:
        """Do what `logits_rows` does, without blocking."""
        with self._serving(top_k_filter, allowed):
            kept = self.rollback(ids, last)
            if kept is None:
                return self.last_logits
            start = time.perf_counter()
            queries, cached = self.top_k_queries(ids[kept:], last, top_k_filter, allowed), kept
            try:
                query = next(queries)
                while True:
                    response = await self._ask_top_tokens(query)
                    cached = cached if response.cached is None else min(response.cached, len(ids) - 1)
                    query = queries.send(response.candidates)
            except StopIteration as stop:
                rows: LogitsRows = stop.value
            except BaseException:
                self.reset()
                raise
            seconds = time.perf_counter() - start
            self.record(ids, None if isinstance(rows, list) else rows, Forward(len(ids) - kept, kept, seconds))
        self.stats.forwards[-1] = Forward(len(ids) - cached, cached, seconds)  # as the server reports it
        self.stats.cached_tokens += max(cached - kept, 0)
        return rows

    def token_scores(self, ids: Ids) -> TokenScores:
        """Return the log-probability of each id but the first, and whether it is the most likely one there."""
        return self._engine.run(self.token_scores_async(ids))

    async def token_scores_async(self, ids: Ids) -> TokenScores:
        """Do what `token_scores` does, without blocking."""
        if len(ids) < 2:
            return TokenScores(np.zeros(0), np.zeros(0, dtype=np.bool_))
        start = time.perf_counter()
        scores = await self.ask(lambda server: server.prompt_scores(self, ids))
        self.stats.forwards.append(Forward(len(ids), 0, time.perf_counter() - start))
        return scores

    def top_tokens(self, ids: Ids, count: int, among: Ids | None = None) -> Candidates:
        """Return at least the `count` most likely tokens after `ids`."""
        return self._engine.run(self._ask_top_tokens(TopTokensQuery(ids, count, among))).candidates

    async def _ask_top_tokens(self, query: TopTokensQuery) -> TopTokens:
        return await self.ask(lambda server: server.candidates(self, *query))


async def _create_replicas(urls: Sequence[str], key: str | None, limits: ClientLimits) -> list[Replica]:
    return [Replica(url, key, limits) for url in urls]  # in the event loop that sends their requests


async def _find_first(replicas: Sequence[Replica]) -> tuple[Replica, ModelInfo]:
    """Return the first server that answers, and its model. Raises EngineError of the last one when none does."""
    for replica in replicas:
        try:
            return replica, await read_model_info(replica.client, replica.model)
        except EngineError:
            if replica is replicas[-1]:
                raise
            replica.mark_failed()
    raise AssertionError


def _close(loop: EventLoopThread, replicas: Sequence[Replica]) -> None:
    async def close_all() -> None:
        for replica in replicas:
            await replica.close()

    loop.close(close_all())


def _read_key(spec: EngineSpec) -> str | None:
    if spec.key_env is None:
        return None
    key = os.environ.get(spec.key_env)
    if not key:
        raise ConfigError(f"the environment variable {spec.key_env} is not set, and key_env names it")
    return key
