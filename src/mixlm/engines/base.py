"""A loaded model, one sequence on it, and the two questions that can be asked of it.

The cache is an optimisation and nothing else: what a session answers depends on the ids alone. One method gives append,
rollback and lazy catch-up: the session keeps the longest common prefix of what it ran before, drops the rest, and runs
what is missing in one forward. A member that is not asked does nothing.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from copy import copy
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from mixlm.engines.spec import EngineSpec
from mixlm.errors import PromptTooLongError, UnsupportedError, UsageError
from mixlm.tokenization.chat_template import PromptEncoder
from mixlm.tokenization.incremental import Encoder
from mixlm.tokenization.vocabulary import Vocabulary
from mixlm.types import Floats, Ids, Logits, LogitsRows, Sampling, TopKFilter, TopLogprobs
from mixlm.units.base import TokenBuffer

_SCORED_AT_ONCE = 128


class SampleResponse(NamedTuple):
    """A symbol drawn from one member, its natural log-probability under what it was drawn from, and what else it had.

    likeliest: symbols of that law and their log-probabilities, where they were asked for.
    """

    symbol: int
    logprob: float
    top_logprobs: TopLogprobs = ()


@dataclass(frozen=True, slots=True)
class LogitsRequest:
    """Ask a member for its logits after each of the last `last` prefixes of `ids`. Reply: float (last, vocab).

    cut: what of the logits is needed; an engine may reply with one `Row` for each prefix, cut or whole.
    """

    member: int
    ids: Ids
    last: int = 1
    top_k_filter: TopKFilter | None = None


@dataclass(frozen=True, slots=True)
class RunAheadHint:
    """What it takes to draw as `choose` will, and so to go on before the next question comes.

    keys: of the draws that lead to another one of the same member, this position's first: `Noise.sample_key`, at least
    one. sampling: the member's options. symbols: the shared symbol of each of its ids, int64 (vocab,).
    """

    keys: tuple[int, ...]
    sampling: Sampling
    symbols: Ids


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """Ask a member for one symbol after `ids`, drawn with `choose`. Reply: Drawn.

    choose: called with the logits (vocab,); where `cut` says what of them is needed, with any `Row`. ahead: for engines
    that want it (`Engine.ahead`), what is probably asked next. It changes no reply.
    """

    member: int
    ids: Ids
    sample: Callable[[Any], SampleResponse]
    top_k_filter: TopKFilter | None = None
    run_ahead: RunAheadHint | None = None


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Ask a member to write on behind `ids` by itself: `length` tokens, or fewer where one of them ends the text.

    sampling, banned: its transform `A_i`; the options, and the ids that it may not draw, int64. seed: of the engine's
    own random numbers, 0 to 2**63 - 1. Only for engines that say they can (`Engine.writes`). Reply: Written.
    """

    member: int
    ids: Ids
    max_tokens: int
    sampling: Sampling
    banned: Ids
    seed: int


class GenerateResponse(NamedTuple):
    """What a member wrote by itself: its own ids, and their natural log-probabilities under its transform.

    cached: tokens in front of them that it had read before, where the engine knows better than its session.
    """

    ids: list[int]
    logprobs: list[float]
    cached_tokens: int | None = None


Request = LogitsRequest | SampleRequest | GenerateRequest
Response = Any  # what the request's docstring says


class Forward(NamedTuple):
    """One sequence's part in a forward pass: tokens run, tokens already in the cache, seconds that it was waited for.

    Where several sequences were run at once, `rows` is how many, and seconds are shared out by tokens.
    """

    tokens: int
    cached: int
    seconds: float
    batch_size: int = 1


@dataclass
class SessionStats:
    """What a session has done so far. log: the forwards that answered questions.

    ahead: how many of these were run before they were asked for. vain: how many others were run, and never asked for.
    """

    forwards: list[Forward] = field(default_factory=list)
    run_ahead: int = 0
    wasted: int = 0

    @property
    def tokens(self) -> int:
        """Tokens run in all forwards."""
        return sum(one.tokens for one in self.forwards)

    @property
    def seconds(self) -> float:
        """Time spent in all forwards."""
        return sum(one.seconds for one in self.forwards)


