"""The interface of an engine: a loaded model, and a session for each sequence; `requests` has what they serve.

The KV cache is an optimisation and nothing else: what a session returns depends on the token ids alone. A session keeps
the longest common prefix of its cache and the requested ids, rolls back the rest, and runs the missing tokens in one
forward pass. That covers appending, rollback and catch-up; a member that gets no request does no work.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from copy import copy
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from mixlm.engines.requests import (
    AllowedIds,
    Forward,
    GenerateRequest,
    GenerateResponse,
    Request,
    Response,
    ScoreRequest,
    SessionStats,
    check_logits,
    to_response,
)
from mixlm.errors import PromptTooLongError, UnsupportedError, UsageError
from mixlm.tokenization.incremental import Encoder
from mixlm.tokenization.prompt_encoder import PromptEncoder
from mixlm.tokenization.vocabulary import Vocabulary
from mixlm.types import Floats, HiddenStates, Ids, Logits, LogitsRows, Sampling, TopKFilter
from mixlm.units.base import TokenBuffer

# Of transformers alone.
LOADING_OPTIONS = ("device_map", "max_memory", "quantization", "revision", "attn")
_LOGPROBS_CHUNK = 128  # positions


class Session(ABC):
    """One sequence on one engine. A backend implements `forward` and `truncate`.

    keeps_cache: false for a model that runs the whole sequence every time. keeps_hidden: whether forwards keep hidden
    states in `hidden_states`, float16 (n, width): those of the last forward's last positions, n of them or more.
    """

    keeps_cache = True
    keeps_hidden = False
    hidden_states: HiddenStates | None = None

    def __init__(self, context_length: int) -> None:
        self.context_length = context_length
        self.stats = SessionStats()
        self._cached = TokenBuffer(np.zeros(0, dtype=np.int64))
        self._last_logits: Logits | None = None

    @abstractmethod
    def forward(self, ids: Ids, last: int) -> Logits:
        """Run `ids` after the cached ones and return the logits of the last `last` positions: float32 (last, vocab)."""

    @abstractmethod
    def truncate(self, length: int) -> int:
        """Cut the KV cache to its first `length` tokens, or fewer if it can only return to an earlier point.

        Returns how many it kept: 0 to `length`.
        """

    def logits(self, ids: Ids, last: int = 1) -> Logits:
        """Return the logits after each of the last `last` prefixes of `ids`: float32 (last, vocab).

        Raises:
            UsageError: `ids` is empty, or has fewer than `last` tokens.
            PromptTooLongError: `ids` has more tokens than the context.
        """
        cached = self.rollback(ids, last)
        if cached is None:
            return self.last_logits
        start = time.perf_counter()
        try:
            logits = self.forward(ids[cached:], last)
        except BaseException:
            self.reset()
            raise
        self.record(ids, logits, Forward(len(ids) - cached, cached, time.perf_counter() - start))
        return logits

    def logits_rows(
        self, ids: Ids, last: int = 1, top_k_filter: TopKFilter | None = None, allowed: AllowedIds = ()
    ) -> LogitsRows:
        """Return what `logits` does, or only what the filter keeps of it where that is cheaper.

        allowed: for engines with a `top_k_limit`, see `AllowedIds`.
        """
        return self.logits(ids, last)

    def keep_hidden(self) -> None:
        """Keep the hidden states of every forward from now on, where the engine has a `hidden_size`."""
        if not self.keeps_hidden:
            self.keeps_hidden = True
            self._last_logits = None  # they are of a forward whose hidden states were not kept

    def generate(self, request: GenerateRequest) -> GenerateResponse:
        """Sample tokens in the engine. Raises UnsupportedError where it cannot, EngineError where it fails."""
        raise UnsupportedError("this engine does not sample tokens itself")

    def token_logprobs(self, ids: Ids, first: int = 1) -> Floats:
        """Return the log-probability of each id from `first` on, given those before it: float64 (len(ids) - first,).

        The distributions are the model's own, over the whole vocabulary. Positions are computed in chunks, which bounds
        the memory for logits; what the KV cache holds of the ids before `first` is not computed again. Afterwards it
        holds all of `ids`.
        """
        logprobs = np.empty(max(len(ids) - first, 0))
        for start in range(first - 1, len(ids), _LOGPROBS_CHUNK):
            end = min(start + _LOGPROBS_CHUNK, len(ids))
            targets = ids[start + 1 : end + 1]
            logits = check_logits(self.logits(ids[:end], last=end - start), end)[: len(targets)]
            target_logits = logits[np.arange(len(targets)), targets]
            logprobs[start + 1 - first :][: len(targets)] = target_logits - self.log_normalizers(logits)
        return logprobs

    def log_normalizers(self, logits: Logits) -> Floats:
        """Return log Σ exp of each row: float64 (rows,)."""
        largest = logits.max(axis=1)
        sums: Floats = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1, dtype=np.float64))
        return sums

    @property
    def last_logits(self) -> Logits:
        """The logits after the last token of the last request: float32 (1, vocab)."""
        assert self._last_logits is not None
        return self._last_logits

    @property
    def has_run_ahead(self) -> bool:
        """Whether forward passes ran that have not been requested yet; such a session is served by itself."""
        return False

    @property
    def num_cached(self) -> int:
        """How many tokens are in the KV cache."""
        return len(self._cached.ids)

    def cached_tokens(self, ids: Ids, last: int = 1) -> int:
        """Return how many tokens of `ids` a request for them would find in the KV cache; see `logits`."""
        if not self.keeps_cache:
            return 0
        return min(common_prefix(self._cached.ids, ids), max(len(ids) - last, 0))

    def can_chunk(self, ids: Ids) -> bool:
        """Whether a prefix of `ids` can be prefilled before the rest, which then finds it in the KV cache."""
        return self.keeps_cache

    def rollback(self, ids: Ids, last: int = 1) -> int | None:
        """Cut the KV cache to the prefix that it shares with `ids`, so that `last` or more tokens are left to run.

        `record` or `reset` follows. Raises what `logits` raises.

        Returns:
            Tokens left in the cache; None where nothing is missing and `last_logits` is the response.
        """
        if not 1 <= last <= len(ids):
            raise UsageError(
                f"{last} positions were requested of a sequence of {len(ids)} tokens", "request 1 or more of them"
            )
        if len(ids) > self.context_length:
            raise PromptTooLongError(
                f"{len(ids)} tokens are more than the context of {self.context_length}", "shorten the prompt"
            )
        cached = self._cached.ids
        common = common_prefix(cached, ids)
        if last == 1 and common == len(ids) == len(cached) and self._last_logits is not None:
            return None
        length = min(common, len(ids) - last) if self.keeps_cache else 0
        if length < len(cached):
            try:
                length = self.truncate(length)
            except BaseException:
                self.reset()
                raise
        self._cached.replace_tail(len(cached) - length, [])
        self._last_logits = None
        return length

    def record(self, ids: Ids, logits: Logits | None, forward: Forward) -> None:
        """Record a forward pass that ran the rest of `ids`. logits: float32 (last, vocab); None if filtered."""
        self.stats.forwards.append(forward)
        self._cached.replace_tail(0, ids[forward.cached :])
        # A copy: a view would keep the logits of all positions in memory.
        self._last_logits = None if logits is None else logits[-1:].copy() if len(logits) > 1 else logits

    def record_generation(self, ids: Ids, response: GenerateResponse, seconds: float) -> None:
        """Record tokens that the engine sampled after `ids`: a forward pass each, the first with the catch-up."""
        own = cached = common_prefix(self._cached.ids, ids)
        if response.cached_tokens is not None:
            cached = min(response.cached_tokens, len(ids) - 1)
            self.stats.cached_tokens += max(cached - own, 0)
        share = seconds / len(response.ids)
        self.stats.forwards.append(Forward(len(ids) - cached, cached, share))
        self.stats.forwards.extend(Forward(1, len(ids) + i, share) for i in range(len(response.ids) - 1))
        self._cached.replace_tail(len(self._cached.ids), np.concatenate([ids, response.ids]))
        self._last_logits = None

    def close(self) -> None:
        """Free the KV cache; an engine may keep what it has run for others. The sequence may go on, from its text."""
        self.reset()

    def reset(self) -> None:
        """Empty the KV cache: after an interrupt or an error its content is unknown."""
        self._cached.replace_tail(len(self._cached.ids), [])
        self._last_logits = None
        self.truncate(0)


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """A model and how to run it. Members of equal specs share one engine; those of equal `weights_key` share weights.

    model: what the user named. dtype: "auto", "float32", "bfloat16" or "float16". device: "auto" or torch's name.
    template: a Jinja chat template in place of the model's own. system: a system message for every conversation.
    adapter: a folder or hub id of a LoRA adapter. engine: a name that the registry knows, or "auto".
    graphs: "auto", "on" or "off": short forward passes of a transformers model in fixed shapes, see `cuda_graphs`.
    prefix_cache: MiB of KV caches that a transformers model keeps for sequences with the same beginning, 0 for none.
    candidates: how many top tokens an engine with a `top_k_limit` returns. context, slots: tokens of one sequence and
    sequences kept at once, in llama.cpp and vLLM. tokenizer: folder of the tokenizer of a model behind a server.
    key_env: environment variable with the server's API key. timeout: seconds to wait for a server's response.
    trust_remote_code: whether Python code in the model's folder may run.

    Of a transformers model: device_map: accelerate's, "auto" and the like, or pairs of a module and its device.
    max_memory: pairs of a device and a size such as "20GiB", for "auto". quantization: one of `choices.QUANTIZATIONS`.
    revision: branch, tag or commit of a hub id. attn: transformers' attention implementation.
    """

    model: str
    name: str
    dtype: str = "auto"
    device: str = "auto"
    template: str | None = None
    system: str | None = None
    adapter: str | None = None
    engine: str = "auto"
    graphs: str = "auto"
    prefix_cache: int = 1024
    candidates: int = 64
    context: int | None = None
    slots: int = 4
    tokenizer: str | None = None
    key_env: str | None = None
    timeout: float = 120.0
    trust_remote_code: bool = False
    device_map: str | tuple[tuple[str, str | int], ...] | None = None
    max_memory: tuple[tuple[str, str], ...] | None = None
    quantization: str | None = None
    revision: str | None = None
    attn: str | None = None

    @property
    def loading_options(self) -> list[str]:
        """The options that are set and that transformers alone takes."""
        return [name for name in LOADING_OPTIONS if getattr(self, name) is not None]

    @property
    def weights_key(self) -> EngineSpec:
        """The part of the spec that determines the weights, without adapters."""
        return replace(self, name="", template=None, system=None, adapter=None)


@dataclass(frozen=True)
class TextInterface:
    """What an engine needs of a tokenizer and a chat template: see `Engine` for each field."""

    vocabulary: Vocabulary
    encoder: Encoder
    prompts: PromptEncoder
    stops: tuple[str, ...] = ()
    tokenizer_info: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Engine(ABC):
    """A loaded model with its tokenizer. A backend implements `session`, and `respond` where it can batch.

    stops: strings that end a response by the model's chat template. notes: what a user should know about this model.
    details: dtype, device and the like, for display. tokenizer_info: the tokenizer's family, normaliser and
    leading-space rule and the source of the chat template, for display. weights_bytes: memory of the weights. device:
    what it runs on; engines on equal devices are served in turn. top_k_limit: how many of its top tokens it returns
    unless more are requested, None for all; the logits of such an engine are -inf for the others, and right up to a
    constant for these. max_top_k: how many it returns at most where a `TopKFilter` wants more, None for no limit.
    takes_ids: with a `top_k_limit`, whether it can report the top tokens among given ids (`AllowedIds`).
    max_sequences: of how many sequences it keeps the KV cache, None for all; more push out one another's.
    hidden_size: numbers in a hidden state, the input of its output layer; None where it gives none.
    asynchronous: it has a queue of its own, and each request is best handed to it at once, with `submit`.
    """

    details: Mapping[str, str] = MappingProxyType({})
    weights_bytes: int = 0
    device: Any = "cpu"
    top_k_limit: int | None = None
    max_top_k: int | None = None
    takes_ids: bool = False
    max_sequences: int | None = None
    hidden_size: int | None = None
    asynchronous: bool = False

    def __init__(self, name: str, text: TextInterface, context_length: int) -> None:
        self.name = name
        self.context_length = context_length
        self.vocabulary = text.vocabulary
        self.encoder = text.encoder
        self.prompts = text.prompts
        self.stops = text.stops
        self.tokenizer_info = text.tokenizer_info
        self.notes = text.notes

    @property
    def backend(self) -> str:
        """What runs the model, such as "transformers" or "llama.cpp", for display."""
        return self.details.get("engine", type(self).__name__)

    @property
    def batch_key(self) -> int:
        """Equal for engines that run in one batch: each of them can serve the others' sessions."""
        return id(self)

    @property
    def scores_texts(self) -> bool:
        """Whether it gives the log-probability of every token of a given text (`Session.token_logprobs`)."""
        return self.top_k_limit is None

    @property
    def reports_all(self) -> bool:
        """Whether it returns every token's logit where that many are requested."""
        return self.top_k_limit is None or self.max_top_k is None or self.max_top_k >= self.vocabulary.size

    @property
    def reported_tokens(self) -> int | None:
        """How many of the most likely tokens, special ones too, it returns with any request; None for all."""
        return self.top_k_limit

    @property
    def run_ahead_depth(self) -> int:
        """How many positions after the requested one it runs ahead (`SampleRequest.run_ahead`); 0 for none."""
        return 0

    @property
    def weight_parts(self) -> Mapping[Hashable, int]:
        """Bytes of each part of the weights by an identifying key: engines may have parts in common."""
        return {self.batch_key: self.weights_bytes}

    @property
    def prefix_cache_parts(self) -> Mapping[Hashable, int]:
        """Bytes of KV caches that are kept for sequences with the same beginning, by an identifying key."""
        return {}

    def drop_prefixes(self) -> None:  # noqa: B027 - most engines keep none
        """Forget KV caches that are kept for sequences with the same beginning."""

    @abstractmethod
    def session(self) -> Session:
        """Begin a sequence, with an empty KV cache."""

    def samples_itself(self, sampling: Sampling, banned: Ids) -> bool:
        """Whether it can sample with these options itself, as `GenerateRequest` needs. banned: int64."""
        return False

    def replica(self) -> Engine:
        """Return an engine on the same weights that is served by itself, as another model of its size would be."""
        return copy(self)

    def with_spec(self, spec: EngineSpec) -> Engine | None:
        """Return an engine on the same weights with the spec's prompts and adapter; None where that is impossible.

        The spec's `weights_key` must equal that of this engine's spec.
        """
        return None

    def respond(self, requests: Sequence[tuple[Session, Request]]) -> list[Response]:
        """Serve the requests of one step and return their responses in order."""
        return [respond(session, request) for session, request in requests]

    def submit(self, session: Session, request: Request) -> Future[Any]:
        """Start one request and return at once; `to_response` makes a response of the future's result.

        Only for engines that are `asynchronous`.
        """
        raise UnsupportedError("this engine is not asynchronous: use `respond`")

    def alive(self) -> bool:
        """Whether an engine that has failed can serve requests again. Takes no longer than a few seconds.

        Called in a thread of its own, for all sequences that wait for the answer.
        """
        return True


def total_weight_bytes(engines: Iterable[Engine]) -> int:
    """Return the memory of the weights of several engines in bytes; common parts count once."""
    return sum({key: size for engine in engines for key, size in engine.weight_parts.items()}.values())


def respond(session: Session, request: Request) -> Response:
    """Serve one request with a session. Raises EngineError for logits that are not numbers."""
    if isinstance(request, GenerateRequest):
        return session.generate(request)
    if isinstance(request, ScoreRequest):
        return session.token_logprobs(request.ids)
    if request.hidden:
        session.keep_hidden()
    rows = session.logits_rows(request.ids, request.last, request.top_k_filter, request.allowed)
    return to_response(request, rows, session.hidden_states)


def common_prefix(a: Ids, b: Ids) -> int:
    """Return the length of the longest common prefix."""
    length = min(len(a), len(b))
    same = a[:length] == b[:length]
    return length if same.all() else int(np.argmin(same))
