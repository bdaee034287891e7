"""A member of an ensemble: how its logits become a distribution over shared symbols, and a sample of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass
from functools import cached_property
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from mixlm.core.grammar import Grammar, TokenMask
from mixlm.core.mixing import pool
from mixlm.core.rng import Noise
from mixlm.core.sampling import ReportTransform, TokenHistory, Transform, top_logprobs
from mixlm.engines.base import Engine, Session
from mixlm.engines.requests import AllowedIds, LogitsRequest, Request, SampleResponse
from mixlm.errors import UnsupportedError
from mixlm.generation.dispatch import EngineRequest, RequestFlow
from mixlm.types import Candidates, Ids, Logits, LogitsProcessor, LogitsRow, TopKFilter
from mixlm.units.base import TextState, mark_duplicates


class _MappedIds(NamedTuple):
    """Ids and the symbols that they stand for: first those that one id stands for, then the others.

    ids: int64 (n,). symbols: distinct, int64 (symbols,). unique, shared: indices of ids with and without a symbol of
    their own, int64.
    """

    ids: Ids
    symbols: Ids
    unique: Ids
    shared: Ids
    symbols_of_shared: Ids

    @classmethod
    def of(cls, ids: Ids, symbols: Ids, has_duplicates: npt.NDArray[np.bool_]) -> _MappedIds:
        shared = np.flatnonzero(has_duplicates)
        if not shared.size:
            return cls(ids, symbols, shared, shared, shared)
        unique = np.flatnonzero(~has_duplicates)
        return cls(ids, np.concatenate([symbols[unique], np.unique(symbols[shared])]), unique, shared, symbols[shared])


@dataclass(eq=False)
class Member:
    """One member's part in an ensemble, the same for every sequence: its engine, its transform `A_i`, its map `K_i`.

    Args:
        symbols: The shared symbol of each of its ids, int64 (vocab,); -1 for those it may not sample.
        top_logprobs: How many of the most likely symbols are reported beside a chosen one.
        grammar: What its tokens are held to.
        processor: What changes its logits first.
        samples_only: Whether the strategy requests nothing but samples of single members, so that an engine may sample
            them itself.

    Raises:
        UnsupportedError: The options need more of the distribution than the engine reports.
    """

    engine: Engine
    name: str
    transform: Transform
    symbols: Ids
    top_logprobs: int = 0
    grammar: Grammar | None = None
    processor: LogitsProcessor | None = None
    samples_only: InitVar[bool] = False

    def __post_init__(self, samples_only: bool) -> None:
        engine, transform, grammar, symbols = self.engine, self.transform, self.grammar, self.symbols
        # A member with a token for every byte can continue any text.
        self.may_be_stuck = grammar is not None and bool(
            (grammar.byte_ids < 0).any() or (symbols[grammar.byte_ids] < 0).any()
        )
        self._has_duplicates = mark_duplicates(symbols)
        self._mapped: _MappedIds | None = None  # the latest
        samples_only &= self.processor is None
        self.samples_itself = samples_only and engine.samples_itself(transform.sampling, transform.banned)
        # An engine runs ahead only where it samples on the device, which takes a top-k filter.
        can_run_ahead = samples_only and transform.top_k_filter is not None
        self.run_ahead = engine.run_ahead_depth if can_run_ahead else 0
        if not self.samples_itself:
            _check_top_k_limit(self)

    @property
    def is_partial(self) -> bool:
        """Whether its distributions are lower bounds: what its engine reports of them."""
        return isinstance(self.transform, ReportTransform)

    @cached_property
    def tokens_per_symbol(self) -> Ids:
        """How many of its ids stand for each symbol, int64 (symbols,)."""
        return np.bincount(self.symbols[self.symbols >= 0])

    def map_to_symbols(self, tokens: Candidates) -> Candidates:
        """Return the distribution over shared symbols from one over the member's ids: the map `K_i`."""
        ids, logprobs = tokens
        mapped = self._mapped
        if mapped is None or mapped.ids is not ids:
            mapped = self._mapped = _MappedIds.of(ids, self.symbols[ids], self._has_duplicates[ids])
        _, symbols, unique, shared, symbols_of_shared = mapped
        if not shared.size:
            return Candidates(symbols, logprobs)
        pooled = pool(symbols_of_shared, logprobs[shared])
        out = np.empty(unique.size + pooled.ids.size)
        np.take(logprobs, unique, out=out[: unique.size])
        out[unique.size :] = pooled.logprobs
        if out.size < symbols.size:  # something underflows
            symbols = np.concatenate([symbols[: unique.size], pooled.ids])
        return Candidates(symbols, out)