class Session(ABC):
    """One sequence on one engine. Subclasses say how to cut the cache and how to run a forward.

    keeps_cache: false for a model that has to read the whole sequence every time.
    """

    keeps_cache = True

    def __init__(self, context_length: int) -> None:
        self.context_length = context_length
        self.stats = SessionStats()
        self._cached = TokenBuffer(np.zeros(0, dtype=np.int64))
        self._latest: Logits | None = None

    def logits(self, ids: Ids, last: int = 1) -> Logits:
        """Return the logits after each of the last `last` prefixes of `ids`: float32 (last, vocab).

        Raises UsageError for no ids, PromptTooLongError for more than the context holds.
        """
        keep = self.rollback(ids, last)
        if keep is None:
            return self.last_logits
        start = time.perf_counter()
        try:
            out = self._forward(ids[keep:], last)
        except BaseException:
            self.reset()
            raise
        self.record(ids, out, Forward(len(ids) - keep, keep, time.perf_counter() - start))
        return out

    def logits_rows(self, ids: Ids, last: int = 1, cut: TopKFilter | None = None) -> LogitsRows:
        """Return what `logits` does; engines for which it is cheaper, only what `cut` leaves of it."""
        return self.logits(ids, last)

    @property
    def last_logits(self) -> Logits:
        """The logits after the last token of the last question: float32 (1, vocab)."""
        assert self._latest is not None
        return self._latest

    @property
    def has_run_ahead(self) -> bool:
        """Whether something was run that nobody has asked for yet; it is looked at for one question at a time."""
        return False

    def rollback(self, ids: Ids, last: int = 1) -> int | None:
        """Cut the cache to what it has in common with a question, and return how many tokens it then holds.

        None where nothing is missing, and `latest` is the answer. Raises what `logits` raises. For engines that run
        several sessions at once; `settle` or `forget` follows.
        """
        if not 1 <= last <= len(ids):
            raise UsageError(
                f"{last} positions were asked of a sequence of {len(ids)} tokens", "ask for 1 or more of them"
            )
        if len(ids) > self.context_length:
            raise PromptTooLongError(
                f"{len(ids)} tokens are more than the context of {self.context_length}", "shorten the prompt"
            )
        cached = self._cached.ids
        common = common_prefix(cached, ids)
        if last == 1 and common == len(ids) == len(cached) and self._latest is not None:
            return None
        keep = min(common, len(ids) - last) if self.keeps_cache else 0
        if keep < len(cached):
            try:
                keep = self._truncate(keep)
            except BaseException:
                self.reset()
                raise
        self._cached.replace_tail(len(cached) - keep, [])
        return keep

    def record(self, ids: Ids, logits: Logits | None, forward: Forward) -> None:
        """Take down that a question was run. logits: float32 (last, vocab); None where not all of them are known."""
        self.stats.forwards.append(forward)
        self._cached.replace_tail(0, ids[forward.cached :])
        self._latest = None if logits is None else logits[-1:]

    def reset(self) -> None:
        """Start anew: interrupted or out of memory, what the cache holds is unknown."""
        self._cached.replace_tail(len(self._cached.ids), [])
        self._latest = None
        self._truncate(0)

    def token_logprobs(self, ids: Ids) -> Floats:
        """Return the log-probability of each id but the first, given those before it: float64 (len(ids) - 1,).

        The distributions are the model's own, over the whole vocabulary. The cache ends up holding all of `ids`, so a
        reply to them needs no forward of its own for its first token. Logits are looked at in parts, so that they never
        lie in memory at once.
        """
        out = np.empty(max(len(ids) - 1, 0))
        for start in range(0, len(ids), _SCORED_AT_ONCE):
            end = min(start + _SCORED_AT_ONCE, len(ids))
            targets = ids[start + 1 : end + 1]
            logits = self.logits(ids[:end], last=end - start)[: len(targets)]
            out[start : start + len(targets)] = logits[np.arange(len(targets)), targets] - self._log_normalizers(logits)
        return out

    def generate(self, run: GenerateRequest) -> GenerateResponse:
        """Write on by itself. Raises UnsupportedError where the engine cannot, EngineError where it fails."""
        raise UnsupportedError(f"this engine writes no runs; {run.max_tokens} tokens were asked for")

    def record_generation(self, ids: Ids, written: GenerateResponse, seconds: float) -> None:
        """Take down a run behind `ids`: a forward for each token, of which the first also caught up."""
        before = common_prefix(self._cached.ids, ids)
        if written.cached_tokens is not None:
            before = min(written.cached_tokens, len(ids) - 1)
        each = seconds / len(written.ids)
        for at in range(len(written.ids)):
            self.stats.forwards.append(
                Forward(1, len(ids) + at - 1, each) if at else Forward(len(ids) - before, before, each)
            )
        self._cached.replace_tail(len(self._cached.ids), np.concatenate([ids, written.ids]))
        self._latest = None

    def _log_normalizers(self, logits: Logits) -> Floats:
        """Return log Σ exp of each row."""
        top = logits.max(axis=1)
        sums: Floats = top + np.log(np.exp(logits - top[:, None]).sum(axis=1, dtype=np.float64))
        return sums

    @abstractmethod
    def _truncate(self, length: int) -> int:
        """Cut the cache to its first `length` tokens. Returns how many it kept: `length`, or 0 if it cannot be cut."""

    @abstractmethod
    def _forward(self, ids: Ids, last: int) -> Logits:
        """Run `ids` behind the cache and return the logits of the last `last` positions: float32 (last, vocab)."""


