"""Engines that tell only their likeliest tokens: what they run lies behind a request for "the N likeliest, next".

That is all a member needs whose transform keeps the k likeliest with k ≤ N: cutting the whole distribution to its k
likeliest and renormalising gives the same numbers. What needs more is refused when an ensemble is set up (`decoding`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator
from functools import cached_property
from typing import Any

import numpy as np

from mixlm.engines.base import Engine, Forward, GenerateResponse, Session
from mixlm.errors import EngineError, UnsupportedError
from mixlm.types import Candidates, Floats, Ids, Logits, LogitsRows, TopKFilter
from mixlm.units.base import TokenBuffer


class TopKOnlyEngine(Engine):
    """An engine that tells its `candidates` likeliest tokens that may be drawn.

    spare: how many more are asked for, since control tokens may be among the likeliest and are never drawn. most: how
    many can be asked for at all, None for no limit.
    """

    top_k_limit: int
    extra_tokens: int = 16
    max_top_k: int | None = None

    @cached_property
    def drawable(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which ids may be sampled: bool (vocab,)."""
        drawable = np.fromiter(map(bool, self.vocabulary.tokens), dtype=np.bool_, count=self.vocabulary.size)
        drawable[list(self.vocabulary.end_ids)] = True
        return drawable

    def letter_token(self) -> int:
        """Return the id of a token that is whole characters."""
        letters = (i for i, token in enumerate(self.vocabulary.tokens) if token.isalpha() and token.isascii())
        return next(letters, 0)


class TopKOnlySession(Session):
    """One sequence, known to the engine by its ids alone. A subclass asks for the likeliest tokens after them."""

    def __init__(self, engine: TopKOnlyEngine) -> None:
        super().__init__(engine.context_length)
        self._partial = engine
        self._cut: TopKFilter | None = None  # of the question that is being answered
        self._context = TokenBuffer(np.zeros(0, dtype=np.int64))

    @abstractmethod
    def _top_tokens(self, ids: Ids, count: int) -> Candidates:
        """Return at least the `count` likeliest tokens after `ids`; log-probabilities may be off by a constant."""

    def logits_rows(self, ids: Ids, last: int = 1, cut: TopKFilter | None = None) -> LogitsRows:
        """Return what `logits` does, or what `cut` leaves of it: no row is as long as the vocabulary then."""
        self._cut = cut
        try:
            return self.logits(ids, last)
        finally:
            self._cut = None

    def record(self, ids: Ids, logits: Logits | None, forward: Forward) -> None:
        """Take down that a question was run."""
        super().record(ids, logits if self._cut is None else None, forward)

    def token_logprobs(self, ids: Ids) -> Floats:
        """Raise UnsupportedError: the log-probability of a given token needs the whole distribution."""
        raise full_distribution_error(self._partial, "the log-probability of a given text")

    def record_generation(self, ids: Ids, written: GenerateResponse, seconds: float) -> None:
        """Take down a run behind `ids`."""
        super().record_generation(ids, written, seconds)
        self._context.replace_tail(len(self._context.ids), self._cached.ids)

    def _truncate(self, length: int) -> int:
        self._context.replace_tail(len(self._context.ids) - length, [])
        return length

    def _forward(self, ids: Ids, last: int) -> Logits:
        wanted = self.top_k_queries(ids, last, self._cut)
        try:
            question = next(wanted)
            while True:
                question = wanted.send(self._top_tokens(*question))
        except StopIteration as done:
            rows: Logits = done.value
            return rows

    def top_k_queries(
        self, ids: Ids, last: int, cut: TopKFilter | None = None
    ) -> Generator[tuple[Ids, int], Candidates, LogitsRows]:
        """Put `ids` behind the context; yield what has to be asked for, as `_likeliest` is, and return the logits.

        They are float32 (last, vocab), or what `cut` leaves of each row.
        """
        self._context.replace_tail(0, ids)
        read = self._context.ids
        found = []
        for end in range(len(read) - last + 1, len(read) + 1):
            found.append((yield from self._enough(read[:end], cut)))
        if cut is not None:
            return [cut.apply(one) for one in found]
        rows = np.full((last, self._partial.vocabulary.size), -np.inf, dtype=np.float32)
        for row, one in zip(rows, found, strict=True):
            row[one.ids] = one.logprobs
        return rows

    def _enough(self, ids: Ids, cut: TopKFilter | None) -> Generator[tuple[Ids, int], Candidates, Candidates]:
        """Ask for ever more tokens until enough of them may be drawn, or there are no more."""
        engine = self._partial
        most = min(engine.vocabulary.size, engine.max_top_k or engine.vocabulary.size)
        enough = engine.top_k_limit if cut is None else min(cut.k, engine.top_k_limit)
        count = min(enough + engine.extra_tokens, most)
        while True:
            found = yield ids, count
            usable = engine.drawable[found.ids]
            if cut is not None:
                usable &= cut.allows(found.ids)
            if np.count_nonzero(usable) >= enough or count >= engine.vocabulary.size:
                return found
            if count >= most:
                raise EngineError(
                    f"fewer than {enough} of the {count} likeliest tokens of {engine.name} may be drawn",
                    "use fewer candidates, or let its server tell more of them",
                )
            count = min(4 * count, most)


def full_distribution_error(engine: Engine, purpose: str) -> UnsupportedError:
    """Return the error for what an engine that tells its likeliest tokens only cannot do."""
    return UnsupportedError(
        f"{purpose} needs every token's probability, and {engine.name} tells its {engine.top_k_limit} likeliest only",
        "use --engine hf (engine='hf' in mixlm.load)",
    )