def address(requests: Sequence[Request], members: Sequence[Member], sessions: Sequence[Session]) -> list[EngineRequest]:
    """Return requests with the engines and sessions that respond to them."""
    return [EngineRequest(members[request.member].engine, sessions[request.member], request) for request in requests]


class MemberView:
    """One member's view of one sequence.

    member: the part of it that is the same for every sequence. state: the sequence's text, to be read;
    `DecodeStep.following` is what changes it.
    """

    def __init__(self, member: Member, index: int, state: TextState) -> None:
        self.member = member
        self._index = index
        self.state = state
        self._matcher = None if member.grammar is None else member.grammar.matcher()
        self._mask: tuple[bytes, TokenMask | None] | None = None  # the latest text, and what may follow it

    def ids(self) -> Ids:
        """Return the member's tokens for prompt and text: `τ_i(s)`, int64 (n,)."""
        return self.state.ids(self._index)

    def symbol(self, token: int) -> int:
        """Return the shared symbol of one of the member's ids; -1 for one that it may not sample."""
        return int(self.member.symbols[token])

    @property
    def top_k_filter(self) -> TopKFilter | None:
        """The part of the member's logits that its distribution depends on; None for all of them."""
        needs_all = (self._matcher is not None and not self.is_restricted) or self.member.processor is not None
        return None if needs_all else self.member.transform.top_k_filter

    @property
    def is_restricted(self) -> bool:
        """Whether requests say which ids are allowed: the engine reports its most likely tokens only, of these."""
        return self._matcher is not None and self.member.engine.top_k_limit is not None

    def allowed_ids(self, text: bytes | None = None) -> AllowedIds:
        """Return what a request says of the ids that are allowed after the text as it is now, or after a prefix."""
        return (self._allowed(text),) if self.is_restricted else ()

    def logits_request(self) -> LogitsRequest:
        """Return the request for the logits that the member's distribution needs, for the text as it is now."""
        return LogitsRequest(self._index, self.ids(), 1, self.top_k_filter, allowed=self.allowed_ids())

    def distribution_among(
        self, mask: TokenMask, logits: LogitsRow, ids: Ids | None = None, text: bytes | None = None
    ) -> RequestFlow[Candidates]:
        """Return the member's distribution where some ids alone are possible; empty where none of them is.

        An engine that reports its most likely tokens is asked for those among the ids.

        Args:
            mask: Which ids, bool (vocab,).
            logits: The member's logits.
            ids, text: Its tokens and the bytes of a prefix of the text, where that is not all of it.
        """
        if (allowed := self._allowed(text)) is not None:
            mask = mask & allowed
        if self.member.engine.top_k_limit is not None:
            request_ids = self.ids() if ids is None else ids
            [[row]] = yield [LogitsRequest(self._index, request_ids, 1, self.top_k_filter, allowed=(mask,))]
            possible = np.isfinite(row.logprobs)
            logits = Candidates(row.ids[possible], row.logprobs[possible])
        return self.bind_distribution(ids, text, mask)(logits)

    def _allowed(self, text: bytes | None = None) -> TokenMask | None:
        """Return the grammar's mask after the text as it is now, or after a prefix of it; None without a grammar."""
        if self._matcher is None:
            return None
        text = self.state.substring() if text is None else text
        if self._mask is None or self._mask[0] != text:
            self._mask = text, self._matcher.allowed(text)
        return self._mask[1]

    @property
    def stuck(self) -> bool:
        """Whether the grammar leaves the member no token."""
        if not self.member.may_be_stuck:
            return False
        allowed = self._allowed()
        return allowed is not None and not (allowed & (self.member.symbols >= 0)).any()

    def sample(self, distribution: Candidates, noise: Noise) -> SampleResponse:
        """Sample a symbol from this member's distribution: what `mixture`, `single` and `speculative` emit.

        Raises:
            UnsupportedError: The distribution is empty.
        """
        self.check_possible(distribution)
        index = noise.sample(distribution.ids, distribution.logprobs)
        return SampleResponse(
            int(distribution.ids[index]),
            float(distribution.logprobs[index]),
            top_logprobs(distribution, self.member.top_logprobs),
        )

    def check_possible(self, distribution: Candidates) -> Candidates:
        """Return a distribution of this member's. Raises UnsupportedError where it is empty: there is no target."""
        if not distribution.ids.size:
            grammar, processor = self.member.grammar, self.member.processor
            option = grammar.option if grammar else "json_schema" if processor is None else "its logits processor"
            raise UnsupportedError(f"{self.member.name} gives no probability to anything that {option} allows here")
        return distribution

    def sampler(self, noise: Noise) -> Callable[[LogitsRow], SampleResponse]:
        """Return the function that samples a symbol from the member's logits for the text as it is now."""
        distribution = self.bind_distribution()

        def sample(logits: LogitsRow) -> SampleResponse:
            return self.sample(distribution(logits), noise)

        return sample

    def distribution(self, logits: LogitsRow) -> Candidates:
        """Return the member's distribution over symbols from its logits for `ids()`, whole or filtered."""
        return self.bind_distribution()(logits)

    def bind_distribution(
        self,
        ids: Ids | None = None,
        text: bytes | None = None,
        among: TokenMask | None = None,
        *,
        normalize: bool = True,
        of_tokens: bool = False,
    ) -> Callable[[LogitsRow], Candidates]:
        """Return `distribution` for the text as it is now, for logits that are known when it has grown.

        Args:
            ids, text: The member's tokens and the bytes of a prefix of the text, to bind that instead.
            among: The only ids that are possible, bool (vocab,); by default those that the grammar allows.
            normalize: Whether it is to sum to 1; if not, it is in proportion.
            of_tokens: Whether it is that over the member's own ids, `A_i p_i`.
        """
        member, history, process = self.member, self._history(ids), self._bind_processor(ids)
        before = self.state.substring() if text is None and self._matcher is not None else text

        def distribution(logits: LogitsRow) -> Candidates:
            allowed = self._allowed(before) if among is None else among
            processed = logits if process is None else process(logits)
            tokens = member.transform(processed, history, allowed, normalize=normalize)
            return tokens if of_tokens else member.map_to_symbols(tokens)

        return distribution

    def _bind_processor(self, ids: Ids | None = None) -> Callable[[LogitsRow], LogitsRow] | None:
        """Return the member's logits processor for the text as it is now, or for other ids; None without one."""
        processor = self.member.processor
        if processor is None:
            return None
        from mixlm.core.logits_processor import process_logits

        bound = (self.ids() if ids is None else ids).copy()
        return lambda logits: process_logits(processor, bound, cast("Logits", logits))

    def _history(self, ids: Ids | None = None) -> TokenHistory | None:
        """Return the tokens so far where a penalty depends on them."""
        if not self.member.transform.sampling.has_penalties:
            return None
        ids, prompt = self.ids() if ids is None else ids, self.state.prompt_length(self._index)
        return TokenHistory.from_tokens(ids[:prompt], ids[prompt:])


