"""The nouns that every part of mixlm shares. This module imports nothing of mixlm but its errors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from mixlm.errors import ConfigError

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
FinishReason = Literal["stop", "length", "error"]


Floats = npt.NDArray[np.float64]
Logits = npt.NDArray[np.floating]
Ids = npt.NDArray[np.int64]


class Candidates(NamedTuple):
    """A distribution by its support: distinct ids, int64 (m,), and their natural log-probabilities, float64 (m,)."""

    ids: Ids
    logprobs: Floats


class LogitBias(NamedTuple):
    """What is added to the logits of some tokens: distinct ids, int64 (m,), and values, float64 (m,)."""

    ids: Ids
    values: Floats


LogitsRow = Logits | Candidates  # logits of a whole vocabulary, or those that a `TopKFilter` keeps


@dataclass(frozen=True, eq=False)
class TopKFilter:
    """All that a choice depends on: the `k` largest logits, those of `banned` ids aside, and those equal to the k-th.

    An engine may tell these alone, as `Candidates` of ascending ids, their logits in place of log-probabilities.
    """

    k: int
    banned: Ids

    def allows(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Tell which ids, (n,), may be drawn. `banned` has to be ascending."""
        if self.banned.size == 0:
            return np.ones(ids.size, dtype=np.bool_)
        at = np.minimum(np.searchsorted(self.banned, ids), self.banned.size - 1)
        allowed: npt.NDArray[np.bool_] = self.banned[at] != ids
        return allowed

    def apply(self, told: Candidates) -> Candidates:
        """Return what it leaves of an engine's likeliest tokens, which hold at least that."""
        kept = self.allows(told.ids)
        ids, values = told.ids[kept], told.logprobs[kept]
        if ids.size > self.k:
            kept = values >= np.partition(values, -self.k)[-self.k]
            ids, values = ids[kept], values[kept]
        order = np.argsort(ids)
        return Candidates(ids[order], values[order])


LogitsRows = Logits | list[Candidates]  # one `Row` for each position

TopLogprobs = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. `content` is plain text for every member, whatever it looks like."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """One member's transform `A_i`, applied in the order of the fields; the rest is renormalised.

    repetition_penalty: divides positive and multiplies negative logits of tokens in prompt and reply; 1 is off.
    presence_penalty, frequency_penalty: subtracted once, or per occurrence, from logits of tokens in the reply.
    temperature: divides the logits. 0 is for `greedy` and `single` only.
    top_k: keeps the k most likely tokens; 0 is off. top_p: keeps the smallest set of at least this mass.
    min_p: keeps tokens of at least this share of the most likely one's probability.
    """

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    temperature: float = 0.7
    top_k: int = 20
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        positive_int = isinstance(self.top_k, int) and not isinstance(self.top_k, bool) and self.top_k >= 0
        checks = (
            ("repetition_penalty", self.repetition_penalty > 0, "greater than 0; 1 is off"),
            ("presence_penalty", abs(self.presence_penalty) <= 100, "from -100 to 100; 0 is off"),
            ("frequency_penalty", abs(self.frequency_penalty) <= 100, "from -100 to 100; 0 is off"),
            ("temperature", self.temperature >= 0, "0 or more; 1 leaves the distribution as it is"),
            ("top_k", positive_int, "a whole number, 0 or more; 0 is off"),
            ("top_p", 0 < self.top_p <= 1, "greater than 0 and at most 1; 1 is off"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1; 0 is off"),
        )
        for name, fits, allowed in checks:
            value = getattr(self, name)
            if not fits or not math.isfinite(value):
                raise ConfigError(f"{name} is {value}; it must be {allowed}")

    @property
    def has_penalties(self) -> bool:
        """Whether the transform looks at the tokens written so far."""
        return bool(self.active_penalties)

    @property
    def active_penalties(self) -> tuple[str, ...]:
        """The names of the penalties that do something."""
        off = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
        return tuple(name for name, value in off.items() if getattr(self, name) != value)


class TopLogprob(NamedTuple):
    """A symbol that could have come at a token's place, and its natural log-probability there.

    data: its exact bytes; none stand for end-of-text.
    """

    data: bytes
    logprob: float

    @property
    def text(self) -> str:
        """The bytes as text; what is no UTF-8, half a character for one, as U+FFFD."""
        return self.data.decode(errors="replace")


@dataclass(frozen=True, slots=True)
class Token:
    """One step of a text.

    text: what this token adds to the text; empty while a character is still incomplete.
    data: its exact bytes. member: name of the member that wrote it; where every member took part (`conventional`,
    `greedy`), the one that gave it the largest part of its probability.
    logprob: natural log-probability under the law it was drawn from: the drawn member's transformed distribution in
    `mixture` and `single`, the ensemble's in `conventional` and `greedy`; the ensemble's everywhere with
    `logprobs_of="ensemble"`.
    alternatives: the likeliest symbols of that law, the likeliest first, as many as were asked for and it has.
    """

    text: str
    data: bytes
    member: str
    logprob: float
    top_logprobs: tuple[TopLogprob, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the form that `--json` prints."""
        logprob = None if math.isnan(self.logprob) else self.logprob
        form: dict[str, Any] = {"text": self.text, "member": self.member, "logprob": logprob}
        if self.top_logprobs:
            form["alternatives"] = [{"text": one.text, "logprob": one.logprob} for one in self.top_logprobs]
        return form


