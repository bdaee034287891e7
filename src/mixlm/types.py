"""The records that every part of mixlm shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from mixlm.option_spec import check_options, sampling_option

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")
FinishReason = Literal["stop", "length", "error"]


Floats = npt.NDArray[np.float64]
Logits = npt.NDArray[np.floating]
Ids = npt.NDArray[np.int64]
LogitsProcessor = Callable[[Ids, Logits], Logits]
HiddenStates = npt.NDArray[np.float16]


class Candidates(NamedTuple):
    """A distribution by its support: distinct ids, int64 (m,), and their natural log-probabilities, float64 (m,)."""

    ids: Ids
    logprobs: Floats


class LogitBias(NamedTuple):
    """What is added to the logits of some tokens: distinct ids, int64 (m,), and values, float64 (m,)."""

    ids: Ids
    values: Floats


LogitsRow = Logits | Candidates  # all logits of a position, or those that a `TopKFilter` keeps


@dataclass(frozen=True, eq=False)
class TopKFilter:
    """The logits that top-k sampling needs: the `k` largest of ids not `banned`, and those equal to the k-th.

    An engine may return these alone, as `Candidates` of ascending ids with logits in place of log-probabilities.

    Attributes:
        k: How many logits are needed.
        banned: Ids that are never sampled, int64, ascending.
        normalized: Whether log-probabilities over the whole vocabulary are needed, not logits up to a constant.
    """

    k: int
    banned: Ids
    normalized: bool = False

    def allows(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Return which of the ids, (n,), may be sampled: bool (n,)."""
        if self.banned.size == 0:
            return np.ones(ids.size, dtype=np.bool_)
        indices = np.minimum(np.searchsorted(self.banned, ids), self.banned.size - 1)
        allowed: npt.NDArray[np.bool_] = self.banned[indices] != ids
        return allowed

    def apply(self, candidates: Candidates) -> Candidates:
        """Return what the filter keeps of an engine's most likely tokens, which must contain all of that."""
        mask = self.allows(candidates.ids)
        ids, values = candidates.ids[mask], candidates.logprobs[mask]
        if ids.size > self.k:
            mask = values >= np.partition(values, -self.k)[-self.k]
            ids, values = ids[mask], values[mask]
        order = np.argsort(ids)
        return Candidates(ids[order], values[order])


LogitsRows = Logits | list[Candidates]  # one `LogitsRow` for each position

TopLogprobs = tuple[tuple[int, float], ...]  # ids or symbols with their log-probabilities, in descending order


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a completion may call. parameters: a JSON schema of its arguments, which are an object."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function. arguments: a JSON object, as text. id: names the call in the message with its result."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. `content` is plain text for every member, whatever it looks like.

    Attributes:
        role: Who speaks. "tool" has the result of a call.
        content: The text.
        tool_calls: Calls of the assistant.
        tool_call_id: Of the call whose result this is.
    """

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""


@dataclass(frozen=True, slots=True)
class Sampling:
    """The options of a member's transform `A_i`, applied in the order of the fields; the result is renormalized.

    Attributes:
        repetition_penalty: Divides positive and multiplies negative logits of tokens in prompt and completion.
        presence_penalty: Subtracted from the logits of tokens in the completion.
        frequency_penalty: Subtracted from the logits of tokens in the completion, once per occurrence.
        temperature: Divides the logits. 0 is for the methods `greedy` and `single` only.
        top_k: Keeps the k most likely tokens.
        top_p: Keeps the smallest set of the most likely tokens with at least this total probability.
        min_p: Keeps tokens of at least this share of the most likely token's probability.

    Raises:
        ConfigError: A value is out of range.
    """

    repetition_penalty: float = sampling_option(
        1.0, "Penalize tokens of the prompt and the completion", http="mixlm", minimum=1e-6, maximum=1e6, off=1
    )
    presence_penalty: float = sampling_option(
        0.0, "Penalize each token of the completion once", http="openai", minimum=-100, maximum=100, off=0
    )
    frequency_penalty: float = sampling_option(
        0.0, "Penalize each token of the completion, per occurrence", http="openai", minimum=-100, maximum=100, off=0
    )
    temperature: float = sampling_option(
        0.7,
        "Divide the logits by T; 0 is for greedy and single.",
        metavar="T",
        http="openai",
        minimum=0,
        least_positive=1e-30,  # below it, float32 overflows
        note="1 leaves the distribution as it is",
    )
    top_k: int = sampling_option(
        20, "Keep the K most likely tokens", metavar="K", http="mixlm", whole=True, minimum=0, off=0
    )
    top_p: float = sampling_option(
        1.0,
        "Keep the most likely tokens with total probability P",
        metavar="P",
        http="openai",
        above=0,
        maximum=1,
        off=1,
    )
    min_p: float = sampling_option(
        0.0,
        "Keep tokens of at least P times the probability of the most likely one",
        metavar="P",
        http="mixlm",
        minimum=0,
        maximum=1,
        off=0,
    )

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def has_penalties(self) -> bool:
        """Whether the transform depends on the tokens so far."""
        return bool(self.active_penalties)

    @property
    def active_penalties(self) -> tuple[str, ...]:
        """The names of the penalties that are on."""
        off = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
        return tuple(name for name, value in off.items() if getattr(self, name) != value)


PLAIN_SAMPLING = Sampling(temperature=1.0, top_k=0)  # a distribution as the model gives it


class TopLogprob(NamedTuple):
    """A symbol that could have been sampled at a position, and its natural log-probability there.

    Attributes:
        data: Its exact bytes; empty for end-of-text.
        logprob: Its log-probability.
    """

    data: bytes
    logprob: float

    @property
    def text(self) -> str:
        """The bytes as text; what is not UTF-8, such as half a character, becomes U+FFFD."""
        return self.data.decode(errors="replace")


@dataclass(frozen=True, slots=True)
class Token:
    """One symbol of a completion.

    Attributes:
        text: What it adds to the text; empty while a character is still incomplete.
        data: Its exact bytes.
        member: Name of the member that generated it; where all members take part (`conventional`, `greedy`), of the
            member that contributes most to its probability.
        logprob: Natural log-probability in the distribution it was sampled from: the sampled member's transformed
            distribution in `mixture` and `single`, the ensemble's in `conventional` and `greedy`; always the ensemble's
            with `logprobs_of="ensemble"`.
        top_logprobs: The most likely symbols of that distribution, in descending order, as many as were requested.
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
            form["alternatives"] = [{"text": top.text, "logprob": top.logprob} for top in self.top_logprobs]
        return form


