"""Engines that return only their top tokens: all that they offer is "the N most probable next tokens".

That is enough for a member whose transform keeps the k most probable tokens with k ≤ N: truncating the whole
distribution to those and renormalising gives the same numbers. Combination rules request more tokens, with
their probabilities in the whole vocabulary, until what is not reported decides nothing. What else needs more is refused
when an ensemble is set up (`decoding`).

Where a grammar allows some ids only, the k most probable ones of these are needed. Either they are among the most
probable of all, as far as these are requested, or the engine is asked for the most probable of given ids. How depends
on the engine; what it reports tells whether they are all there.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from mixlm.engines.base import Engine, EngineSpec, Session, TextInterface
from mixlm.engines.requests import AllowedIds, Forward
from mixlm.errors import EngineError, UnsupportedError
from mixlm.types import Candidates, Floats, Ids, Logits, LogitsRows, TopKFilter


class TopKOnlyEngine(Engine):
    """An engine that returns its `top_k_limit` most probable tokens that may be sampled.

    sampleable: which ids may be sampled, bool (vocab,). extra_tokens: how many more are requested, since special tokens
    may be among the top ones and are never sampled.
    max_unlisted: where it `takes_ids`, how many are requested before it is given the ids.
    """

    top_k_limit: int
    extra_tokens: int = 16
    max_unlisted: int = 1024

    def __init__(self, name: str, text: TextInterface, context_length: int) -> None:
        super().__init__(name, text, context_length)
        tokens = self.vocabulary.tokens
        self.sampleable: npt.NDArray[np.bool_] = np.fromiter(map(bool, tokens), dtype=np.bool_, count=len(tokens))
        self.sampleable[list(self.vocabulary.end_ids)] = True

    def text_interface(self, spec: EngineSpec) -> TextInterface | None:
        """Return the prompts and the vocabulary of a spec on this model; None where it has but one set of them."""
        return None

    def with_spec(self, spec: EngineSpec) -> Self | None:
        """Return an engine on the same weights with prompts of its own; None for an adapter."""
        spec = replace(spec, name=spec.name or self.name)
        if spec.adapter is not None or (text := self.text_interface(spec)) is None:
            return None
        shared = copy(self)
        TopKOnlyEngine.__init__(shared, spec.name, text, self.context_length)
        return shared

    @property
    def reported_tokens(self) -> int:
        """How many of the most likely tokens, special ones too, it returns with any request."""
        return min(self.top_k_limit + self.extra_tokens, self.max_top_k or self.vocabulary.size)


# A grammar's ids are listed at once where they are so few.
_MAX_FEW = 4096


class TopTokensQuery(NamedTuple):
    """The arguments of `TopKOnlySession.top_tokens`, in order. number: how many tokens."""

    ids: Ids
    number: int
    among: Ids | None = None


TopTokensQueries = Generator[TopTokensQuery, Candidates, LogitsRows]


class TokenScores(NamedTuple):
    """Of each id of a text but the first: its natural log-probability, float64 (n - 1,), and whether it is the top.

    The distributions are the model's own, over the whole vocabulary.
    """

    logprobs: Floats
    is_top: npt.NDArray[np.bool_]


class TopKOnlySession(Session):
    """One sequence, known to the engine by its ids alone. A backend implements `top_tokens`."""

    def __init__(self, engine: TopKOnlyEngine) -> None:
        super().__init__(engine.context_length)
        self._top_k_engine = engine
        self._top_k_filter: TopKFilter | None = None  # of the request being served, as `_allowed`
        self._allowed: AllowedIds = ()

    @abstractmethod
    def top_tokens(self, ids: Ids, count: int, among: Ids | None = None) -> Candidates:
        """Return at least the `count` most probable tokens after `ids`; log-probabilities up to a constant.

        Where the session is `normalized`, they are those in the whole vocabulary.

        among: the ids that count, for an engine that `takes_ids`. It may return others too, and then fewer of these:
        the order, and the differences between these, are right.
        """

    @property
    def normalized(self) -> bool:
        """Whether the request being served needs probabilities in the whole vocabulary."""
        return self._top_k_filter is not None and self._top_k_filter.normalized

    def logits_rows(
        self, ids: Ids, last: int = 1, top_k_filter: TopKFilter | None = None, allowed: AllowedIds = ()
    ) -> LogitsRows:
        """Return what `logits` does, or what the filter keeps of it: then no row is as long as the vocabulary.

        allowed: which ids count after each prefix, the logits of the others are not certain.
        """
        with self._serving(top_k_filter, allowed):
            return self.logits(ids, last)

    @contextmanager
    def _serving(self, top_k_filter: TopKFilter | None, allowed: AllowedIds) -> Iterator[None]:
        """Serve a request for logits, with these arguments of `logits_rows`."""
        self._top_k_filter, self._allowed = top_k_filter, allowed
        try:
            if allowed or self.normalized:
                self._last_logits = None  # of other ids, or too few
            yield
        finally:
            self._top_k_filter, self._allowed = None, ()

    def record(self, ids: Ids, logits: Logits | None, forward: Forward) -> None:
        """Record a forward pass."""
        super().record(ids, logits if self._top_k_filter is None and not self._allowed else None, forward)

    def token_scores(self, ids: Ids) -> TokenScores:
        """Return the scores of given ids, where the engine has them. Raises UnsupportedError where it has not."""
        raise full_distribution_error(self._top_k_engine, "the log-probability of a given text")

    def token_logprobs(self, ids: Ids, first: int = 1) -> Floats:
        """Return the log-probability of each id from `first` on, of `token_scores`: float64 (len(ids) - first,)."""
        return self.token_scores(ids).logprobs[first - 1 :]

    def truncate(self, length: int) -> int:
        """Return `length`: it keeps nothing but the ids."""
        return length

    def forward(self, ids: Ids, last: int) -> Logits:
        """Query the top tokens after each of the last prefixes; the logits of other tokens are -inf."""
        queries = self.top_k_queries(ids, last, self._top_k_filter, self._allowed)
        try:
            query = next(queries)
            while True:
                query = queries.send(self.top_tokens(*query))
        except StopIteration as stop:
            rows: Logits = stop.value
            return rows

    def top_k_queries(
        self, ids: Ids, last: int, top_k_filter: TopKFilter | None = None, allowed: AllowedIds = ()
    ) -> TopTokensQueries:
        """Yield the queries that `ids` need after the ids that are cached.

        Returns:
            The logits, float32 (last, vocab), or what the filter keeps of each row.
        """
        context = np.concatenate([self._cached.ids, ids])
        rows = []
        masks = allowed or [None] * last
        for end, mask in zip(range(len(context) - last + 1, len(context) + 1), masks, strict=True):
            rows.append((yield from self._query_until_enough(context[:end], top_k_filter, mask)))
        if top_k_filter is not None:
            kept = [row if mask is None else _masked(row, mask) for row, mask in zip(rows, masks, strict=True)]
            return [top_k_filter.apply(candidates) for candidates in kept]
        logits = np.full((last, self._top_k_engine.vocabulary.size), -np.inf, dtype=np.float32)
        for row, candidates in zip(logits, rows, strict=True):
            row[candidates.ids] = candidates.logprobs
        return logits

    def _query_until_enough(
        self, ids: Ids, top_k_filter: TopKFilter | None, allowed: npt.NDArray[np.bool_] | None
    ) -> Generator[TopTokensQuery, Candidates, Candidates]:
        """Query ever more top tokens until enough of them may be sampled, or there are no more.

        A filter that wants more than the engine's `top_k_limit` gets as many as there are.
        """
        engine = self._top_k_engine
        limit = min(engine.vocabulary.size, engine.max_top_k or engine.vocabulary.size)
        wanted = engine.top_k_limit if top_k_filter is None else top_k_filter.k
        sampleable = engine.sampleable & (True if allowed is None else allowed)
        if top_k_filter is not None:
            sampleable[top_k_filter.banned] = False
        total = int(np.count_nonzero(sampleable))
        wanted = min(wanted, total)
        enough = min(wanted, engine.top_k_limit)
        if not enough:
            return Candidates(np.zeros(0, dtype=np.int64), np.zeros(0))
        may_list = allowed is not None and engine.takes_ids
        among = np.flatnonzero(sampleable) if may_list and total <= _MAX_FEW else None
        count = min(wanted + engine.extra_tokens, limit, limit if among is None else total)
        while True:
            candidates = yield TopTokensQuery(ids, count, among)
            reported = np.count_nonzero(sampleable[candidates.ids])
            if reported >= wanted or count >= engine.vocabulary.size or (reported >= enough and count >= limit):
                return candidates
            if may_list and among is None and count >= min(engine.max_unlisted, limit):
                among, count = np.flatnonzero(sampleable), min(enough + engine.extra_tokens, limit, total)
            elif count >= limit:
                raise EngineError(
                    f"fewer than {enough} of the {count} most likely tokens of {engine.name} may be sampled",
                    "use fewer candidates, or let its server return more of them",
                )
            else:
                count = min(4 * count, limit)


def listed_candidates(entries: Iterable[tuple[int, float]]) -> Candidates:
    """Return candidates of ids and log-probabilities. Raises ValueError where they are none, or not distinct."""
    pairs = list(entries)
    ids = np.array([token for token, _ in pairs], dtype=np.int64)
    logprobs = np.array([logprob for _, logprob in pairs], dtype=np.float64)
    if ids.size == 0 or np.isnan(logprobs).any() or ids.min() < 0 or len(set(ids)) != ids.size:
        raise ValueError("the tokens returned are not distinct ids with numbers")
    return Candidates(ids, logprobs)


def _masked(candidates: Candidates, mask: npt.NDArray[np.bool_]) -> Candidates:
    keep = mask[candidates.ids]
    return Candidates(candidates.ids[keep], candidates.logprobs[keep])


def full_distribution_error(engine: Engine, purpose: str) -> UnsupportedError:
    """Return the error for what a top-k-only engine cannot do."""
    return UnsupportedError(
        f"{purpose} needs every token's probability, and {engine.name} returns its {engine.top_k_limit} most likely",
        "use --engine hf (engine='hf' in mixlm.load)",
    )
