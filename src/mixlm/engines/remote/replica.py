"""The servers of one member: which of them are in use, and which is retried when."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakSet

from mixlm.engines.base import Session
from mixlm.engines.remote.http_client import HttpClient, time_limit
from mixlm.engines.remote.model_info import read_model_info
from mixlm.engines.remote.server import ModelServer, TokenizerProbe
from mixlm.errors import EngineError, MixlmError, UnsupportedError

_log = logging.getLogger("mixlm")
_MAX_RETRY_WAIT = 30.0
_QUICK = 2.0  # seconds to wait for a server that may be gone


class Replica:
    """One of a member's servers, connected or not.

    server: None until it was connected once. is_ready: whether it is in use. sessions: those that stay with it.

    Args:
        model: the model's name at the server, "" for its only one.
    """

    def __init__(self, client: HttpClient, model: str) -> None:
        self.client = client
        self.model = model
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
                return self.server is not None and await self.server.identity.is_unchanged()
        except EngineError:
            return False

    async def close(self) -> None:
        """Close its connections."""
        if self.server is not None:
            self.server.close()
        await self.client.close()


@dataclass(frozen=True)
class ReplicaRequirements:
    """What a server must have to be a replica of the others.

    Args:
        reference: the server that was connected first.
        context_length: tokens that its context must hold.
        count: how many of the most likely tokens it is asked for.
        use_sessions: whether mixlm's session route is used where a server has it.
    """

    tokenizer: TokenizerProbe
    reference: ModelServer
    context_length: int
    count: int
    use_sessions: bool

    async def connect(self, replica: Replica) -> ModelServer:
        """Probe a server. Raises UnsupportedError where it is no replica, and what `ModelServer.probe` raises."""
        info = await read_model_info(replica.client, replica.model)
        server = await ModelServer.probe(
            replica.client, info, self.tokenizer, self.count, use_sessions=self.use_sessions
        )
        summary, expected_summary = server.capabilities.summary, self.reference.capabilities.summary
        limit, expected_limit = server.limit, self.reference.limit
        reason = None
        if not server.identity.matches(self.reference.identity.fingerprint):
            reason = "has another model"
        elif limit is not None and (expected_limit is None or limit < expected_limit):
            reason = f"returns {limit} of the most likely tokens, others {expected_limit or 'all'}"
        elif info.context_length() < self.context_length:
            reason = f"has a context of {info.context_length()} tokens, others {self.context_length}"
        elif self.reference.takes_ids and not server.takes_ids:
            reason = "does not return the most likely of given ids, others do"
        elif summary != expected_summary:
            reason = f"samples itself: {summary}, others: {expected_summary}"
        if reason is not None:
            raise UnsupportedError(
                f"{replica.client.base_url} {reason}: it is no replica", "servers of one member are alike"
            )
        return server


class ReplicaSet:
    """The servers of one member.

    Args:
        name: the member's, for messages.
    """

    def __init__(self, name: str, replicas: Sequence[Replica], requirements: ReplicaRequirements) -> None:
        self._name = name
        self._replicas = replicas
        self._requirements = requirements
        self._retries: dict[Replica, asyncio.Task[bool]] = {}

    async def choose(self, failed: Sequence[Replica]) -> Replica:
        """Return the server with the fewest sequences among those that answer.

        Servers that are due are retried. Only where no other one answers does the request wait for that.

        Args:
            failed: servers that were tried for the request before.

        Raises:
            EngineError: none is left.
        """
        if len(self._replicas) == 1:
            return self._replicas[0]
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
                replica.use(await self._requirements.connect(replica))
            except EngineError as error:
                replica.mark_failed()
                _log.warning("%s: a server is left out: %s", self._name, error.message)

    async def is_any_alive(self) -> bool:
        """Whether a server answers, with the member's model."""
        if len(self._replicas) == 1:
            return await self._replicas[0].is_alive()
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
                response = await replica.client.request("GET", "/v1/models")
            if response.status != 200:
                raise EngineError(f"status {response.status}")
            server = await self._requirements.connect(replica)
        except Exception as error:  # nobody may wait for this
            message = error.message if isinstance(error, MixlmError) else repr(error)
            _log.warning("%s: %s stays left out: %s", self._name, replica.client.base_url, message)
            if replica.is_due:  # a check of whether it is alive may come before
                replica.mark_failed()
            return False
        replica.use(server)
        _log.warning("%s: %s takes part", self._name, replica.client.base_url)
        return True