def _check_top_k_limit(member: Member) -> None:
    """Raise UnsupportedError for options that need more than the top k tokens that the engine reports."""
    engine, transform, symbols = member.engine, member.transform, member.symbols
    if engine.top_k_limit is None:
        return
    tokens, ends = engine.vocabulary.tokens, engine.vocabulary.end_ids
    # Tokens that may be among the engine's top k, and are masked here.
    masked = sum(bool(tokens[i]) or i in ends for i in np.flatnonzero(symbols < 0).tolist())
    limit = engine.top_k_limit - masked
    sampling = transform.sampling
    if member.grammar is not None and not engine.takes_ids:
        raise UnsupportedError(
            f"{member.grammar.option} allows tokens from anywhere in the vocabulary, and {engine.name} runs in an "
            f"engine that reports its {engine.top_k_limit} most likely tokens of all only",
            "use --engine hf (engine='hf'), llama.cpp, SGLang, or vLLM whose logprobs mode is processed_logprobs",
        )
    if member.processor is not None:
        reason = "a logits processor may move any token of the vocabulary"
    elif transform.bias is not None:
        reason = "logit_bias moves tokens from anywhere in the vocabulary"
    elif sampling.has_penalties:
        reason = f"{sampling.active_penalties[0]} moves tokens from anywhere in the vocabulary"
    elif transform.top_k_filter is None or sampling.top_k > max(limit, 0):
        reason = f"top_k is {sampling.top_k}" + (" (off)" if sampling.top_k == 0 else "")
    else:
        return
    raise UnsupportedError(
        f"{reason}, and {engine.name} runs in an engine that reports its {engine.top_k_limit} most likely tokens only",
        f"use a top_k from 1 to {limit} and no penalties or biases, or --engine hf (engine='hf')"
        if limit >= 1
        else "use --unit piece, or --engine hf",
    )
