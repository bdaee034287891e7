"""The servers of one member: which of them are in use, and which is retried when."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from weakref import WeakSet

from mixlm.engines.base import Session
from mixlm.engines.remote.http_client import ClientLimits, HttpClient, time_limit
from mixlm.engines.remote.model_info import ModelInfo, read_model_info
from mixlm.engines.remote.server import ModelServer
from mixlm.errors import EngineError, MixlmError, UnsupportedError

_log = logging.getLogger("mixlm")
_MAX_RETRY_WAIT = 30.0
_QUICK = 2.0  # seconds to wait for a server that may be gone


class Replica:
    """One of a member's servers, connected or not.

    model: its name at the server, "" for the only one. server: None until it was connected once. is_ready: whether it
    is in use. sessions: those that stay with it.

    Args:
        url: the server's, with `#` and the model's name after it where it has several.
    """

    def __init__(self, url: str, key: str | None, limits: ClientLimits) -> None:
        base_url, _, self.model = url.strip().partition("#")
        self.client = HttpClient(base_url.rstrip("/").removesuffix("/v1"), key, limits)
        self.server: ModelServer | None = None
        self.is_ready = False
        self.sessions: WeakSet[Session] = WeakSet()
        self._retry_wait = 0.0
        self._retry_at = 0.0

    @property
    def is_due(self) -> bool:
        """Whether it should be tried, or tried again."""
        return time.monotonic() >= self._retry_at

    def use(self, server: ModelServer) -> None:
        """Use the server from now on."""
        if self.server is not None:
            self.server.close()
        self.server = server
        self.is_ready, self._retry_wait = True, 0.0

    def mark_failed(self) -> None:
        """Note that it does not answer. It is retried after ever longer times."""
        self.is_ready = False
        self._retry_wait = min(max(2 * self._retry_wait, self.client.limits.first_retry), _MAX_RETRY_WAIT)
        self._retry_at = time.monotonic() + self._retry_wait

    def release(self, session: Session) -> None:
        """Note that a sequence no longer stays here."""
        self.sessions.discard(session)
        if self.server is not None:
            self.server.release(session)

    async def is_alive(self) -> bool:
        """Whether it answers soon, with the model that it had."""
        try:
            with time_limit(_QUICK):
                return self.server is not None and await self.server.is_unchanged()
        except EngineError:
            return False

    async def close(self) -> None:
        """Close its connections."""
        if self.server is not None:
            self.server.close()
        await self.client.close()


class ReplicaSet:
    """The servers of one member.

    Args:
        name: the member's, for messages.
        reference: the server that was connected first.
        context_length: tokens that each server's context must hold.
        probe: `probing.probe` for the member's tokenizer.
    """

    def __init__(
        self,
        name: str,
        replicas: Sequence[Replica],
        reference: ModelServer,
        context_length: int,
        probe: Callable[[HttpClient, ModelInfo], Awaitable[ModelServer]],
    ) -> None:
        self._name = name
        self._replicas = replicas
        self._reference = reference
        self._context_length = context_length
        self._probe = probe
        self._retries: dict[Replica, asyncio.Task[bool]] = {}

    async def connect(self, replica: Replica) -> None:
        """Probe a server and use it. Raises UnsupportedError where it is no replica, and what `probe` raises."""
        info = await read_model_info(replica.client, replica.model)
        server, reference = await self._probe(replica.client, info), self._reference
        reason = None
        if not server.has_model_of(reference):
            reason = "has another model"
        elif server.limit is not None and (reference.limit is None or server.limit < reference.limit):
            reason = f"returns {server.limit} of the most likely tokens, others {reference.limit or 'all'}"
        elif 0 < info.context_length < self._context_length:
            reason = f"has a context of {info.context_length} tokens, others {self._context_length}"
        elif reference.takes_ids and not server.takes_ids:
            reason = "does not return the most likely of given ids, others do"
        elif server.samples != reference.samples:
            reason = f"samples itself: {server.samples}, others: {reference.samples}"
        if reason is not None:
            raise UnsupportedError(
                f"{replica.client.base_url} {reason}: it is no replica", "servers of one member are alike"
            )
        replica.use(server)

    async def choose(self, failed: Sequence[Replica]) -> Replica:
        """Return the server with the fewest sequences among those that answer.

        Servers that are due are retried. Only where no other one answers does the request wait for that.

        Args:
            failed: servers that were tried for the request before.

        Raises:
            EngineError: none is left.
        """
        others = [replica for replica in self._replicas if replica not in failed]
        retries = [self._retry(replica) for replica in others if not replica.is_ready and replica.is_due]
        if not any(replica.is_ready for replica in others):
            for retry in asyncio.as_completed(retries):
                if await retry:
                    break
        ready = [replica for replica in others if replica.is_ready]
        if not ready:
            raise EngineError(f"none of the {len(self._replicas)} servers of {self._name} answers")
        return min(ready, key=lambda replica: len(replica.sessions))

    def exclude(self, replica: Replica, error: EngineError) -> None:
        """Use a server that failed no longer."""
        if replica.is_ready:
            replica.mark_failed()
            _log.warning("%s: a server is left out: %s", self._name, error.message)

    def can_answer(self, failed: Sequence[Replica]) -> bool:
        """Whether there is a server left to try."""
        return any(replica not in failed and (replica.is_ready or replica.is_due) for replica in self._replicas)

    async def connect_others(self) -> None:
        """Connect the servers that are not connected yet; those that do not answer are retried later.

        Raises:
            MixlmError: one is no replica of the others.
        """
        for replica in self._replicas:
            if replica.is_ready or not replica.is_due:
                continue
            try:
                await self.connect(replica)
            except EngineError as error:
                replica.mark_failed()
                _log.warning("%s: a server is left out: %s", self._name, error.message)

    async def is_any_alive(self) -> bool:
        """Whether a server answers, with the member's model."""
        for check in asyncio.as_completed(map(self._is_usable, self._replicas)):
            if await check:
                return True
        return False

    async def _is_usable(self, replica: Replica) -> bool:
        return await (replica.is_alive() if replica.is_ready else self._retry(replica))

    def _retry(self, replica: Replica) -> asyncio.Task[bool]:
        """Return the task that connects a server that is not in use: one at a time, for all that wait for it."""
        if (task := self._retries.get(replica)) is None:
            task = self._retries[replica] = asyncio.create_task(self._rejoin(replica))
            task.add_done_callback(lambda _: self._retries.pop(replica))
        return task

    async def _rejoin(self, replica: Replica) -> bool:
        """Connect a server that is not in use, or no longer. Returns whether it has the model."""
        try:
            with time_limit(_QUICK):
                status, _ = await replica.client.request("GET", "/v1/models")
            if status != 200:
                raise EngineError(f"status {status}")
            await self.connect(replica)
        except Exception as error:  # nobody may wait for this
            message = error.message if isinstance(error, MixlmError) else repr(error)
            _log.warning("%s: %s stays left out: %s", self._name, replica.client.base_url, message)
            if replica.is_due:  # a check of whether it is alive may come before
                replica.mark_failed()
            return False
        _log.warning("%s: %s takes part", self._name, replica.client.base_url)
        return True