class Engine(ABC):
    """A loaded model with its tokenizer.

    stops: strings that end a reply by the model's prompt template. notes: what a user should know about this model.
    details: dtype, device and the like, for reports. reading: the tokenizer's family, its normaliser, its leading-space
    rule and where its prompt template is from, for reports. weights_bytes: memory of the weights. device: what it runs
    on; engines on equal devices are asked in turn. candidates: how many of its likeliest tokens it can tell, None for
    all; the logits of such an engine are -inf for the others, and right up to a constant for these. at_once: it has a
    queue of its own, and is best handed each question as it comes, with `begin`.
    """

    name: str
    vocabulary: Vocabulary
    encoder: Encoder
    prompts: PromptEncoder
    context_length: int
    stops: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    details: Mapping[str, str] = MappingProxyType({})
    tokenizer_info: Mapping[str, str] = MappingProxyType({})
    weights_bytes: int = 0
    device: Any = "cpu"
    top_k_limit: int | None = None
    asynchronous: bool = False

    @property
    def batch_key(self) -> int:
        """What tells its forwards from others': engines that are equal in it answer for each other's sessions."""
        return id(self)

    @property
    def run_ahead_depth(self) -> int:
        """How many positions behind the one in question it wants to know of (`Draw.ahead`); 0 for none."""
        return 0

    @property
    def weight_parts(self) -> Mapping[Hashable, int]:
        """Bytes of each part of the weights, by what tells it from others: engines may have parts in common."""
        return {id(self): self.weights_bytes}

    @abstractmethod
    def session(self) -> Session:
        """Begin a sequence, with an empty cache."""

    def samples_itself(self, sampling: Sampling, banned: Ids) -> bool:
        """Whether it can draw with these options by itself, and write runs of tokens (`Run`) in that way."""
        return False

    def replica(self) -> Engine:
        """Return an engine on the same weights that is asked for itself, as another model of its size would be."""
        return copy(self)

    def with_spec(self, spec: EngineSpec) -> Engine | None:
        """Return an engine on the same weights with the spec's prompts and adapter; None where that cannot be.

        The spec's `weights` are those of this engine's own.
        """
        return None

    def respond(self, requests: Sequence[tuple[Session, Request]]) -> list[Response]:
        """Answer all that is asked of this engine at one moment, in order. An engine that can batch overrides this."""
        return [respond(session, request) for session, request in requests]

    def submit(self, session: Session, request: Request) -> Future[Any]:
        """Hand over one question, and return at once; `completed` makes its reply of what the future brings.

        Only for engines that are asked `at_once`.
        """
        raise UnsupportedError("this engine is handed no questions one by one; `answer` is")

    def alive(self) -> bool:
        """Whether an engine that has failed can be asked again. Takes no longer than a few seconds."""
        return True


def total_weight_bytes(engines: Iterable[Engine]) -> int:
    """Return the memory of the weights of several engines in bytes; what they have in common counts once."""
    return sum({key: size for one in engines for key, size in one.weight_parts.items()}.values())


def respond(session: Session, request: Request) -> Response:
    """Answer one request with a session's logits."""
    if isinstance(request, SampleRequest):
        return request.sample(session.logits_rows(request.ids, 1, request.top_k_filter)[0])
    if isinstance(request, GenerateRequest):
        return session.generate(request)
    return session.logits_rows(request.ids, request.last, request.top_k_filter)


def to_response(request: Request, found: Any) -> Response:
    """Return the reply to a request that was handed over with `Engine.begin`."""
    return request.sample(found[0]) if isinstance(request, SampleRequest) else found


def common_prefix(a: Ids, b: Ids) -> int:
    """Return the length of the longest common prefix."""
    length = min(len(a), len(b))
    same = a[:length] == b[:length]
    return length if same.all() else int(np.argmin(same))
