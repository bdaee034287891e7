"""The client's side of mixlm's route in vLLM's server: one connection a text (`vllm_session` has the other side)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixlm.engines.base import Written
from mixlm.errors import EngineError
from mixlm.sampling import Candidates, Ids
from mixlm.vocab.units import TokenBuffer

PATH = "/v1/mixlm/session"


@dataclass(frozen=True)
class Line:
    """What it takes to connect: the server's URL, its key, seconds to wait for a connection and for an answer."""

    base: str
    key: str | None
    connect: float
    answer: float

    def open(self) -> Connection:
        """Connect. Raises EngineError when the server has no such route, or does not answer."""
        from websockets.exceptions import WebSocketException
        from websockets.sync.client import connect

        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            socket = connect(
                self.base.replace("http", "ws", 1) + PATH,
                additional_headers=headers,
                open_timeout=self.connect,
                compression=None,
                max_size=None,
                proxy=None,
            )
        except (OSError, WebSocketException) as error:
            raise EngineError(f"{self.base} does not open a session: {error or type(error).__name__}") from error
        return Connection(self, socket)


class Connection:
    """One text on a server."""

    def __init__(self, line: Line, socket: Any) -> None:
        self._line = line
        self._socket = socket
        self._held = TokenBuffer(np.zeros(0, dtype=np.int64))

    def close(self) -> None:
        """End the text. Returns at once."""
        self._socket.socket.close()

    def write(self, ids: Ids, parameters: dict[str, Any], banned: str = "") -> dict[str, Any]:
        """Write on behind `ids`, and return the answer: `ids`, and what is `told` of each, by id.

        Raises EngineError where the connection is gone, which is then of no further use, or the server refuses.
        """
        from websockets.exceptions import WebSocketException

        held = self._held.ids
        shorter = min(len(held), len(ids))
        same = held[:shorter] == ids[:shorter]
        keep = shorter if same.all() else int(np.argmin(same))
        message = {"keep": keep, "ids": ids[keep:].tolist(), "parameters": parameters, "banned": banned}
        try:
            self._socket.send(json.dumps(message))
            answer = json.loads(self._socket.recv(timeout=self._line.answer))
        except (OSError, EOFError, ValueError, WebSocketException) as error:  # TimeoutError is an OSError
            self.close()
            raise EngineError(f"{self._line.base} does not answer: {error or type(error).__name__}") from error
        if "error" in answer or not answer.get("ids"):
            self.close()
            raise EngineError(f"{self._line.base} refuses: {str(answer.get('error', answer))[:200]}")
        self._held.rewrite(len(held), np.concatenate([ids, answer["ids"]]))
        return dict(answer)


def written_in_session(answer: dict[str, Any], base: str) -> Written:
    """Read what was written. Raises EngineError for what is no answer."""
    try:
        ids = [int(one) for one in answer["ids"]]
        logprobs = [float(told[str(i)]) for i, told in zip(ids, answer["told"], strict=True)]
    except (TypeError, LookupError, ValueError, AttributeError):
        ids, logprobs = [], []
    if not ids or not all(map(math.isfinite, logprobs)):
        raise EngineError(f"{base} gives no answer: {str(answer)[:200]}")
    return Written(ids, logprobs)


def likeliest_in_session(answer: dict[str, Any], base: str) -> Candidates:
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
