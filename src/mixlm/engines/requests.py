"""What engines are asked and what they answer: requests, responses, and the record of a session's forward passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from mixlm.errors import EngineError, UnsupportedError
from mixlm.types import Candidates, HiddenStates, Ids, LogitsRows, Sampling, TopKFilter, TopLogprobs


class SampleResponse(NamedTuple):
    """A symbol sampled from one member.

    logprob: natural logarithm of its probability in the distribution that it was sampled from. top_logprobs: the most
    probable symbols of that distribution with their log-probabilities, where they were requested.
    """

    symbol: int
    logprob: float
    top_logprobs: TopLogprobs = ()


# For engines with a `top_k_limit`: which ids count after each of the prefixes, bool (vocab,), or None for all of them;
# () for no such restriction. They return the most likely tokens among these.
AllowedIds = Sequence[npt.NDArray[np.bool_] | None]


@dataclass(frozen=True, slots=True)
class LogitsRequest:
    """Request a member's logits after each of the last `last` prefixes of `ids`, int64. Response: `LogitsRows`.

    top_k_filter: which logits are needed, None for all. With a filter, an engine may return one `LogitsRow` for each
    prefix, filtered or whole; without one it returns float32 (last, vocab). hidden: request the hidden states of these
    positions too, of an engine with a `hidden_size`; the response is `LogitsAndHidden`. allowed: see `AllowedIds`.
    """

    member: int
    ids: Ids
    last: int = 1
    top_k_filter: TopKFilter | None = None
    hidden: bool = False
    allowed: AllowedIds = ()
    run_ahead: ClassVar[None] = None


class LogitsAndHidden(NamedTuple):
    """Logits, and the inputs of the output layer that they are computed from: float16 (last, `hidden_size`)."""

    logits: LogitsRows
    hidden: HiddenStates


@dataclass(frozen=True, slots=True)
class RunAheadHint:
    """What an engine needs to sample as the host will, and so to run further tokens before they are requested.

    keys: `Noise.sample_key` of each position that the same member samples next, this position's first; at least one.
    sampling: the member's options. symbols: the unit's symbol of each of its ids, int64 (vocab,).
    """

    keys: tuple[int, ...]
    sampling: Sampling
    symbols: Ids


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """Request one symbol after `ids`, sampled on the host. Response: `SampleResponse`.

    sample: called with the logits (vocab,), or with any `LogitsRow` where there is a `top_k_filter`. allowed: see
    `AllowedIds`; of one prefix. run_ahead: what will probably be requested next, for engines with a `run_ahead_depth`.
    It changes no response.
    """

    member: int
    ids: Ids
    sample: Callable[[Any], SampleResponse]
    top_k_filter: TopKFilter | None = None
    run_ahead: RunAheadHint | None = None
    allowed: AllowedIds = ()
    last: ClassVar[int] = 1
    hidden: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Request that the engine itself samples up to `max_tokens` tokens after `ids`. Response: `GenerateResponse`.

    Only for engines whose `samples_itself` is true. sampling, banned: the member's transform `A_i`, as options and ids,
    int64, that may not be sampled. seed: of the engine's random number generator, 0 to 2**63 - 1.
    """

    member: int
    ids: Ids
    max_tokens: int
    sampling: Sampling
    banned: Ids
    seed: int
    last: ClassVar[int] = 1


class GenerateResponse(NamedTuple):
    """Tokens that an engine sampled itself: the member's ids, and their log-probabilities under its transform.

    cached_tokens: prompt tokens found in the prefix cache, where the engine reports them.
    """

    ids: list[int]
    logprobs: list[float]
    cached_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Request the log-probability of each of `ids`, int64 (n,), but the first. Response: float64 (n - 1,).

    For engines with a `top_k_limit`; of others, the logits are requested. See `Session.token_logprobs`.
    """

    member: int
    ids: Ids
    last: ClassVar[int] = 1


ForwardRequest = LogitsRequest | SampleRequest  # served from the logits of a forward pass
Request = ForwardRequest | GenerateRequest | ScoreRequest
Response = Any  # see the docstring of each request


class Forward(NamedTuple):
    """One sequence's part in a forward pass: tokens run, tokens already in the KV cache, seconds of waiting.

    batch_size: sequences in the pass. Its time is divided among them by their tokens.
    """

    tokens: int
    cached: int
    seconds: float
    batch_size: int = 1


@dataclass
class SessionStats:
    """Forward passes of a session.

    forwards: those that served requests. run_ahead: how many of these ran before they were requested. wasted: how many
    others ran ahead and were never requested. cached_tokens: that other sequences had run, and that did not run again.
    """

    forwards: list[Forward] = field(default_factory=list)
    run_ahead: int = 0
    wasted: int = 0
    cached_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Tokens run in all forward passes."""
        return sum(forward.tokens for forward in self.forwards)

    @property
    def seconds(self) -> float:
        """Time spent in all forward passes."""
        return sum(forward.seconds for forward in self.forwards)


def to_response(request: Request, result: Any, hidden: HiddenStates | None = None) -> Response:
    """Return the response to a request.

    Args:
        request: The request.
        result: The logits, `LogitsRows`, that the engine computed for it; or its `GenerateResponse`, or its scores.
        hidden: The hidden states of the last positions of the forward, float16 (n, width), where they are kept.

    Raises:
        EngineError: The logits are not numbers.
        UnsupportedError: Hidden states were requested, and the engine has none.
    """
    if isinstance(request, GenerateRequest | ScoreRequest):
        return result
    check_logits(result, len(request.ids))
    if isinstance(request, SampleRequest):
        return request.sample(result[0])
    if not request.hidden:
        return result
    if hidden is None:
        raise UnsupportedError("this engine gives no hidden states", "use --engine hf (engine='hf')")
    return LogitsAndHidden(result, hidden[-request.last :])


Rows = TypeVar("Rows", bound=LogitsRows)


def check_logits(rows: Rows, length: int) -> Rows:
    """Return logits in which every position has a largest finite one, and nan or +inf nowhere.

    Args:
        rows: The logits after each of the last prefixes of some ids.
        length: The number of ids.

    Raises:
        EngineError: A position has nan or +inf, or nothing but -inf.
    """
    for index, row in enumerate(rows):
        values = row.logprobs if isinstance(row, Candidates) else row
        # The maximum is nan where there is one.
        if values.size and not np.isfinite(largest := values.max()):
            what = "all -inf" if largest == -np.inf else f"not finite: one is {largest}"
            raise EngineError(
                f"the logits after {length - len(rows) + index + 1} tokens are {what}",
                "try --dtype float32; where that is no different, the weights are damaged",
            )
    return rows
