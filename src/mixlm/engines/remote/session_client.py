"""The client's side of mixlm's route in vLLM's server: one connection a text (`vllm_session` has the other side)."""

from __future__ import annotations

import asyncio
import json
import math
import weakref
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import numpy as np

from mixlm.engines.base import GenerateResponse, common_prefix
from mixlm.engines.remote.http_client import ApiKey, ClientLimits
from mixlm.errors import EngineError
from mixlm.types import Candidates, Ids
from mixlm.units.base import TokenBuffer

SESSION_PATH = "/v1/mixlm/session"


@dataclass(frozen=True)
class SessionConnector:
    """What it takes to connect: the server's URL, its key, seconds to wait for a connection and for an answer."""

    base: str
    key: ApiKey
    limits: ClientLimits
    texts: WeakSet[SessionConnection] = field(default_factory=WeakSet, compare=False)

    @classmethod
    async def found(cls, base: str, key: ApiKey, limits: ClientLimits) -> SessionConnector | None:
        """Return how to connect where the server has the route, and this machine what it takes to use it."""
        if find_spec("websockets") is None:
            return None
        line = cls(base, key, limits)
        try:
            (await line.open()).close()
        except EngineError:
            return None
        return line

    async def open(self) -> SessionConnection:
        """Connect. Raises EngineError when the server has no such route, or does not answer."""
        from websockets.asyncio.client import connect
        from websockets.exceptions import WebSocketException

        headers = {"Authorization": f"Bearer {self.key.value}"} if self.key.value else {}
        try:
            opened = await connect(
                self.base.replace("http", "ws", 1) + SESSION_PATH,
                additional_headers=headers,
                open_timeout=self.limits.connect,
                compression=None,
                max_size=None,
                proxy=None,
                ping_interval=None,
            )
        except (OSError, WebSocketException) as error:
            raise EngineError(f"{self.base} does not open a session: {error or type(error).__name__}") from error
        text = SessionConnection(self, opened)
        self.texts.add(text)
        return text

    def close(self) -> None:
        """End all texts, in their event loop."""
        for one in list(self.texts):
            one.abort()


class SessionConnection:
    """One text on a server. To be used in the event loop that it was opened in, except for `close`."""

    def __init__(self, line: SessionConnector, opened: Any) -> None:
        self._line = line
        self._socket = opened
        self._held = TokenBuffer(np.zeros(0, dtype=np.int64))
        self._loop = asyncio.get_running_loop()

    def close(self) -> None:
        """End the text, from any thread. Returns at once."""
        with suppress(RuntimeError):  # the loop has ended, and the connection with it
            self._loop.call_soon_threadsafe(self.abort)

    def abort(self) -> None:
        """End the text, in its event loop."""
        self._socket.transport.abort()

    async def write(self, ids: Ids, parameters: dict[str, Any], banned: str = "") -> dict[str, Any]:
        """Write on behind `ids`, and return the answer: `ids`, and what is `told` of each, by id.

        Raises EngineError where the connection is gone, which is then of no further use, or the server refuses.
        """
        from websockets.exceptions import WebSocketException

        held = self._held.ids
        keep = common_prefix(held, ids)
        message = {"keep": keep, "ids": ids[keep:].tolist(), "parameters": parameters, "banned": banned}
        try:
            async with asyncio.timeout(self._line.limits.answer):
                await self._socket.send(json.dumps(message))
                answer = json.loads(await self._socket.recv())
        except (OSError, ValueError, WebSocketException) as error:  # TimeoutError is an OSError
            self.close()
            raise EngineError(f"{self._line.base} does not answer: {error or type(error).__name__}") from error
        except BaseException:
            self.close()
            raise
        if not isinstance(answer, dict) or "error" in answer or not answer.get("ids"):
            self.close()
            said = answer.get("error", answer) if isinstance(answer, dict) else answer
            raise EngineError(f"{self._line.base} refuses: {str(said)[:200]}")
        self._held.rewrite(len(held), np.concatenate([ids, answer["ids"]]))
        return answer


class SessionPool:
    """The texts that go on on one server's route. check: raises EngineError where it is not the server it was."""

    def __init__(self, line: SessionConnector, check: Callable[[], Awaitable[None]]) -> None:
        self._line = line
        self._check = check
        self._open: WeakKeyDictionary[Any, SessionConnection] = WeakKeyDictionary()

    async def write(self, owner: object, ids: Ids, parameters: dict[str, Any], banned: str = "") -> dict[str, Any]:
        """Write on in the owner's text; in a new one where the connection is gone, which it may be after a rest."""
        if (text := self._open.get(owner)) is not None:
            try:
                return await text.write(ids, parameters, banned)
            except EngineError:
                self.drop(owner)
        text = await self._line.open()
        try:
            await self._check()
            answer = await text.write(ids, parameters, banned)
        except BaseException:
            text.close()
            raise
        self._open[owner] = text
        weakref.finalize(owner, text.close)
        return answer

    def drop(self, owner: object) -> None:
        """End the owner's text, from any thread."""
        if (text := self._open.pop(owner, None)) is not None:
            text.close()


def parse_generate_response(answer: dict[str, Any], base: str) -> GenerateResponse:
    """Read what was written. Raises EngineError for what is no answer."""
    try:
        ids = [int(one) for one in answer["ids"]]
        logprobs = [float(told[str(i)]) for i, told in zip(ids, answer["told"], strict=True)]
    except (TypeError, LookupError, ValueError, AttributeError):
        ids, logprobs = [], []
    if not ids or not all(map(math.isfinite, logprobs)):
        raise EngineError(f"{base} gives no answer: {str(answer)[:200]}")
    return GenerateResponse(ids, logprobs, answer.get("cached"))


def parse_candidates(answer: dict[str, Any], base: str) -> Candidates:
    """Read the likeliest tokens of the only position. Raises EngineError for what is no answer."""
    try:
        [told] = answer["told"]
        ids = np.array([int(one) for one in told], dtype=np.int64)
        logprobs = np.array([float(one) for one in told.values()], dtype=np.float64)
    except (TypeError, LookupError, ValueError, AttributeError):
        ids, logprobs = np.zeros(0, dtype=np.int64), np.zeros(0)
    if ids.size == 0 or np.isnan(logprobs).any():
        raise EngineError(f"{base} gives no answer: {str(answer)[:200]}")
    return Candidates(ids, logprobs)
