"""What passes between the event loop and the thread that runs the models."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mixlm.core.options import GenerationOptions
from mixlm.ensemble import Ensemble, Prompt
from mixlm.types import Completion, Token

Reason = Literal["gone", "timeout", "shutdown"]


@dataclass(frozen=True, slots=True)
class Task:
    """One reply that is wanted."""

    prompt: Prompt
    settings: GenerationOptions


@dataclass(frozen=True, slots=True)
class Begun:
    """All prompts of an order fit; its replies wait for their turn. at: when, as `time.monotonic` says."""

    at: float


@dataclass(frozen=True, slots=True)
class Started:
    """A reply has left the line, and is being written. at: when, as `time.monotonic` says."""

    at: float


@dataclass(frozen=True, slots=True)
class Wrote:
    """Tokens that a reply has got, and the whole of it once it is finished.

    forwards: of each member that ran since the event before, the tokens of each of its passes.
    """

    index: int
    tokens: Sequence[Token]
    forwards: Mapping[str, Sequence[int]]
    completion: Completion | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """A reply ended by an error, and the whole order with it."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class Closed:
    """The order was given up."""

    reason: Reason


Event = Begun | Started | Wrote | Failed | Closed


class Order:
    """Replies that one request asks for. Belongs to the event loop; the thread only reads what never changes.

    client: who asks, for taking turns. events: what became of it, in order. left: replies that have not ended.
    """

    def __init__(self, client: str, ensemble: Ensemble, tasks: Sequence[Task]) -> None:
        self.client = client
        self.ensemble = ensemble
        self.tasks = tuple(tasks)
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.left = len(self.tasks)
        self.closed = False
