"""What passes between the event loop and the thread that runs the models: jobs one way, events the other."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mixlm.types import Completion, Token

CancelReason = Literal["gone", "timeout", "shutdown"]


@dataclass(frozen=True, slots=True)
class JobQueued:
    """All prompts of the job are encoded and fit; its generations are queued. time: of `time.monotonic`."""

    time: float


@dataclass(frozen=True, slots=True)
class GenerationStarted:
    """A generation has left the queue. time: of `time.monotonic`."""

    time: float


@dataclass(frozen=True, slots=True)
class TokensGenerated:
    """New tokens of one generation, and its completion once it is finished.

    forwards: for each member that ran since the previous event, the number of tokens in each forward pass.
    """

    index: int
    tokens: Sequence[Token]
    forwards: Mapping[str, Sequence[int]]
    completion: Completion | None = None


@dataclass(frozen=True, slots=True)
class JobFailed:
    """A generation raised an error, which ends the whole job."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class JobCancelled:
    """The job was cancelled."""

    reason: CancelReason


JobEvent = JobQueued | GenerationStarted | TokensGenerated | JobFailed | JobCancelled


class Job:
    """The generations of one request. It belongs to the event loop; the model thread reads only `client`.

    Args:
        client: Who sent the request; clients take turns.
        num_generations: How many generations it consists of.

    Attributes:
        events: What happened to the job, in order.
        unfinished: Number of generations that have not ended.
        started: Whether the model thread has its generations.
        cancelled: Whether the job was cancelled.
    """

    def __init__(self, client: str, num_generations: int) -> None:
        self.client = client
        self.events: asyncio.Queue[JobEvent] = asyncio.Queue()
        self.unfinished = num_generations
        self.started = False
        self.cancelled = False
