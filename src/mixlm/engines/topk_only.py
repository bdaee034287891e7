"""Engines that return only their top tokens: all that they offer is "the N most probable next tokens".

That is enough for a member whose transform keeps the k most probable tokens with k ≤ N: truncating the whole
distribution to those and renormalising gives the same numbers. What needs more is refused when an ensemble is set up
(`decoding`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mixlm.engines.base import Engine, Session
from mixlm.engines.requests import Forward, GenerateResponse
from mixlm.errors import EngineError, UnsupportedError
from mixlm.types import Candidates, Floats, Ids, Logits, LogitsRows, TopKFilter
from mixlm.units.base import TokenBuffer


class TopKOnlyEngine(Engine):
    """An engine that returns its `top_k_limit` most probable tokens that may be sampled.

    extra_tokens: how many more are requested, since special tokens may be among the top ones and are never sampled.
    max_top_k: how many can be requested at all, None for no limit.
    """

    top_k_limit: int
    extra_tokens: int = 16
    max_top_k: int | None = None

    @cached_property
    def sampleable(self) -> npt.NDArray[np.bool_]:
        """Which ids may be sampled: bool (vocab,)."""
        sampleable = np.fromiter(map(bool, self.vocabulary.tokens), dtype=np.bool_, count=self.vocabulary.size)
        sampleable[list(self.vocabulary.end_ids)] = True
        return sampleable

    def letter_token(self) -> int:
        """Return the id of a token that is whole characters."""
        letters = (i for i, token in enumerate(self.vocabulary.tokens) if token.isalpha() and token.isascii())
        return next(letters, 0)


TopTokensQueries = Generator[tuple[Ids, int], Candidates, LogitsRows]  # yields the arguments of `top_tokens`


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
        self._top_k_filter: TopKFilter | None = None  # of the request being served
        self._context = TokenBuffer(np.zeros(0, dtype=np.int64))

    @abstractmethod
    def top_tokens(self, ids: Ids, count: int) -> Candidates:
        """Return at least the `count` most probable tokens after `ids`; log-probabilities up to a constant."""

    def logits_rows(self, ids: Ids, last: int = 1, top_k_filter: TopKFilter | None = None) -> LogitsRows:
        """Return what `logits` does, or what the filter keeps of it: then no row is as long as the vocabulary."""
        self._top_k_filter = top_k_filter
        try:
            return self.logits(ids, last)
        finally:
            self._top_k_filter = None

    def record(self, ids: Ids, logits: Logits | None, forward: Forward) -> None:
        """Record a forward pass."""
        super().record(ids, logits if self._top_k_filter is None else None, forward)

    def token_scores(self, ids: Ids) -> TokenScores:
        """Return the scores of given ids, where the engine has them. Raises UnsupportedError where it has not."""
        raise full_distribution_error(self._top_k_engine, "the log-probability of a given text")

    def token_logprobs(self, ids: Ids) -> Floats:
        """Return the log-probability of each id but the first, as `token_scores` does: float64 (len(ids) - 1,)."""
        return self.token_scores(ids).logprobs

    def record_generation(self, ids: Ids, response: GenerateResponse, seconds: float) -> None:
        """Record tokens that the engine sampled after `ids`."""
        super().record_generation(ids, response, seconds)
        self._context.replace_tail(len(self._context.ids), self._cached.ids)

    def truncate(self, length: int) -> int:
        """Cut the context to its first `length` tokens."""
        self._context.replace_tail(len(self._context.ids) - length, [])
        return length

    def forward(self, ids: Ids, last: int) -> Logits:
        """Query the top tokens after each of the last prefixes; the logits of other tokens are -inf."""
        queries = self.top_k_queries(ids, last, self._top_k_filter)
        try:
            query = next(queries)
            while True:
                query = queries.send(self.top_tokens(*query))
        except StopIteration as stop:
            rows: Logits = stop.value
            return rows

    def top_k_queries(self, ids: Ids, last: int, top_k_filter: TopKFilter | None = None) -> TopTokensQueries:
        """Append `ids` to the context and yield the queries that they need, each the arguments of `top_tokens`.

        Returns:
            The logits, float32 (last, vocab), or what the filter keeps of each row.
        """
        self._context.replace_tail(0, ids)
        context = self._context.ids
        rows = []
        for end in range(len(context) - last + 1, len(context) + 1):
            rows.append((yield from self._query_until_enough(context[:end], top_k_filter)))
        if top_k_filter is not None:
            return [top_k_filter.apply(candidates) for candidates in rows]
        logits = np.full((last, self._top_k_engine.vocabulary.size), -np.inf, dtype=np.float32)
        for row, candidates in zip(logits, rows, strict=True):
            row[candidates.ids] = candidates.logprobs
        return logits

    def _query_until_enough(
        self, ids: Ids, top_k_filter: TopKFilter | None
    ) -> Generator[tuple[Ids, int], Candidates, Candidates]:
        """Query ever more top tokens until enough of them may be sampled, or there are no more."""
        engine = self._top_k_engine
        limit = min(engine.vocabulary.size, engine.max_top_k or engine.vocabulary.size)
        enough = engine.top_k_limit if top_k_filter is None else min(top_k_filter.k, engine.top_k_limit)
        count = min(enough + engine.extra_tokens, limit)
        while True:
            candidates = yield ids, count
            usable = engine.sampleable[candidates.ids]
            if top_k_filter is not None:
                usable &= top_k_filter.allows(candidates.ids)
            if np.count_nonzero(usable) >= enough or count >= engine.vocabulary.size:
                return candidates
            if count >= limit:
                raise EngineError(
                    f"fewer than {enough} of the {count} most likely tokens of {engine.name} may be sampled",
                    "use fewer candidates, or let its server return more of them",
                )
            count = min(4 * count, limit)


def full_distribution_error(engine: Engine, purpose: str) -> UnsupportedError:
    """Return the error for what a top-k-only engine cannot do."""
    return UnsupportedError(
        f"{purpose} needs every token's probability, and {engine.name} returns its {engine.top_k_limit} most likely",
        "use --engine hf (engine='hf' in mixlm.load)",
    )