@dataclass(frozen=True, slots=True)
class MemberUsage:
    """What one member did: its prompt's length, tokens written, forward passes, and tokens run through them.

    dropped: positions that were written without it, because it did not answer.
    """

    prompt_tokens: int
    tokens: int
    forwards: int
    forward_tokens: int
    forward_seconds: float
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """Figures of one reply. Times are seconds of wall clock; `seconds` includes the prompts' prefill.

    checked and accepted: guesses of what comes next, and how many were right. chosen: what `auto` used last.
    """

    tokens: int
    bytes: int
    seconds: float
    seconds_to_first_token: float
    members: Mapping[str, MemberUsage] = field(default_factory=dict)
    drafted: int = 0
    accepted: int = 0
    chosen: str | None = None

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first over the time after the first: the speed of decoding, without the prefill."""
        rest = self.seconds - self.seconds_to_first_token
        return (self.tokens - 1) / rest if self.tokens > 1 and rest > 0 else 0.0

    @property
    def bytes_per_second(self) -> float:
        """Bytes at the speed of `tokens_per_second`."""
        return self.tokens_per_second * self.bytes / self.tokens if self.tokens else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the form that `--json` prints."""
        return {
            "tokens": self.tokens,
            "bytes": self.bytes,
            "seconds": self.seconds,
            "seconds_to_first_token": self.seconds_to_first_token,
            "tokens_per_second": self.tokens_per_second,
            "bytes_per_second": self.bytes_per_second,
            "members": {name: asdict(one) for name, one in self.members.items()},
            "checked": self.drafted,
            "accepted": self.accepted,
            "chosen": self.chosen,
        }


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished reply. `finish_reason` is "stop" (end of text or a stop string), "length", or "error"
    where a member failed (`GenerationInterruptedError`).

    prompt: with `score_prompt`, the prompt's tokens, or the segments between places where all members have a boundary;
    the log-probability of what nothing is in front of is nan. end: the end-of-text that was drawn, without bytes.
    """

    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason
    seed: int
    usage: Usage
    prompt: tuple[Token, ...] = ()
    end: Token | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the form that `--json` prints."""
        prompt = {"prompt": [one.as_dict() for one in self.prompt]} if self.prompt else {}
        return {
            **prompt,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "seed": self.seed,
            "tokens": [one.as_dict() for one in self.tokens],
            "usage": self.usage.as_dict(),
        }
