"""The client of mixlm's route in vLLM's server: one WebSocket a sequence (`vllm/session_plugin` is the other side)."""

from __future__ import annotations

import asyncio
import json
import weakref
from collections.abc import Awaitable, Callable
from contextlib import suppress
from importlib.util import find_spec
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from mixlm.engines.base import common_prefix
from mixlm.engines.remote.http_client import HttpClient
from mixlm.engines.vllm.sampling_params import SESSION_PATH
from mixlm.errors import EngineError, RequestRefusedError
from mixlm.types import Ids
from mixlm.units.base import TokenBuffer


class SessionConnection:
    """One sequence's connection. To be used in the event loop that it was opened in, except for `close`.

    Args:
        client: of the server.
        socket: an open connection of `websockets`.
    """

    def __init__(self, client: HttpClient, socket: Any) -> None:
        self._base_url, self._seconds = client.base_url, client.limits.response
        self._socket = socket
        self._tokens = TokenBuffer(np.zeros(0, dtype=np.int64))  # of the sequence, as the server has it
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def open(cls, client: HttpClient) -> SessionConnection:
        """Connect. Raises EngineError when the server has no such route, or does not answer."""
        from websockets.asyncio.client import connect
        from websockets.exceptions import WebSocketException

        try:
            socket = await connect(
                client.base_url.replace("http", "ws", 1) + SESSION_PATH,
                additional_headers={"Authorization": f"Bearer {client.key}"} if client.key else {},
                open_timeout=client.limits.connect,
                compression=None,
                max_size=None,
                proxy=None,
                ping_interval=None,
            )
        except (OSError, WebSocketException) as error:
            raise EngineError(f"{client.base_url} does not open a session: {error or type(error).__name__}") from error
        client.count_connection()
        return cls(client, socket)

    def close(self) -> None:
        """Disconnect, from any thread. Returns at once."""
        with suppress(RuntimeError):  # the loop has stopped, and the connection with it
            self._loop.call_soon_threadsafe(self._socket.transport.abort)

    async def generate(self, ids: Ids, parameters: dict[str, Any], banned: str = "") -> dict[str, Any]:
        """Continue the sequence, which may have been changed, and return the server's response.

        Args:
            ids: the whole prompt; only what is new is sent.
            parameters: of `vllm.SamplingParams`.
            banned: ids that may not be sampled, as ranges.

        Raises:
            EngineError: the connection is gone, and of no further use, or the server fails.
            RequestRefusedError: the server refuses the request.
        """
        from websockets.exceptions import WebSocketException

        tokens = self._tokens.ids
        keep = common_prefix(tokens, ids)
        message = {"keep": keep, "ids": ids[keep:].tolist(), "parameters": parameters, "banned": banned}
        try:
            async with asyncio.timeout(self._seconds):
                await self._socket.send(json.dumps(message))
                response = json.loads(await self._socket.recv())
        except (OSError, ValueError, WebSocketException) as error:  # TimeoutError is an OSError
            self.close()
            raise EngineError(f"{self._base_url} does not answer: {error or type(error).__name__}") from error
        except BaseException:
            self.close()
            raise
        if not isinstance(response, dict) or "error" in response or not response.get("ids"):
            self.close()
            fields = response if isinstance(response, dict) else {}
            refusal = f"{self._base_url} refuses: {str(fields.get('error', response))[:200]}"
            raise RequestRefusedError(refusal) if fields.get("refused") else EngineError(refusal)
        self._tokens.replace_tail(len(tokens), np.concatenate([ids, response["ids"]]))
        return response


class SessionPool:
    """The connections of sequences to one server's session route.

    Args:
        client: of the server.
        check: raises EngineError where the server has another model than it had.
    """

    def __init__(self, client: HttpClient, check: Callable[[], Awaitable[None]]) -> None:
        self._client = client
        self._check = check
        self._connections: WeakKeyDictionary[Any, SessionConnection] = WeakKeyDictionary()

    async def is_available(self) -> bool:
        """Whether the server has the route and accepts the key, and `websockets` is installed here."""
        if find_spec("websockets") is None:
            return False
        try:
            (await SessionConnection.open(self._client)).close()
        except EngineError:
            return False
        return True

    async def generate(self, owner: object, ids: Ids, parameters: dict[str, Any], banned: str = "") -> dict[str, Any]:
        """Continue the owner's sequence, as `SessionConnection.generate` does; reconnect where the connection is gone.

        The server ends sessions that were idle. Raises EngineError.
        """
        if (connection := self._connections.get(owner)) is not None:
            try:
                return await connection.generate(ids, parameters, banned)
            except EngineError:
                self.release(owner)
        connection = await SessionConnection.open(self._client)
        try:
            await self._check()
            response = await connection.generate(ids, parameters, banned)
        except BaseException:
            connection.close()
            raise
        self._connections[owner] = connection
        weakref.finalize(owner, connection.close)
        return response

    def release(self, owner: object) -> None:
        """Close the owner's connection, from any thread."""
        if (connection := self._connections.pop(owner, None)) is not None:
            connection.close()

    def close(self) -> None:
        """Close all connections, from any thread. A sequence that goes on opens a new one."""
        for owner in list(self._connections):
            self.release(owner)