@dataclass(frozen=True, slots=True)
class MemberUsage:
    """What one member contributed to a completion, and what it cost.

    Attributes:
        prompt_tokens: Length of its prompt.
        tokens: Tokens that it generated.
        forwards: Forward passes.
        forward_tokens: Tokens that ran through them.
        forward_seconds: Seconds of wall clock in them.
        dropped: Positions generated without it, because it did not respond.
        cached_tokens: Tokens of its prompt that other sequences had run, and that did not run again.
    """

    prompt_tokens: int
    tokens: int
    forwards: int
    forward_tokens: int
    forward_seconds: float
    dropped: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts and times of one completion, in seconds of wall clock.

    Attributes:
        tokens: Symbols generated.
        bytes: Bytes generated.
        seconds: Duration, with the prefill of the prompts.
        seconds_to_first_token: Time to the first token.
        members: By member's name.
        drafted: Drafted symbols that were verified.
        accepted: Those of them that were accepted.
        chosen: What `auto` did last, in words: the mixture, or what drafts and how much of it is verified at once.
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
        speeds = {"tokens_per_second": self.tokens_per_second, "bytes_per_second": self.bytes_per_second}
        return {**asdict(self), **speeds, "checked": self.drafted}  # the older name of what was drafted


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished generation.

    Attributes:
        text: The text.
        tokens: Its symbols.
        finish_reason: "stop" (end-of-text or a stop string), "length", or "error" if a member failed
            (`GenerationInterruptedError`).
        seed: The seed that reproduces it.
        usage: Counts and times.
        prompt: With `score_prompt`, the prompt's tokens, or its segments between common token boundaries of all
            members. The log-probability of a first one that nothing precedes is nan.
        end: The end-of-text that was sampled, without bytes.
        tool_calls: With `tools`, the calls in the text. If `finish_reason` is "length", the last may be incomplete.
        stop_string: The stop string that ended it, of `stop` or of a member's chat template.
    """

    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason
    seed: int
    usage: Usage
    prompt: tuple[Token, ...] = ()
    end: Token | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    stop_string: str | None = None

    def __repr__(self) -> str:
        text = f"{self.text[:60]!r}{'…' if len(self.text) > 60 else ''}"
        tokens = f"{len(self.tokens)} token{'' if len(self.tokens) == 1 else 's'}"
        return f"<Completion {text}: {tokens}, {self.finish_reason}, seed {self.seed}>"

    def _repr_html_(self) -> str:
        """Return the text for a notebook, each token in its member's colour."""
        return colored_html(self.tokens, tuple(self.usage.members))

    def as_dict(self) -> dict[str, Any]:
        """Return the form that `--json` prints."""
        prompt = {"prompt": [token.as_dict() for token in self.prompt]} if self.prompt else {}
        return {
            **prompt,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "seed": self.seed,
            "tokens": [token.as_dict() for token in self.tokens],
            "usage": self.usage.as_dict(),
        }


def colored_html(tokens: Sequence[Token], members: Sequence[str]) -> str:
    """Return text for a notebook, each token in the colour of its member. members: the names, in their order."""
    names = list(dict.fromkeys([*members, *(token.member for token in tokens)]))
    spans = "".join(
        f'<span style="color:hsl({200 + 137 * names.index(token.member)},65%,45%)" title="{escape(token.member)}">'
        f"{escape(token.text)}</span>"
        for token in tokens
    )
    return f'<pre style="white-space:pre-wrap">{spans}</pre>'
